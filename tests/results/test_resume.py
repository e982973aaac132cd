"""A run that was cut short, anywhere and in any way, goes on and leaves what an undisturbed one leaves."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import anatomaly.results.folder
from anatomaly.cli import main
from anatomaly.commands.console import ended_by_signal
from anatomaly.detector.calibrate import calibrate_on_support
from anatomaly.errors import OutputError
from anatomaly.results.folder import predict_to_folder
from anatomaly.results.run_record import alone
from anatomaly.types import Intensity, Sample

BATCH = 4
RUN = {"batch_size": BATCH, "task": "head_ct"}


@pytest.fixture(autouse=True)
def few_cases(monkeypatch):
    """The report shows 5 of the 13 images, so that some drop out of it before and some after an interruption."""
    monkeypatch.setattr(anatomaly.results.folder, "_CASES", 5)


@pytest.fixture(scope="module")
def supports(phantom):
    return phantom.select(task="head_ct", split="train").samples[:3]


@pytest.fixture(scope="module")
def images(phantom, tmp_path_factory):
    """Pictures, a broken one in the second batch, and 4 slices of a volume from the second batch to the third."""
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path_factory.mktemp("images")
    voxels = np.random.default_rng(0).normal(40, 30, (24, 20, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-2.0, 3.0, -4.0, 1.0])), folder / "scan.nii.gz")
    tests = phantom.select(task="head_ct", split="test").samples
    (folder / "broken.png").write_bytes(tests[0].path.read_bytes()[:99])
    slices = [Sample(folder / "scan.nii.gz", "head_ct", frame=frame) for frame in range(4)]
    return [*tests[:5], Sample(folder / "broken.png", "head_ct"), *slices, *tests[5:8]]


@pytest.fixture(scope="module")
def detector(make_detector, supports):
    made = make_detector(intensity=Intensity("range", 0.0, 255.0))
    calibrate_on_support(made, supports, task="head_ct")
    return made


@pytest.fixture(scope="module")
def whole(detector, images, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomaly.results.folder, "_CASES", 5)
        predict_to_folder(detector, images, out, **RUN)
    return out


def contents(out):
    """Every file of a folder, tables without the time that each image took."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lines = [json.loads(line) for line in found["scores.jsonl"].splitlines()]
    found["scores.jsonl"] = [json.dumps({**line, "seconds": 0}) for line in lines]
    rows = csv.DictReader(found["scores.csv"].decode().splitlines())
    found["scores.csv"] = [{**row, "seconds": 0} for row in rows]
    return found


def same(one, two):
    one, two = contents(one), contents(two)
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
    return True


class Killed(BaseException):
    """Like a kill signal: no handler of ours expects it."""


def killed_after(count):
    left = [count]

    def killed(_):
        left[0] -= 1
        if not left[0]:
            raise Killed

    return killed


@pytest.fixture
def cut(whole, tmp_path):
    """The folder of a run of which so many rows were written: cut(7)."""

    def made(rows, name="out"):
        out = tmp_path / name
        shutil.copytree(whole, out)
        (out / "report.html").unlink()
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**record, "finished": False}))
        lines = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
        for line in map(json.loads, lines[rows:]):
            for column in ("map", "overlay"):
                if line[column] is not None:
                    (out / line[column]).unlink()
        if rows < 10:
            (out / "maps/scan_map.nii.gz").unlink()
        (out / "scores.jsonl").write_bytes(b"".join(lines[:rows]))
        table = (out / "scores.csv").read_bytes().splitlines(keepends=True)
        (out / "scores.csv").write_bytes(b"".join(table[: rows + 1]))
        return out

    return made


@pytest.mark.parametrize("rows", [1, 4, 5, 7, 8, 10, 12, 13])
def test_a_killed_run_goes_on(rows, detector, images, whole, tmp_path):
    out, told, judged = tmp_path / "out", [], []
    with pytest.raises(Killed):
        predict_to_folder(detector, images, out, **RUN, on_progress=killed_after(rows))
    assert len((out / "scores.jsonl").read_text().splitlines()) == rows
    more = {"on_progress": judged.append, "on_continue": lambda *numbers: told.append(numbers)}
    predict_to_folder(detector, images, out, **RUN, **more)
    done = rows if rows == 13 else rows // BATCH * BATCH  # a batch that was cut is judged again
    assert told == ([(done, 13)] if done else [])
    assert [each.sample for each in judged] == images[done:]
    assert same(out, whole)


def test_a_run_may_be_killed_again_and_again(detector, images, whole, tmp_path):
    out, kills = tmp_path / "out", 0
    for _ in range(20):
        try:
            predict_to_folder(detector, images, out, **RUN, on_progress=killed_after(6))
            break
        except Killed:
            kills += 1
    assert kills == 2
    assert same(out, whole)


def truncate(file, share=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def half_a_row(out):
    (out / "scores.jsonl").write_bytes((out / "scores.jsonl").read_bytes()[:-100])


def half_a_csv_row(out):
    (out / "scores.csv").write_bytes((out / "scores.csv").read_bytes()[:-10])


DAMAGES = {
    "half a row": half_a_row,
    "half a row of the csv": half_a_csv_row,
    "no csv": lambda out: (out / "scores.csv").unlink(),
    "no tables": lambda out: [(out / name).unlink() for name in ("scores.csv", "scores.jsonl")],
    "empty table": lambda out: (out / "scores.jsonl").write_bytes(b""),
    "zeros at the end": lambda out: (out / "scores.jsonl").open("ab").write(bytes(500)),
    "another row": lambda out: (out / "scores.jsonl").open("ab").write(b'{"path": "a"}\n'),
    "no row": lambda out: (out / "scores.jsonl").open("ab").write(b"7\n"),
    "half a map": lambda out: truncate(sorted((out / "maps").glob("*.npy"))[0]),
    "empty map": lambda out: truncate(sorted((out / "maps").glob("*.npy"))[-1], 0),
    "no map": lambda out: sorted((out / "maps").glob("*.npy"))[3].unlink(),
    "half an overlay": lambda out: truncate(sorted((out / "overlays").glob("*.png"))[2]),
    "no overlay": lambda out: sorted((out / "overlays").glob("*.png"))[1].unlink(),
    "no volume": lambda out: (out / "maps/scan_map.nii.gz").unlink(missing_ok=True),
    "map on its way": lambda out: (out / "maps/p0008_0.npy.part").write_bytes(b"\x93NUMPY"),
    "volume on its way": lambda out: (out / "maps/scan_map.nii.gz.part").write_bytes(b"\x1f\x8b"),
}


@pytest.mark.parametrize("rows", [8, 13])
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_was_cut_is_made_again(damage, rows, cut, detector, images, whole):
    out = cut(rows)
    DAMAGES[damage](out)
    predict_to_folder(detector, images, out, **RUN)
    assert same(out, whole)


def test_a_volume_that_is_whole_is_not_written_again(cut, detector, images):
    out = cut(13)
    before = (out / "maps/scan_map.nii.gz").stat().st_mtime_ns
    predict_to_folder(detector, images, out, **RUN)
    assert (out / "maps/scan_map.nii.gz").stat().st_mtime_ns == before


def test_a_volume_that_misses_slices_is_put_together_from_both_parts(detector, images, tmp_path):
    some = [*images[:3], images[6], images[8], *images[10:]]
    first = predict_to_folder(detector, some, tmp_path / "whole", **RUN)
    with pytest.raises(Killed):
        predict_to_folder(detector, some, tmp_path / "out", **RUN, on_progress=killed_after(4))
    second = predict_to_folder(detector, some, tmp_path / "out", **RUN)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert second.remarks == first.remarks
    assert any("2 slices were not judged" in remark for remark in first.remarks)


def test_a_volume_that_vanished_in_between_is_told(detector, images, tmp_path):
    file = tmp_path / "gone.nii.gz"
    shutil.copy(images[6].path, file)
    times = file.stat()
    rows = [replace(row, path=file) for row in images[6:10]]
    with pytest.raises(Killed):
        predict_to_folder(detector, [*rows, images[0]], tmp_path / "out", **RUN, on_progress=killed_after(4))
    (tmp_path / "out/maps/gone_map.nii.gz").unlink()
    file.write_bytes(b"x" * times.st_size)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    summary = predict_to_folder(detector, [*rows, images[0]], tmp_path / "out", **RUN)
    assert any("gone_map.nii.gz is missing, though tables name it" in remark for remark in summary.remarks)


def test_the_summary_is_that_of_the_whole_run(cut, detector, images, tmp_path):
    whole = predict_to_folder(detector, images, tmp_path / "again", **RUN)
    summary = predict_to_folder(detector, images, cut(8), **RUN)
    assert summary.failed == whole.failed == 1
    assert summary.remarks == whole.remarks
    for one, two in zip(summary.predictions, whole.predictions, strict=True):
        np.testing.assert_equal(
            (one.sample, one.score, one.p_value, one.error, one.note, one.sha256, one.spacing, one.support_weights),
            (two.sample, two.score, two.p_value, two.error, two.note, two.sha256, two.spacing, two.support_weights),
        )
        np.testing.assert_equal((one.image, one.anomaly_map), (two.image, two.anomaly_map))


def test_without_maps_the_pictures_of_the_report_are_judged_again(detector, images, tmp_path):
    options = {**RUN, "maps": False, "overlays": False}
    predict_to_folder(detector, images, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        predict_to_folder(detector, images, tmp_path / "out", **options, on_progress=killed_after(12))
    summary = predict_to_folder(detector, images, tmp_path / "out", **options)
    assert sum(each.anomaly_map is not None for each in summary.predictions) == 5
    report = summary.report.read_text()
    assert report.count("data:image/") == (tmp_path / "whole/report.html").read_text().count("data:image/")


def test_what_cannot_be_seen_again_stays_in_the_report_without_its_picture(cut, detector, images, monkeypatch):
    out = cut(13)
    monkeypatch.setattr(anatomaly.results.folder, "load", lambda *_: (_ for _ in ()).throw(OutputError("gone")))
    summary = predict_to_folder(detector, images, out, **RUN)
    assert "not kept" in summary.report.read_text()


@pytest.fixture
def others(make_detector, supports, images):
    """Runs that differ from that of `cut` in one thing: (detector, images, options), and how it is told."""

    def detector(seed=0, shots=3, **choices):
        made = make_detector(seed=seed, intensity=Intensity("range", 0.0, 255.0), **choices)
        calibrate_on_support(made, supports, task="head_ct")
        return made.set_support(supports[:shots], task="head_ct")

    def uncalibrated():
        made = detector()
        made.calibrations = ()
        return made

    return {
        "another model": lambda: (detector(seed=1), images, {}),
        "other support images": lambda: (detector(shots=2), images, {}),
        "other images": lambda: (detector(), images[:-1], {}),
        "another task": lambda: (detector().set_support(supports, task="ct"), images, {}),
        "another size or intensity rule": lambda: (detector(resize="pad"), images, {}),
        "another calibration": lambda: (uncalibrated(), images, {}),
        "another choice of maps": lambda: (detector(), images, {"maps": False}),
        "another choice of overlays": lambda: (detector(), images, {"overlays": False}),
    }


@pytest.mark.parametrize(
    "words",
    [
        "another model",
        "other support images",
        "other images",
        "another task",
        "another size or intensity rule",
        "another calibration",
        "another choice of maps",
        "another choice of overlays",
    ],
)
def test_an_unfinished_run_of_something_else_is_refused_and_left_alone(words, others, cut):
    out = cut(8)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    detector, images, options = others[words]()
    with pytest.raises(OutputError, match=f"holds an unfinished run with .*{words}.*Give the same as before"):
        predict_to_folder(detector, images, out, **RUN, **options)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_image_that_changed_in_between_is_another_image(cut, detector, images, tmp_path):
    copy = tmp_path / "copy.png"
    shutil.copy(images[0].path, copy)
    rows = [replace(images[0], path=copy), *images[1:6]]
    with pytest.raises(Killed):
        predict_to_folder(detector, rows, tmp_path / "run", **RUN, on_progress=killed_after(5))
    copy.write_bytes(images[1].path.read_bytes())
    with pytest.raises(OutputError, match="other images, or these have changed"):
        predict_to_folder(detector, rows, tmp_path / "run", **RUN)


def test_a_run_that_wrote_no_row_is_forgotten(others, images, detector, whole, tmp_path):
    other, rows, options = others["another choice of maps"]()
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other, "predict", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            predict_to_folder(other, rows, out, **RUN, **options)
    predict_to_folder(detector, images, out, **RUN)
    assert same(out, whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": 1}', '{"format": 9, "command": "predict"}', "\udcff"])
def test_a_record_that_says_nothing_is_refused(content, cut, detector, images):
    out = cut(8)
    (out / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match=r"run\.json: is no record of a run"):
        predict_to_folder(detector, images, out, **RUN)


def test_a_folder_of_an_earlier_version_is_refused(cut, detector, images):
    out = cut(8)
    (out / "run.json").unlink()
    with pytest.raises(OutputError, match=r"scores\.csv: already exists\. Choose another output folder"):
        predict_to_folder(detector, images, out, **RUN)


def test_two_runs_do_not_write_to_one_folder_at_once(cut, detector, images, whole):
    pytest.importorskip("fcntl")
    out = cut(8)
    with alone(out), pytest.raises(OutputError, match="another run writes to it now"):
        predict_to_folder(detector, images, out, **RUN)
    predict_to_folder(detector, images, out, **RUN)
    assert same(out, whole)


# --- the command ---


@pytest.fixture(scope="module")
def command(make_detector, phantom, supports, tmp_path_factory):
    """Words of a command that judges 8 pictures, without --out."""
    folder = tmp_path_factory.mktemp("command")
    make_detector("nearest").save(folder / "model")
    for kind, rows in (("supports", supports), ("images", phantom.select(task="head_ct", split="test").samples)):
        (folder / kind).mkdir()
        for row in rows:
            shutil.copy(row.path, folder / kind)
    words = ["predict", "--model", "model", "--support", "supports", "--images", "images", "--task", "head_ct"]
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    return [*words, "--batch_size", "2", "--device", "cpu"]


def test_a_finished_run_is_refused_before_the_model_is_loaded(command, tmp_path, capsys, monkeypatch):
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    monkeypatch.setattr("anatomaly.detector.detector.Detector.load", lambda *_, **__: pytest.fail("was loaded"))
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    told = f"anatomaly: {tmp_path}/out: already exists and holds a finished run. Choose another output folder, or "
    assert capsys.readouterr().err.startswith(told)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(command, tmp_path, capsys, monkeypatch):
    words = [*command, "--out", str(tmp_path / "out")]
    write, left = anatomaly.results.folder.ResultWriter.write, [5]

    def interrupted(writer, prediction):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(writer, prediction)

    with monkeypatch.context() as patch:
        patch.setattr("anatomaly.results.folder.ResultWriter.write", interrupted)
        assert main(words) == 130
    out = tmp_path / "out"
    err = capsys.readouterr().err
    assert err == f"anatomaly: {out}: interrupted; what is there is complete. Run the same command again to go on.\n"
    assert len((out / "scores.jsonl").read_text().splitlines()) == 5
    assert main(words) == 0
    assert f"{out}: continues an unfinished run: 4 of 8 images are done.\n" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert same(out, tmp_path / "whole")


def test_a_polite_kill_is_like_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_signal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_a_process_that_was_killed_goes_on(command, tmp_path):
    words = [sys.executable, "-m", "anatomaly.cli", *command, "--out"]
    with subprocess.Popen([*words, tmp_path / "out"], stdout=subprocess.PIPE) as process:
        table = tmp_path / "out/scores.jsonl"
        while process.poll() is None and not (table.exists() and table.read_bytes().count(b"\n") >= 2):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    assert not json.loads((tmp_path / "out/run.json").read_text())["finished"]
    assert b"continues an unfinished run" in subprocess.run([*words, tmp_path / "out"], capture_output=True).stdout
    assert subprocess.run([*words, tmp_path / "whole"], capture_output=True).returncode == 0
    assert same(tmp_path / "out", tmp_path / "whole")
