"""The methods: one literal table and one way to build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from anatomaly.errors import ConfigError
from anatomaly.methods.attention import PatchAttention
from anatomaly.methods.d24fad import D24FAD, Distance, SoftmaxScale
from anatomaly.methods.nearest import PatchNearestNeighbours
from anatomaly.methods.pdd import PDD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anatomaly.backbones.teacher import Teacher

__all__ = [
    "D24FAD",
    "METHODS",
    "PDD",
    "AnyMethod",
    "PatchAttention",
    "PatchNearestNeighbours",
    "Trainable",
    "build_method",
]

Trainable: TypeAlias = D24FAD | PDD | PatchAttention
AnyMethod: TypeAlias = Trainable | PatchNearestNeighbours

METHODS: Mapping[str, type[AnyMethod]] = {
    "d24fad": D24FAD,
    "pdd": PDD,
    "attention": PatchAttention,
    "nearest": PatchNearestNeighbours,
}


def build_method(
    name: str,
    teachers: Teacher | Sequence[Teacher],
    *,
    distance: Distance = "flattened",
    softmax_scale: SoftmaxScale = "channels",
    tsd_weight: float = 0.1,
    self_distillation: bool = True,
    learn_to_weight: bool = True,
    pdd: Mapping[str, Any] | None = None,
    attention: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> AnyMethod:
    """Build a method with freshly initialised weights.

    Args:
        name: A name in `METHODS`.
        teachers: The frozen backbone, or PDD's local and global one; PDD with one is plain reverse distillation.
        distance: Of D24FAD's losses.
        softmax_scale: Of D24FAD's learn-to-weight.
        tsd_weight: Of D24FAD's teacher-student loss.
        self_distillation: Of D24FAD; an ablation.
        learn_to_weight: Of D24FAD; an ablation.
        pdd: Arguments of `PDD`, by name.
        attention: Arguments of `PatchAttention`, by name.
        seed: Of the initial weights; the global random state is left alone.

    Raises:
        ConfigError: The name is unknown, or PDD's settings contradict each other.
    """
    teacher, *others = teachers if isinstance(teachers, Sequence) else [teachers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "nearest":
            return PatchNearestNeighbours(teacher)
        if name == "attention":
            return PatchAttention(teacher, **(attention or {}))
        if name == "d24fad":
            return D24FAD(
                teacher,
                distance=distance,
                softmax_scale=softmax_scale,
                tsd_weight=tsd_weight,
                self_distillation=self_distillation,
                learn_to_weight=learn_to_weight,
            )
        if name == "pdd":
            return PDD(teacher, others[0] if others else None, **(pdd or {}))
    raise ConfigError(f"method: unknown name {name!r}, expected one of {', '.join(METHODS)}.")
