"""The device asked for is there, or said not to be."""

import pytest
import torch

from anatomaly.detector.device import choose_device
from anatomaly.errors import ConfigError


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda")
