"""VMamba as a teacher: weights found, verified and loaded like every other teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anatomaly.backbones.teacher import Teacher
from anatomaly.backbones.vmamba.network import VMamba, official_state
from anatomaly.backbones.weights import find_weights, load_strict, read_state, tensors_of

if TYPE_CHECKING:
    from anatomaly.backbones.weights import WeightsSource


@dataclass(frozen=True, slots=True)
class VMambaSpec:
    """A VMamba of the table.

    Attributes:
        variant: Name in `vmamba.VARIANTS`.
        source: Where the official checkpoint is.
        merged: See `VMamba`.
    """

    variant: str
    source: WeightsSource
    merged: bool = False


def vmamba_teacher(name: str, spec: VMambaSpec, *, weights: str = "auto", normalise: bool = True) -> Teacher:
    """Build a teacher from VMamba.

    Args:
        name: Name in `BACKBONES`, for messages and bundles.
        spec: Which one.
        weights: "auto" (see `weights.find_weights`), "random" (seeded, for tests and timing), or a file: an official
            checkpoint in either spelling.
        normalise: See `Teacher`.

    Raises:
        WeightsError: No weights can be had, or they do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.manual_seed(0)
        body = VMamba(spec.variant, merged=spec.merged)
    if weights != "random":
        file = find_weights(name, spec.source, explicit=None if weights == "auto" else Path(weights))
        state = tensors_of(read_state(file), where=str(file))
        load_strict(body, official_state(state, body), where=str(file))
    return Teacher(
        name,
        body,
        channels=body.channels,
        strides=body.strides,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        weights=weights,
        normalise=normalise,
    )
