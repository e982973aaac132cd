"""A frozen CNN teacher: any timm feature pyramid behind one declared interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anatomaly.backbones.weights import WeightsSource, find_weights, load_strict, read_state, state_digest, tensors_of
from anatomaly.errors import ShapeError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

#: Levels a method may use: strides 4, 8, 16 and 32 in a CNN; the last one feeds the student.
LEVELS = 4


@dataclass(frozen=True, slots=True)
class TimmSpec:
    """A backbone of the table: which timm model, how its input is scaled and where its weights are.

    Attributes:
        model: timm model name.
        mean: Per-channel mean subtracted from [0, 1] input; None takes timm's own.
        std: Per-channel divisor; None takes timm's own.
        source: Where the weights are; None leaves finding them to timm (Hugging Face hub).
        by_order: The file's tensors match the model's in order, not by name.
    """

    model: str
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    source: WeightsSource | None = None
    by_order: bool = False


class TimmTeacher(nn.Module):
    """Frozen feature pyramid of a timm model; always in eval mode, never updated.

    Attributes:
        name: Name in `BACKBONES`.
        channels: Channels of the levels, shallow to deep.
        strides: Input pixels per feature cell of the levels.
        signed: The levels take negative values (no ReLU at their end), found by running the model once.
        weights_hash: Digest of names and values of all weights; identifies the teacher in bundles and banks.

    Args:
        name: Name in `BACKBONES`, for messages and bundles.
        spec: Which timm model.
        weights: "auto" (see `weights.find_weights`), "random" (seeded, for tests and timing), or a file.
        normalise: Scale [0, 1] input by the model's mean and std; False feeds it as it is (D24FAD's release).

    Raises:
        WeightsError: No weights can be had, or they do not fit.
    """

    mean: Tensor
    std: Tensor
    body: Any  # a timm model, which adds feature_info and pretrained_cfg to nn.Module

    def __init__(self, name: str, spec: TimmSpec, *, weights: str = "auto", normalise: bool = True) -> None:
        super().__init__()
        self.name = name
        self.normalise = normalise
        self.weights = weights
        with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
            torch.manual_seed(0)
            self.body = _build(name, spec, weights)
        self.channels: tuple[int, ...] = tuple(self.body.feature_info.channels())[-LEVELS:]
        self.strides: tuple[int, ...] = tuple(self.body.feature_info.reduction())[-LEVELS:]
        self.weights_hash = state_digest(self.body.state_dict())
        config = self.body.pretrained_cfg
        self.register_buffer("mean", torch.tensor(spec.mean or config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std or config["std"]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 10-25 % faster on CPUs, much faster on GPUs in bf16
        super().train(False)
        probe = self(torch.linspace(0, 1, 3 * (4 * self.strides[-1]) ** 2).view(1, 3, 4 * self.strides[-1], -1))
        self.signed = any(bool((level < 0).any()) for level in probe)

    def facts(self) -> dict[str, object]:
        """What a bundle stores to build the same teacher again; a user's file name stays out of it."""
        weights = self.weights if self.weights in ("auto", "random") else "file"
        return {"name": self.name, "weights": weights, "normalise": self.normalise, "hash": self.weights_hash}

    def train(self, mode: bool = True) -> TimmTeacher:
        """Stay in eval mode: a teacher's BatchNorm statistics must never move."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature pyramid.

        Args:
            images: (B, 3, H, W), float, in [0, 1]; H and W multiples of the last stride.

        Returns:
            One (B, C_l, H / stride_l, W / stride_l) tensor per level, shallow to deep.

        Raises:
            ShapeError: H or W is not a multiple of the last stride.
        """
        height, width = images.shape[-2:]
        if height % self.strides[-1] or width % self.strides[-1]:
            raise ShapeError(
                f"{self.name}: got images of {height}x{width}, expected multiples of {self.strides[-1]}. "
                "Change the input size."
            )
        if self.normalise:
            images = (images - self.mean) / self.std
        return tuple(self.body(images.contiguous(memory_format=torch.channels_last))[-LEVELS:])


def _build(name: str, spec: TimmSpec, weights: str) -> nn.Module:
    import timm

    try:
        body: nn.Module = timm.create_model(spec.model, features_only=True, pretrained=False)
    except RuntimeError as err:
        raise WeightsError(f"{name}: timm cannot build {spec.model!r} ({err}). See timm.list_models().") from err
    if weights == "random":
        return body
    explicit = None if weights == "auto" else Path(weights)
    if spec.source is None and explicit is None:
        try:
            return timm.create_model(spec.model, features_only=True, pretrained=True)
        except Exception as err:
            reason = (str(err).splitlines() or [type(err).__name__])[0][:120]
            raise WeightsError(
                f"{name}: timm could not fetch pretrained weights ({reason}). Pass --teacher.weights FILE, or use "
                "--teacher.name efficientnet_lite0, whose weights come as a pip package."
            ) from err
    file = find_weights(name, spec.source or WeightsSource("", ""), explicit=explicit)
    state = tensors_of(read_state(file), where=str(file))
    if spec.by_order and not set(body.state_dict()) <= set(state):
        state = _rename_by_order(state, timm.create_model(spec.model).state_dict(), where=str(file))
    wanted = body.state_dict()
    head = {key for key in state if key not in wanted and key.split(".")[0] in _HEAD}
    load_strict(body, {key: value for key, value in state.items() if key not in head}, where=str(file))
    return body


#: Top-level modules that stand behind the last level and are dropped with `features_only`.
_HEAD = frozenset({"fc", "classifier", "head", "conv_head", "bn2", "norm"})


def _rename_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Give the n-th tensor of a file the n-th name of the model, refusing any difference in number or shape."""
    if [tuple(t.shape) for t in state.values()] != [tuple(t.shape) for t in own.values()]:
        raise WeightsError(f"{where}: {len(state)} tensors do not match the model's {len(own)} in order and shape.")
    return dict(zip(own, state.values(), strict=True))
