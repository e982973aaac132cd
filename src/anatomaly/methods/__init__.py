"""The methods: `METHODS`, one record each, and one way to build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anatomaly.methods.table import METHODS as METHODS
from anatomaly.methods.table import MethodRecord as MethodRecord

if TYPE_CHECKING:
    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Method


def build_method(name: str, teachers: Teacher | Sequence[Teacher], settings: Any = None, *, seed: int = 0) -> Method:
    """Build a method with freshly initialised weights.

    Args:
        name: A name in `METHODS`.
        teachers: The frozen backbone, or as many as the method takes; those beyond are left out.
        settings: A record of the method's own class; None takes its defaults.
        seed: Of the initial weights; the global random state is left alone.

    Raises:
        ConfigError: The name is unknown, or the settings contradict each other.
    """
    import torch

    record = METHODS[name]
    chosen = teachers if isinstance(teachers, Sequence) else [teachers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return record.build(chosen, record.settings() if settings is None else settings)
