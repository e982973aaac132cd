"""The device asked for is there, or said not to be."""

import platform

import pytest
import torch

from anatomaly.detector import device
from anatomaly.detector.device import choose_device
from anatomaly.errors import ConfigError


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("machine", "flags", "asked", "told"),
    [
        ("x86_64", set(), ("cpu", "bf16"), 1),
        ("x86_64", set(), ("cpu", "fp32"), 0),
        ("x86_64", set(), ("auto", "fp32"), 0),
        ("x86_64", {"_is_avx512_bf16_supported"}, ("cpu", "bf16"), 0),
        ("x86_64", {"_is_amx_tile_supported"}, ("cpu", "bf16"), 0),
        ("aarch64", set(), ("cpu", "bf16"), 0),  # cannot be asked
    ],
)
def test_bf16_on_a_cpu_that_cannot_is_warned_of_once(machine, flags, asked, told, monkeypatch, caplog):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, flag, lambda flag=flag: flag in flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device._warn_slow.cache_clear()
    assert [choose_device(*asked) for _ in range(2)] == ["cpu", "cpu"]
    assert [record.getMessage() for record in caplog.records] == [
        "precision: this CPU has no instructions for bf16; expect about a tenth of the speed of fp32, the default."
    ] * told


def test_a_detector_warns_before_it_computes(make_detector, monkeypatch):
    asked = []
    monkeypatch.setattr("anatomaly.detector.detector.choose_device", lambda *words: asked.append(words) or "cpu")
    make_detector("nearest")
    assert asked == [("cpu", "fp32")]
