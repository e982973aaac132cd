"""Files are whole or absent, and those that grow together grow by whole rows, all of them or none."""

import hashlib
import json
import os
import random

import pytest

from anatomaly.errors import OutputError
from anatomaly.files import Appender, file_digest, parse_json, read_json, require_file, write_whole

LONG = b"abcdefg\n" * 2**17  # longer than what the test run itself writes to files


@pytest.fixture
def limit():
    """limit(bytes): no file of this process may grow beyond; a write stops half-way, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("order", [("short", "long"), ("long", "short")])
@pytest.mark.parametrize("more", [0, 2])
def test_rows_go_to_all_files_or_to_none(order, more, tmp_path, limit):
    rows = {"short": b"ab\n", "long": LONG}
    files = Appender([tmp_path / "new" / name for name in order])
    files.append(*(rows[name] for name in order))
    limit(len(LONG) + more)
    with pytest.raises(OutputError, match=r"long: cannot be written: .*\. One row is safe\. Free some space"):
        files.append(*(rows[name] for name in order), kept="One row is safe.")
    assert {name: (tmp_path / "new" / name).read_bytes() for name in order} == rows
    limit(2 * len(LONG))
    files.append(*(rows[name] for name in order))
    files.close()
    assert {name: (tmp_path / "new" / name).read_bytes() for name in order} == {n: 2 * row for n, row in rows.items()}


def test_files_that_are_there_are_not_appended_to(tmp_path):
    (tmp_path / "a").write_bytes(b"kept")
    with pytest.raises(OutputError, match=r"a: already exists\. Choose another output folder"):
        Appender([tmp_path / "a"])
    assert (tmp_path / "a").read_bytes() == b"kept"
    with pytest.raises(OutputError, match=r"cannot be written"):
        Appender([tmp_path / "a" / "b"])


def test_a_file_is_replaced_as_a_whole(tmp_path, limit):
    write_whole(tmp_path / "new" / "a", b"one")
    limit(len(LONG) - 1)
    with pytest.raises(OutputError, match="Free some space"):
        write_whole(tmp_path / "new" / "a", LONG)
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "new").iterdir()] == [("a", b"one")]


def test_a_digest_is_that_of_the_whole_content(tmp_path):
    content = random.Random(0).randbytes(3 * 2**20 + 7)
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def nested(depth, kind="list"):
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "0" + "}" * depth


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_json_that_is_nested_too_deep_is_a_value_error(depth, kind):
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(nested(depth, kind))
    assert parse_json(nested(60, kind))


@pytest.mark.parametrize("text", ["", "{", "NaN", "[-Infinity]", "1e999", "9" * 30, "-" + "9" * 30, "1" * 5000])
def test_json_with_numbers_that_are_none_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_comes_back_as_python_reads_it(tmp_path):
    facts = {"a": [1, -2.5, True, None, "ü"], "b": {"c": 2**62}}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(facts).encode())
    assert read_json(tmp_path / "a.json") == facts
    infinite = parse_json("[Infinity, 1e999]", finite=False)
    assert infinite == [float("inf")] * 2


def test_json_of_more_bytes_than_anybody_writes_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**28 + 1)  # sparse
    with pytest.raises(ValueError, match="bytes are too many"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, what in (
        ("pipe", "a pipe"),
        ("link", "a pipe"),
        ("device", "a pipe"),
        (".", "a f"),
    ):
        with pytest.raises(OSError, match=f"is {what}"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        require_file(tmp_path / "missing")


def test_files_that_are_gone_on_with_lose_what_follows_what_is_kept(tmp_path):
    (tmp_path / "a").write_bytes(b"one\ntw")
    files = Appender([tmp_path / "a", tmp_path / "b"], keep=(4, 0))
    files.append(b"2\n", b"B\n")
    files.close()
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"one\n2\n", b"B\n"]


class Interrupting(bytes):
    """Bytes whose length is asked for after they are written, when Ctrl-C comes."""

    def __len__(self):
        raise KeyboardInterrupt


def test_ctrl_c_leaves_whole_rows_and_no_half_of_a_file(tmp_path, monkeypatch):
    files = Appender([tmp_path / "a", tmp_path / "b"])
    files.append(b"1\n", b"A\n")
    with pytest.raises(KeyboardInterrupt):
        files.append(b"2\n", Interrupting(b"B\n"))
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"1\n", b"A\n"]

    def interrupt(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "c", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
