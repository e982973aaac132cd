"""The methods: one literal table and one way to build them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anatomaly.errors import ConfigError
from anatomaly.methods.d24fad import D24FAD, Distance, SoftmaxScale
from anatomaly.methods.nearest import PatchNearestNeighbours

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anatomaly.backbones.teacher import Teacher

__all__ = ["D24FAD", "METHODS", "PatchNearestNeighbours", "build_method"]

METHODS: Mapping[str, type[D24FAD] | type[PatchNearestNeighbours]] = {
    "d24fad": D24FAD,
    "nearest": PatchNearestNeighbours,
}


def build_method(
    name: str,
    teacher: Teacher,
    *,
    distance: Distance = "flattened",
    softmax_scale: SoftmaxScale = "channels",
    tsd_weight: float = 0.1,
    seed: int = 0,
) -> D24FAD | PatchNearestNeighbours:
    """Build a method with freshly initialised weights.

    Args:
        name: A name in `METHODS`.
        teacher: The frozen backbone.
        distance: Of D24FAD's losses.
        softmax_scale: Of D24FAD's learn-to-weight.
        tsd_weight: Of D24FAD's teacher-student loss.
        seed: Of the initial weights; the global random state is left alone.

    Raises:
        ConfigError: The name is unknown.
    """
    import torch

    if name == "nearest":
        return PatchNearestNeighbours(teacher)
    if name == "d24fad":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return D24FAD(teacher, distance=distance, softmax_scale=softmax_scale, tsd_weight=tsd_weight)
    raise ConfigError(f"method: unknown name {name!r}, expected one of {', '.join(METHODS)}.")
