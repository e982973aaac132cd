"""A frozen teacher: any feature pyramid behind one declared interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anatomaly.backbones.weights import state_digest
from anatomaly.errors import ConfigError, ShapeError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class TeacherFacts:
    """What a bundle stores to build the same teacher again.

    Attributes:
        name: Name in `BACKBONES`, or ``timm/<model>``.
        weights: auto, random, or file: a user's own, whose name stays out of it.
        normalise: Its input is scaled by its own mean and std.
        hash: Digest of its weights.
    """

    name: str
    weights: str
    normalise: bool
    hash: str


#: Levels a method may use, shallow to deep; the last one feeds the student.
LEVELS = 4


class Teacher(nn.Module):
    """Frozen feature pyramid; always in eval mode, never updated.

    Attributes:
        name: Name in `BACKBONES`.
        body: The network; (B, 3, H, W) -> its levels, shallow to deep.
        channels: Channels of the levels, shallow to deep.
        strides: Input pixels per feature cell of the levels.
        signed: The levels take negative values (no ReLU at their end), found by running the model once.
        weights_hash: Digest of names and values of all weights; identifies the teacher in bundles and banks.

    Args:
        name: Name in `BACKBONES`, for messages and bundles.
        body: The network, with its weights.
        channels: Of the network's levels; the last four are used.
        strides: Likewise.
        mean: Per-channel mean subtracted from [0, 1] input.
        std: Per-channel divisor.
        weights: What the user asked for: "auto", "random" or a file.
        normalise: Scale [0, 1] input by mean and std; False feeds it as it is (D24FAD's release).

    Raises:
        ConfigError: The network takes images of one size only, or its levels are not (B, C, h, w).
        WeightsError: What it gives is not finite.
    """

    mean: Tensor
    std: Tensor
    body: Any  # its children differ from family to family

    def __init__(
        self,
        name: str,
        body: nn.Module,
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        weights: str,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.normalise = normalise
        self.weights = weights
        self.body = body
        self.channels: tuple[int, ...] = tuple(channels)[-LEVELS:]
        self.strides: tuple[int, ...] = tuple(strides)[-LEVELS:]
        self.weights_hash = state_digest(body.state_dict())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 10-25 % faster on CPUs, much faster on GPUs in bf16
        super().train(False)
        side = 4 * self.strides[-1]
        try:
            probe = self(torch.linspace(0, 1, 3 * side**2).view(1, 3, side, side))
        except AssertionError as err:  # timm's way to say that a model takes images of one size only
            raise ConfigError(
                f"{name}: takes no images of {side}x{side} ({err}). Choose a convolutional model."
            ) from err
        if tuple((level.ndim, level.shape[1]) for level in probe) != tuple((4, count) for count in self.channels):
            shapes = ", ".join(str(tuple(level.shape)) for level in probe)
            raise ConfigError(
                f"{name}: its levels are {shapes}, expected (B, C, h, w) with {self.channels} channels. "
                "Choose another model."
            )
        if not all(bool(torch.isfinite(level).all()) for level in probe):
            raise WeightsError(f"{name}: its levels are not finite numbers; its weights are damaged. Take other ones.")
        self.signed = any(bool((level < 0).any()) for level in probe)

    @classmethod
    def of_module(
        cls,
        name: str,
        body: nn.Module,
        *,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        size: tuple[int, int] = (256, 256),
        weights: str = "file",
        normalise: bool = True,
    ) -> Teacher:
        """Your own network as a teacher; channels and strides are found by running it once.

        Args:
            name: What bundles call it.
            body: (B, 3, H, W) -> at least four levels (B, C, h, w), shallow to deep.
            mean: Per-channel mean that it wants subtracted from input in [0, 1].
            std: Per-channel divisor.
            size: (H, W) of the image it is run on.
            weights: "file" stores its weights in every bundle.
            normalise: Scale the input by mean and std.

        Raises:
            ConfigError: It does not return such levels.

        Example:
            >>> levels = [nn.Conv2d(3, 8 * 2**i, 1, stride=2 ** (i + 1)) for i in range(4)]
            >>> class Pyramid(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.levels = nn.ModuleList(levels)
            ...     def forward(self, images):
            ...         return [level(images) for level in self.levels]
            >>> Teacher.of_module("mine", Pyramid()).strides
            (2, 4, 8, 16)
        """
        with torch.no_grad():
            levels = body.eval()(torch.zeros(1, 3, *size))
        shapes = [tuple(level.shape) for level in levels]
        if len(shapes) < LEVELS or any(len(shape) != 4 for shape in shapes):
            got = ", ".join(map(str, shapes)) or "nothing"
            raise ConfigError(f"{name}: returns {got}, expected at least {LEVELS} levels of shape (B, C, h, w).")
        return cls(
            name,
            body,
            channels=[shape[1] for shape in shapes],
            strides=[size[0] // shape[2] for shape in shapes],
            mean=mean,
            std=std,
            weights=weights,
            normalise=normalise,
        )

    def facts(self) -> TeacherFacts:
        """What a bundle stores to build the same teacher again."""
        weights = self.weights if self.weights in ("auto", "random") else "file"
        return TeacherFacts(self.name, weights, self.normalise, self.weights_hash)

    def train(self, mode: bool = True) -> Teacher:
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
