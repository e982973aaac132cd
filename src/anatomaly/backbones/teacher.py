"""A frozen teacher: any feature pyramid behind one declared interface."""

from __future__ import annotations

import hashlib
import math
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
        hash: Digest of its weights, and of `blocks` where there are any.
        blocks: Which of its blocks are its levels, where it has one stride.
    """

    name: str
    weights: str
    normalise: bool
    hash: str
    blocks: tuple[int, ...] | None = None


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
        blocks: Which blocks of a model of one stride the levels are; None where there is a pyramid.
        only_size: (H, W) of images where it takes no others, else None.
        weights_hash: Digest of names and values of all weights, and of `blocks` where there are any; identifies the
            teacher in bundles, banks and feature caches.

    Args:
        name: Name in `BACKBONES`, for messages and bundles.
        body: The network, with its weights.
        channels: Of the network's levels; the last four are used.
        strides: Likewise.
        mean: Per-channel mean subtracted from [0, 1] input.
        std: Per-channel divisor.
        weights: What the user asked for: "auto", "random" or a file.
        normalise: Scale [0, 1] input by mean and std; False feeds it as it is (D24FAD's release).
        blocks: Which blocks the levels are, where the network has one stride.
        size: (H, W) of images that the network is known to take; tried where it does not take small ones.

    Raises:
        ConfigError: The network takes no such images, or its levels are not (B, C, h, w).
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
        blocks: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.normalise = normalise
        self.weights = weights
        self.body = body
        self.channels: tuple[int, ...] = tuple(channels)[-LEVELS:]
        self.strides: tuple[int, ...] = tuple(strides)[-LEVELS:]
        self.blocks = None if blocks is None else tuple(blocks)
        self.only_size: tuple[int, int] | None = None
        self.weights_hash = state_digest(body.state_dict())
        if self.blocks is not None:  # other blocks of the same weights are another teacher
            self.weights_hash = hashlib.sha256(f"{self.weights_hash}{self.blocks}".encode()).hexdigest()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 10-25 % faster on CPUs, much faster on GPUs in bf16
        super().train(False)
        probe = self._probe(size)
        if tuple((level.ndim, level.shape[1]) for level in probe) != tuple((4, count) for count in self.channels):
            shapes = ", ".join(str(tuple(level.shape)) for level in probe)
            raise ConfigError(
                f"{name}: its levels are {shapes}, expected (B, C, h, w) with {self.channels} channels. "
                "Choose another model."
            )
        if not all(bool(torch.isfinite(level).all()) for level in probe):
            raise WeightsError(f"{name}: its levels are not finite numbers; its weights are damaged. Take other ones.")
        self.signed = any(bool((level < 0).any()) for level in probe)

    def _probe(self, known: tuple[int, int] | None) -> tuple[Tensor, ...]:
        """Levels of one small image, or of the known size where the network takes that alone."""
        small = small_size([self])
        levels: tuple[Tensor, ...]
        try:
            levels = self(_slope(small))
            return levels
        except Exception as err:  # each network has its own way to say that it takes images of one size only
            reason = " ".join(str(err).split())[:120]
            if known is None or known == small or any(side % self.strides[-1] for side in known):
                raise ConfigError(
                    f"{self.name}: takes no images of {small[0]}x{small[1]} ({reason}). Choose another model."
                ) from err
        try:
            levels = self(_slope(known))
        except Exception as err:
            raise ConfigError(
                f"{self.name}: takes no images of {small[0]}x{small[1]} ({reason}) nor of {known[0]}x{known[1]}. "
                "Choose another model."
            ) from err
        self.only_size = known
        return levels

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
            size=size,
        )

    def facts(self) -> TeacherFacts:
        """What a bundle stores to build the same teacher again."""
        weights = self.weights if self.weights in ("auto", "random") else "file"
        return TeacherFacts(self.name, weights, self.normalise, self.weights_hash, self.blocks)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: a teacher's BatchNorm statistics must never move."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature pyramid.

        Args:
            images: (B, 3, H, W), float, in [0, 1]; of a size that `misfit` has nothing against.

        Returns:
            One (B, C_l, H / stride_l, W / stride_l) tensor per level, shallow to deep, in channels-last memory.

        Raises:
            ShapeError: The size does not fit.
        """
        height, width = images.shape[-2:]
        if expected := misfit([self], (height, width)):
            raise ShapeError(
                f"{self.name}: got images of {height}x{width}, expected {expected}. Change the input size."
            )
        if self.normalise:
            images = (images - self.mean) / self.std
        levels = self.body(images.contiguous(memory_format=torch.channels_last))[-LEVELS:]
        return tuple(level.contiguous(memory_format=torch.channels_last) for level in levels)


def misfit(teachers: Sequence[Teacher], size: tuple[int, int]) -> str:
    """What images should be like that all of these teachers take, or "" where they take this size.

    Args:
        teachers: At least one.
        size: (H, W).

    Example:
        >>> class Thinned(nn.Module):
        ...     def forward(self, images):
        ...         return [images[..., ::14, ::14]] * 4
        >>> teacher = Teacher.of_module("mine", Thinned(), size=(28, 28))
        >>> misfit([teacher], (224, 28)), misfit([teacher], (256, 28))
        ('', 'multiples of 14, such as 252x28 or 266x28')
    """
    for teacher in teachers:
        if teacher.only_size not in (None, size):
            return f"{teacher.only_size[0]}x{teacher.only_size[1]}, the only size {teacher.name} takes"
    step = math.lcm(*(teacher.strides[-1] for teacher in teachers))
    lower, upper = ([max(step, way(side / step) * step) for side in size] for way in (math.floor, math.ceil))
    if lower == upper == list(size):
        return ""
    near = dict.fromkeys(f"{height}x{width}" for height, width in (lower, upper))
    return f"multiples of {step}, such as {' or '.join(near)}"


#: Sides of the deepest level of a small image.
_CELLS = 4


def small_size(teachers: Sequence[Teacher]) -> tuple[int, int]:
    """(H, W) of a small image that all of these teachers take, to try them on."""
    for teacher in teachers:
        if teacher.only_size is not None:
            return teacher.only_size
    strides = [teacher.strides[-1] for teacher in teachers]
    step = math.lcm(*strides)
    side = step * math.ceil(_CELLS * max(strides) / step)
    return side, side


def _slope(size: tuple[int, int]) -> Tensor:
    """One image that brightens from its first to its last value, (1, 3, H, W) in [0, 1]."""
    return torch.linspace(0, 1, 3 * size[0] * size[1]).view(1, 3, *size)


def forbid_blocks(name: str, blocks: Sequence[int] | None) -> None:
    """Raise a `ConfigError` where blocks are chosen for a teacher that has a pyramid."""
    if blocks is not None:
        raise ConfigError(
            f"teacher.blocks: got {list(blocks)}, but {name} has a pyramid, whose levels are its own. Leave it out."
        )
