"""How anomalib's torch models are run on levels that our teacher has computed; all that knows anomalib from inside."""

from __future__ import annotations

import importlib
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from anatomaly.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    #: The teacher's four levels of a batch, each (B, C, h, w), shallow to deep.
    Levels: TypeAlias = Sequence[Tensor]


class Shapes(nn.Module):
    """A network with the teacher's numbers of channels, for anomalib to count; nothing else is asked of it."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for name, count in zip(level_names(len(channels)), channels, strict=True):
            self.add_module(name, nn.Conv2d(3, count, 1, stride=32))

    def forward(self, images: Tensor) -> list[Tensor]:
        """One (B, C, h, w) per level."""
        return [layer(images) for layer in self.children()]


class Given(nn.Module):
    """Stands where anomalib extracts features and hands out levels that the teacher has computed before."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.names = level_names(count)
        self.levels: Levels = ()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The levels by name, whatever the images."""
        return dict(zip(self.names, self.levels, strict=True))


def level_names(count: int) -> list[str]:
    """What the levels are called towards anomalib."""
    return [f"layer{number}" for number in range(1, count + 1)]


def run(model: Any, levels: Levels, size: tuple[int, int]) -> Any:
    """The model's own forward; of the images it needs no more than their number and size."""
    given = next(part for part in model.children() if isinstance(part, Given))
    given.levels = levels  # they live until the next batch
    return model(levels[0].new_zeros(1).expand(len(levels[0]), 3, *size))


def judge(model: Any, used: slice, levels: Levels, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps (B, H, W) and scores (B,) of a fitted model, both raw, from some of the levels."""
    found = run(model, levels[used], size)
    return found.anomaly_map[:, 0], found.pred_score.reshape(-1)


def require_anomalib(name: str) -> None:
    """Raise a `NotReadyError` for the peer of that name where anomalib is not installed."""
    if find_spec("anomalib") is None:
        raise NotReadyError(f"{name}: anomalib is not installed. Run: pip install 'anatomaly[peers]'")


def import_anomalib(module: str) -> Any:
    """One of anomalib's modules, without what it says about the others it imports."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"anomalib.{module}")
    except ImportError as err:
        raise NotReadyError(f"peers: anomalib cannot be imported ({err}). Run: pip install 'anatomaly[peers]'") from err


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, from which anomalib draws, and put them back."""
    before = np.random.get_state()  # noqa: NPY002 - scikit-learn's, for the coreset
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
