"""A short, seeded run of benchmarks/fuzz_files.py: damaged files of every format, sound ones between them."""

import sys
from pathlib import Path

import pytest

from anatomaly.data import workers

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")


@pytest.fixture
def fuzz_files(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "fuzz_files", raising=False)
    import fuzz_files

    monkeypatch.setattr(workers, "_pool", workers._Pool())  # run_block ends it
    return fuzz_files


def test_damaged_files_neither_end_the_run_nor_cost_another_file_its_answer(fuzz_files):
    found = fuzz_files.run_block(seed=1, start=0, count=200)
    assert found["total"]["damaged"] >= 200
    assert found["total"]["refused"] > 50
    assert found["total"]["sound"] == 40
    assert found["total"]["sound_lost"] == 0
    assert found["total"]["tracebacks"] == 0


def test_the_fuzzer_notices_a_sound_file_that_reads_differently(fuzz_files, monkeypatch):
    seeds = {"png L": fuzz_files.make_seeds()["png L"]}
    monkeypatch.setattr(fuzz_files, "make_seeds", lambda: seeds)
    numbers = iter(range(100))
    monkeypatch.setattr(fuzz_files, "digest", lambda loaded: next(numbers))
    assert fuzz_files.run_block(seed=1, start=0, count=10)["total"]["sound_lost"] == 2
