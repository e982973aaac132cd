"""A decoder that dies or hangs costs the file in hand and nothing else, and no worker outlives its parent."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from PIL import Image

from anatomaly.data import workers
from anatomaly.data.loading import load_batches
from anatomaly.data.readers import count_frames, read_image
from anatomaly.errors import NotReadyError, ReadError
from anatomaly.types import Preprocessing, Sample

DEADLY = """
import os, time
from pathlib import Path
from anatomaly.data import readers, workers
def answer(request):
    name = Path(request["path"]).name
    if name.startswith("dies"):
        os.kill(os.getpid(), int(name.split("_")[1]))
    if name.startswith("once") and not Path(request["path"] + ".seen").exists():
        Path(request["path"] + ".seen").touch()
        os._exit(3)
    if name.startswith("hangs"):
        time.sleep(600)
    if name.startswith("prints"):
        os.write(1, b"decoder says"); os.write(2, b"hello")
    return readers.answer(request)
workers.serve(answer)
"""


@pytest.fixture
def pool(monkeypatch):
    """Workers whose decoder dies, hangs or prints where the name of the file says so."""
    own = workers._Pool()
    monkeypatch.setattr(workers, "_pool", own)
    monkeypatch.setattr(workers, "_BOOT", f"import json, sys; sys.path[:] = json.loads(sys.argv[1])\n{DEADLY}")
    yield own
    own.end()


def grey(path, value=7):
    Image.fromarray(np.full((16, 12), value, np.uint8)).save(path, format="PNG")
    return path


def processes(own):
    return [worker.process.pid for worker in own.workers]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_decoder_that_dies_is_one_line_and_the_next_file_is_read(tmp_path, pool, number):
    deadly = grey(tmp_path / f"dies_{int(number)}")
    with pytest.raises(ReadError) as excinfo:
        read_image(deadly)
    assert str(excinfo.value).startswith(
        f"{deadly}: cannot be decoded (the decoder died, signal {int(number)}). It is "
    )
    assert str(excinfo.value).endswith("export it again, or leave it out.")
    with pytest.raises(ReadError, match="the decoder died"):
        count_frames(deadly)
    assert read_image(grey(tmp_path / "a.png", 3)).pixels.max() == 3


def test_rows_around_a_deadly_file_are_read_in_order(tmp_path, pool):
    paths = [grey(tmp_path / (f"dies_11_{n}" if n % 5 == 2 else f"{n}.png"), 10 * n) for n in range(15)]
    batches = load_batches([Sample(p, "t") for p in paths], Preprocessing(size=(8, 8)), batch_size=4)
    items = [item for batch in batches for item in batch]
    assert [item.sample.path for item in items] == paths
    for n, item in enumerate(items):
        if n % 5 == 2:
            assert "the decoder died, signal 11" in item.error
        else:
            assert item.prepared.display.max() * 255 == pytest.approx(10 * n, abs=0.01)


def test_a_file_whose_worker_died_once_is_read_by_another(tmp_path, pool):
    assert read_image(grey(tmp_path / "once", 9)).pixels.max() == 9


def test_a_file_that_takes_too_long_is_given_up(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(workers, "TIME_LIMIT", 1)
    with pytest.raises(ReadError, match=r"cannot be decoded \(it took more than 1 s\)"):
        read_image(grey(tmp_path / "hangs"))
    assert read_image(grey(tmp_path / "a.png")).pixels.max() == 7


def test_what_decoders_print_is_neither_shown_nor_taken_for_an_answer(tmp_path, pool, capfd):
    assert read_image(grey(tmp_path / "prints", 5)).pixels.max() == 5
    assert capfd.readouterr() == ("", "")


def test_an_idle_worker_that_was_killed_is_replaced(tmp_path, pool):
    path = grey(tmp_path / "a.png")
    read_image(path)
    (first,) = processes(pool)
    os.kill(first, signal.SIGKILL)
    assert read_image(path).pixels.max() == 7
    assert first not in processes(pool)


def test_workers_are_kept_and_never_more_than_allowed(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(workers, "WORKERS", 2)
    paths = [grey(tmp_path / f"{n}.png") for n in range(12)]
    read_image(paths[0])
    before = processes(pool)
    assert len(before) == 1  # one file at a time needs one worker
    threads = [threading.Thread(target=read_image, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(before) <= set(processes(pool))
    assert len(pool.workers) <= 2


def test_a_worker_that_cannot_start_is_not_the_fault_of_the_file(tmp_path, pool, monkeypatch):
    path = grey(tmp_path / "a.png")
    monkeypatch.setattr(workers, "_BOOT", "raise SystemExit(3)")
    with pytest.raises(NotReadyError, match=r"the process that decodes does not start \(exit code 3\)"):
        read_image(path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(NotReadyError, match=r"a\.png: .* does not start \(No such file"):
        read_image(path)


def test_a_relative_path_follows_the_working_directory(tmp_path, pool, monkeypatch):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        grey(tmp_path / name / "a.png", value)
        monkeypatch.chdir(tmp_path / name)
        image = read_image(type(tmp_path)("a.png"))
        assert (image.pixels.max(), str(image.path)) == (value, "a.png")


def test_a_name_that_is_not_utf_8(tmp_path, pool):
    path = tmp_path / os.fsdecode(b"M\xfcller.png")
    grey(path, 4)
    assert read_image(path).pixels.max() == 4
    path.write_bytes(b"broken")
    with pytest.raises(ReadError) as excinfo:
        read_image(path)
    assert str(excinfo.value).startswith(f"{path}: is not a PNG")


def run(code, *arguments):
    """A script of its own, with no `if __name__ == "__main__"`."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def alive(pid):
    try:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    except FileNotFoundError:
        pytest.skip("no ps")
    return bool(state.strip()) and not state.startswith("Z")


READ_AND_WAIT = """
    import sys, time
    from pathlib import Path
    from anatomaly.data import workers
    from anatomaly.data.readers import read_image
    print(read_image(Path(sys.argv[1])).pixels.max(), workers._pool.workers[0].process.pid, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("killed", [True, False])
def test_workers_end_with_their_parent(tmp_path, killed):
    script = run(READ_AND_WAIT, grey(tmp_path / "a.png", 6), 600 if killed else 0)
    value, pid = script.stdout.readline().split()
    assert float(value) == 6
    if killed:
        assert alive(pid)
        script.kill()
    script.wait(30)
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    script.stdout.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_workers_of_its_own(tmp_path):
    script = run(
        """
        import os, sys
        from pathlib import Path
        from anatomaly.data import workers
        from anatomaly.data.readers import read_image
        read = lambda: (int(read_image(Path(sys.argv[1])).pixels.max()), workers._pool.workers[0].process.pid)
        first = read()
        child = os.fork()
        again = read()
        print(again[0], again[1] == first[1], flush=True)
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        print(read() == first)
        """,
        grey(tmp_path / "a.png", 8),
    )
    lines = script.communicate(timeout=60)[0].split("\n")
    assert sorted(lines[:2]) == ["8 False", "8 True"]
    assert lines[2] == "True"


def test_a_script_that_leaves_images_unread_ends(tmp_path):
    """Nobody closes the generator, and with room for one image more are waiting to be read."""
    grey(tmp_path / "a.png")
    script = run(
        """
        import sys
        from pathlib import Path
        from anatomaly.data import loading
        from anatomaly.types import Preprocessing, Sample
        loading.MAX_BYTES = 1
        batches = loading.load_batches([Sample(Path(sys.argv[1]), "t")] * 50, Preprocessing(size=(8, 8)), batch_size=16)
        print(len(next(batches)))
        """,
        tmp_path / "a.png",
    )
    assert script.communicate(timeout=60)[0].split() == ["1"]
    assert script.returncode == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/exe"), reason="there is no /proc")  # noqa: PTH110
def test_a_worker_starts_where_the_way_to_the_interpreter_is_closed(monkeypatch, tmp_path):
    """As for another user whose interpreter lies in root's folder; /proc/self/exe leads there all the same."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *words, **how: started.append(how) or popen(*words, **how))
    monkeypatch.setattr(workers.os, "access", lambda *_: False)
    own = workers._Pool()
    monkeypatch.setattr(workers, "_pool", own)
    try:
        assert read_image(grey(tmp_path / "a.png")).pixels.max() == 7
    finally:
        own.end()
    assert [each["executable"] for each in started] == ["/proc/self/exe"]
