"""A container's share of the processors is what torch gets to see."""

import os

import pytest

from anatomaly.commands.processors import limit_threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, "2"),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3"),
        ({"cpu.max": "9900000 100000\n"}, "4"),  # more than there are
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "\n"}, None),
        ({}, None),
    ],
)
def test_the_threads_are_those_the_container_allows(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "environ", {})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    limit_threads(tmp_path)
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_a_number_that_the_user_gave_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    limit_threads(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "7"
