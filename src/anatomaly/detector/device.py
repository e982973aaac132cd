"""Where to compute."""

from __future__ import annotations

import torch

from anatomaly.errors import ConfigError


def choose_device(device: str) -> str:
    """Resolve "auto" to "cuda" where there is one, else "cpu".

    Raises:
        ConfigError: "cuda" is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda asked for, this machine has none that torch can use. Pass --device cpu.")
    return device
