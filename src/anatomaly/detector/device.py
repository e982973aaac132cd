"""Where to compute, and what a precision costs there."""

from __future__ import annotations

import logging
import platform
from functools import lru_cache

import torch

from anatomaly.errors import ConfigError

logger = logging.getLogger(__name__)


def choose_device(device: str, precision: str = "fp32") -> str:
    """Resolve "auto" to "cuda" where there is one, else "cpu".

    The first time that bf16 would be slow there, one line says so.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "fp32" or "bf16".

    Raises:
        ConfigError: "cuda" is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda asked for, this machine has none that torch can use. Pass --device cpu.")
    if device == "cpu" and precision == "bf16" and not has_bf16():
        _warn_slow()
    return device


@lru_cache
def _warn_slow() -> None:
    """Say it once."""
    logger.warning(
        "precision: this CPU has no instructions for bf16; expect about a tenth of the speed of fp32, the default."
    )


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; one that cannot be asked counts as one that does."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
