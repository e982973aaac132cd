"""Files are whole or absent, and those that grow together grow by whole rows, all of them or none."""

import hashlib
import random

import pytest

from anatomaly.errors import OutputError
from anatomaly.files import Appender, file_digest, write_whole

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
