"""An archive judged by many processes: the same rows as from one, whatever is killed on the way."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

import anatomaly.archive.report
from anatomaly.archive.cluster import Tasks, connected, tasks
from anatomaly.archive.images import write_images
from anatomaly.archive.run import predict_to_table
from anatomaly.archive.shares import Plan, Shares, share_out
from anatomaly.archive.stages import JudgeBatches, ReadChunks, Reader
from anatomaly.archive.table import finished_chunks, table_of, write_chunks
from anatomaly.cli import main
from anatomaly.errors import ConfigError, NotReadyError, OutputError, check
from anatomaly.results.folder import predict_to_folder

PLAN = Plan(actors=1, readers=1, chunk=4, batch_size=4)


@pytest.fixture(scope="session")
def one_process(judging, archive, tmp_path_factory):
    """The rows that `predict` writes, by path and frame, with their maps."""
    out = tmp_path_factory.mktemp("one") / "out"
    predict_to_folder(judging, [archive], out, batch_size=4, task="head_ct", overlays=False)
    return [{**json.loads(line), "folder": out} for line in (out / "scores.jsonl").read_text().splitlines()]


def judged(detector, source, out, plan=PLAN, **options):
    return predict_to_table(detector, str(source), out, plan, processors=2, task="head_ct", **options)


def table(out):
    order = [("item", "ascending"), ("frame", "ascending")]
    return ds.dataset(out / "table", format="parquet").to_table().sort_by(order).drop_columns(["seconds"])


@pytest.fixture(scope="session")
def whole(judging, archive, ray_here, tmp_path_factory):
    """A run that nothing disturbed, with maps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        same = contextlib.nullcontext({"CPU": 4.0})
        patch.setattr("anatomaly.archive.run.connected", lambda *_, **__: same)
        steps = []
        totals = judged(judging, archive, out, replace(PLAN, maps=True), on_progress=steps.append)
    return out, totals, steps


def test_the_rows_are_those_of_one_process(whole, one_process, archive):
    out, totals, steps = whole
    rows = table(out).to_pylist()
    assert len(rows) == len(one_process) == 15
    for row, other in zip(rows, one_process, strict=True):
        assert row["path"] == other["path"]
        for name in ("frame", "task", "label", "status", "error", "p_value", "note", "sha256"):
            assert row[name] == other[name], name
        if other["status"] == "ok":
            # In the same batches; only the number of torch's threads may differ.
            assert row["score"] == pytest.approx(other["score"], rel=1e-5)
            np.testing.assert_allclose(
                np.load(out / row["map"]), np.load(other["folder"] / other["map"]), rtol=1e-4, atol=1e-6
            )
        assert row["model"] == json.loads((out / "run.json").read_text())["facts"]["model"]
    assert sorted(path.name for path in (out / "table").iterdir()) == [f"part-{n:06d}.parquet" for n in range(3)]
    assert sum(steps) == len(list(archive.iterdir())) == 11
    assert (totals.images, totals.scored, totals.failed) == (15, 13 + 1, 1)


def test_the_page_tells_the_whole_table(whole):
    out, totals, _ = whole
    page = (out / "report.html").read_text()
    assert "<span>15 images</span><span>14 scored</span>" in page
    assert page.count('<article class="case') == 14
    assert "broken.png" in page
    assert "fullest bar" in page
    assert "P-values" in page
    assert totals.above is not None


def test_without_maps_the_page_has_its_pictures_and_no_more_than_its_share(whole, judging, monkeypatch, tmp_path):
    out, _, _ = whole
    shutil.copytree(out / "table", tmp_path / "table")
    monkeypatch.setattr(anatomaly.archive.report, "_CASES", 3)
    totals = anatomaly.archive.report.write_table_report(judging, tmp_path, source="here")
    page = totals.report.read_text()
    assert page.count('<article class="case') == 3
    assert "The page shows the 3 highest scores" in page
    highest = sorted(table(out)["score"].drop_null().to_pylist())[:-4:-1]
    assert totals.top["score"].to_pylist() == highest
    assert "Distribution of the 14 scores" in page


def test_a_finished_run_is_refused(whole, judging, archive):
    with pytest.raises(OutputError, match="holds a finished run"):
        judged(judging, archive, whole[0])


def unfinished(whole, tmp_path, *missing):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    for number in missing:
        (out / f"table/part-{number:06d}.parquet").unlink()
    return out


def test_a_file_that_lost_its_end_is_not_there(whole, tmp_path):
    out = unfinished(whole, tmp_path, 1)
    (out / "table/part-000001.parquet.part").write_text("half of it")
    (out / "table/part-000002.parquet").write_bytes((out / "table/part-000002.parquet").read_bytes()[:-9])
    assert finished_chunks(out).tolist() == [0]
    assert finished_chunks(whole[0]).tolist() == [0, 1, 2]


def test_a_run_of_something_else_is_refused_and_left_alone(whole, judging, archive, tmp_path):
    out = unfinished(whole, tmp_path, 1)
    before = sorted(path.name for path in out.rglob("*"))
    for plan, source, told in (
        (PLAN, archive, "another choice of maps"),
        (replace(PLAN, maps=True, chunk=5), archive, "another size of chunks"),
        (replace(PLAN, maps=True), archive / "p0.png", "other images"),
    ):
        with pytest.raises(OutputError, match=told):
            judged(judging, source, out, plan)
    with pytest.raises(OutputError, match="another engine"):
        predict_to_folder(judging, [archive / "p0.png"], out)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_a_table_of_addresses_is_read_through_fsspec(judging, archive, one_process, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as stream:
        for name in ("p3.png", "broken.png"):
            stream.write(archive / name, f"in/{name}")
    addresses = [f"zip://in/{name}::file://{tmp_path}/all.zip" for name in ("p3.png", "broken.png", "gone.png")]
    pq.write_table(pa.table({"path": addresses}), tmp_path / "table.parquet")
    rows = in_this_process(judging, tmp_path / "table.parquet", tmp_path)
    (other,) = [row for row in one_process if row["path"].endswith("p3.png")]
    assert [row["path"] for row in rows] == addresses
    assert rows[0]["score"] == pytest.approx(other["score"], rel=1e-5)
    assert rows[1]["error"].startswith(f"{addresses[1]}: ")
    assert "cannot be fetched" in rows[2]["error"]


def in_this_process(detector, source, folder):
    """Rows of a source that both stages made here, without Ray."""
    images = write_images(str(source), folder / "list", task="head_ct", chunk=4)
    read = ReadChunks(images, Reader(detector.preprocessing, 4, Path.cwd()), 2.0)
    judge = JudgeBatches(detector, "cpu", 1, None)
    blocks = map(judge, read(pa.table({"chunk": range(images.chunks)})))
    assert list(write_chunks(blocks, folder)) == list(range(images.chunks))
    return table(folder).to_pylist()


def test_copies_are_removed_when_they_were_read(judging, archive, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as stream:
        for number in range(40):
            stream.write(archive / "p0.png", f"{number}.png")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    facts = {"frame": None, "task": "ct", "label": None, "patient_id": None, "whole": True}
    rows = [{"path": f"zip://{number}.png::file://{tmp_path}/all.zip", **facts} for number in range(40)]
    read = Reader(judging.preprocessing, 2, Path("/")).load(rows)
    left = [len(list(tmp_path.glob("anatomaly-*/*"))) for _ in read]
    assert max(left) < 15  # some batches ahead, however many there are
    assert not list(tmp_path.glob("anatomaly-*"))


def test_a_chunk_is_written_once_it_is_whole_however_it_arrives(tmp_path):
    def batch(chunk, place, count, total):
        row = {"item": 0, **dict.fromkeys(("sha256", "support_weights"))}
        from anatomaly.results.rows import COLUMNS

        rows = [{**row, **dict.fromkeys(COLUMNS), "score": float(place + n)} for n in range(count)]
        return table_of(rows, 0, "m", chunk=chunk, place=place, total=total)

    parts = [batch(0, 0, 2, -1), batch(0, 2, 2, 4), batch(1, 0, 1, 1)]
    for number, order in enumerate(itertools.permutations(parts)):
        blocks = pa.concat_tables(order)
        out = tmp_path / str(number)
        assert sorted(write_chunks((blocks.slice(n, 1) for n in range(5)), out)) == [0, 1]
        assert pq.read_table(out / "table/part-000000.parquet")["score"].to_pylist() == [0.0, 1.0, 2.0, 3.0]
        assert finished_chunks(out).tolist() == [0, 1]
    assert list(write_chunks([parts[0]], tmp_path / "half")) == []


def test_every_batch_but_the_last_of_a_chunk_leaves_its_length_open(judging, archive, tmp_path):
    images = write_images(str(archive), tmp_path, task="ct", chunk=6)
    read = ReadChunks(images, Reader(judging.preprocessing, 4, Path("/")), 2.0)
    batches = list(read(pa.table({"chunk": [1]})))
    assert [batch["place"][0].as_py() for batch in batches] == [0, 4, 8]
    assert [batch["total"][0].as_py() for batch in batches] == [-1, -1, 9]
    assert batches[0]["shape"][0].as_py()[1] == 1, "grey images travel as one channel"


# --- kills ---


def descendants(of):
    """Process ids below one, with their command lines."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = {}, [of]
    while waiting:
        for child in parents.get(waiting.pop(), ()):
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            waiting.append(child)
    return found


@pytest.mark.slow
def test_workers_that_are_killed_cost_nothing(judging, archive, one_process, one_ray, tmp_path):
    names = [f"p{number % 8}.png" if number % 50 else "broken.png" for number in range(300)]
    pq.write_table(pa.table({"path": [str(archive / name) for name in names]}), tmp_path / "table.parquet")
    killed = []

    def kill(_):
        if len(killed) < 2:
            stage = ["ReadChunks", "JudgeBatches"][len(killed)]
            os.kill(next(pid for pid, name in descendants(os.getpid()).items() if stage in name), signal.SIGKILL)
            killed.append(stage)

    judged(judging, tmp_path / "table.parquet", tmp_path / "out", replace(PLAN, actors=2), on_progress=kill)
    assert killed == ["ReadChunks", "JudgeBatches"]
    rows = table(tmp_path / "out").to_pylist()
    assert [row["item"] for row in rows] == list(range(300))
    known = {Path(row["path"]).name: row for row in one_process}
    for row, name in zip(rows, names, strict=True):
        assert (Path(row["path"]).name, row["error"], row["sha256"]) == (
            name,
            known[name]["error"],
            known[name]["sha256"],
        )
        assert row["score"] == (None if row["error"] else pytest.approx(known[name]["score"], rel=1e-5))


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on(judging, archive, one_ray, tmp_path, capsys):
    judging.save(tmp_path / "model")
    judging.save_support(tmp_path / "bank")
    many = tmp_path / "images"
    many.mkdir()
    for number in range(40):
        shutil.copy(archive / f"p{number % 8}.png", many / f"{number}.png")
    words = ["predict", "--model", tmp_path / "model", "--bank", tmp_path / "bank", "--images", many, "--engine", "ray"]
    words = [*map(str, words), "--task", "head_ct", "--chunk", "2", "--batch_size", "2", "--device", "cpu"]
    words += ["--actors", "1", "--readers", "1", "--out", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-m", "anatomaly.cli", *words], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("out/table/*.parquet")):
            time.sleep(0.001)
        below = descendants(process.pid)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    assert not json.loads((tmp_path / "out/run.json").read_text())["finished"]
    (tmp_path / "out/table/part-000020.parquet.part").write_text("half of it")
    done = {path.name: path.read_bytes() for path in tmp_path.glob("out/table/*.parquet")}
    assert 0 < len(done) < 20
    deadline = time.monotonic() + 30
    working = [pid for pid, name in below.items() if "MapWorker" in name or "raylet" in name]
    while any(Path(f"/proc/{pid}").exists() for pid in working) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert working
    assert not [pid for pid in working if Path(f"/proc/{pid}").exists()]
    assert main(words) == 0
    assert "continues an unfinished run: " in capsys.readouterr().out
    assert not list(tmp_path.glob("out/table/*.part"))
    assert {name: (tmp_path / "out/table" / name).read_bytes() for name in done} == done
    rows = table(tmp_path / "out").to_pylist()
    assert [row["item"] for row in rows] == list(range(40))
    assert len({row["score"] for row in rows}) == 8


# --- the command and the cluster ---


@pytest.fixture
def words(archive, phantom, tmp_path):
    supports = phantom.select(task="head_ct", split="train").samples[:2]
    given = ["predict", "--support", *(str(row.path) for row in supports), "--images", str(archive)]
    return [*given, "--out", str(tmp_path / "out"), "--engine", "ray"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--overlays", "true"], "--engine ray has no --overlays"),
        (["--alpha", "0.1"], "--engine ray has no --alpha"),
        (["--out", "s3://bucket/out"], "expected a folder of this machine or a shared one"),
        (["--images", "nothing.parquet"], "nothing.parquet: no such file or folder"),
        (["--images", "a.png", "b.png"], "takes one table or folder"),
        (["--actors", "0"], "actors: got 0, expected a whole number from 1"),
        (["--engine", "process", "--chunk", "5"], "--chunk is for --engine ray"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_loaded(more, told, words, capsys, monkeypatch):
    monkeypatch.setattr("anatomaly.detector.detector.Detector.load", lambda *_, **__: pytest.fail("was loaded"))
    assert main([*words, *more]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_without_ray_it_says_how_to_install_it(words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words) == 2
    assert 'pip install "anatomaly[scale]"' in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(words, capsys, monkeypatch):
    import anatomaly.archive.run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(anatomaly.archive.run, "predict_to_table", interrupted)
    assert main(words) == 130
    assert "interrupted; what is there is complete. Run the same command again to go on." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "no Ray cluster answers"),
        ("nonsense", "expected HOST:PORT"),
        ("ray://a:1", "expected HOST:PORT"),
    ],
)
def test_an_address_where_nobody_is(address, told):
    with pytest.raises(NotReadyError, match=re.escape(told)), connected(address):
        pass


def test_a_machine_and_a_cluster_are_shared_out():
    assert share_out(Plan(), 2, 0) == Shares(actors=2, readers=1, threads=1, gpus=0)
    assert share_out(Plan(), 16, 0) == Shares(actors=4, readers=2, threads=4, gpus=0)
    assert share_out(Plan(), 16, 2) == Shares(actors=2, readers=4, threads=1, gpus=1)
    assert share_out(Plan(device="cpu", actors=3, readers=5), 16, 2) == Shares(3, 5, 5, 0)
    joined = share_out(Plan(address="a:1"), 16, 0)
    assert joined == Shares(actors=3, readers=1, threads=5, gpus=0)
    assert joined.processors == 16
    with pytest.raises(ConfigError, match="2 GPUs"):
        share_out(Plan(actors=3), 16, 2)
    with pytest.raises(ConfigError, match="cluster at a:1 has 4"):
        share_out(Plan(address="a:1", actors=8), 4, 0)


def test_cells_run_in_the_cluster_and_tell_what_went_wrong(ray_here, tmp_path):
    pool = Tasks(1, 0, 2)
    good, bad = pool.submit(Path.mkdir, tmp_path / "good"), pool.submit(check, "bad", "bad", False, "good")
    assert good.result(60) is None
    assert (tmp_path / "good").is_dir()
    with pytest.raises(ConfigError, match=r"^bad: got bad, expected good\.$"):
        bad.result(60)


def test_a_cell_that_no_machine_has_room_for(monkeypatch):
    same = contextlib.nullcontext({"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr("anatomaly.archive.cluster.connected", lambda *_, **__: same)
    with (
        pytest.raises(ConfigError, match="the cluster has 4 processors"),
        tasks(None, processors=1, each=5, use_gpus=True),
    ):
        pass
    with tasks(None, processors=1, each=2, use_gpus=False) as found:
        assert (found.processors, found.at_once) == (2, 2)
    with tasks(None, processors=1, each=2, use_gpus=True) as found:
        assert found.at_once == 1
