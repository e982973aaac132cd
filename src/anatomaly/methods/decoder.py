"""The students of both methods: a transposed residual network that mirrors the teacher's pyramid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class UpBlock(nn.Module):
    """Residual bottleneck block whose middle convolution may enlarge the map.

    1x1 -> BN -> ReLU -> 3x3 (or factor x factor transposed, stride = factor) -> BN -> ReLU -> 1x1 -> BN, plus shortcut,
    -> ReLU.  No biases.  The inner width is half the output's, as in WideResNet-50-2 (expansion 4, base width 128).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        factor: Enlargement of height and width; 1 keeps the size.

    Attributes:
        signed: The block does not end in a ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 1) -> None:
        super().__init__()
        self.signed = False
        width = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = (
            nn.ConvTranspose2d(width, width, factor, stride=factor, bias=False)
            if factor > 1
            else nn.Conv2d(width, width, 3, padding=1, bias=False)
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.upsample = None
        if factor > 1 or in_channels != out_channels:
            resize: nn.Module = (
                nn.ConvTranspose2d(in_channels, out_channels, factor, stride=factor, bias=False)
                if factor > 1
                else nn.Conv2d(in_channels, out_channels, 1, bias=False)
            )
            self.upsample = nn.Sequential(resize, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, factor * h, factor * w)."""
        shortcut = x if self.upsample is None else self.upsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return x if self.signed else self.relu(x)


class Decoder(nn.Module):
    """Three stages from a teacher's deepest level back to its first three (D24FAD sec. 3; PDD's students).

    Args:
        channels: Channels of the teacher's four levels, shallow to deep; the last one is the input.
        strides: Strides of the same levels; neighbouring ones must divide each other.
        blocks: Blocks per stage, deep to shallow; D24FAD [3, 4, 6], PDD [2, 2, 2].
        signed: The teacher's levels take negative values, so a stage must not end in a ReLU.  False for the ResNets of
            both papers; a student that cannot be negative cannot follow EfficientNet's or VMamba's features.

    Note: 3x3 and 1x1 convolutions start Kaiming-normal (fan out), transposed ones keep PyTorch's default.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        blocks: tuple[int, int, int] = (3, 4, 6),
        signed: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or len(strides) != 4:
            raise ValueError(f"Decoder: got {len(channels)} channels and {len(strides)} strides, expected 4 of each.")
        shallow, middle, deep, bottleneck = channels
        factors = [strides[i + 1] // strides[i] for i in range(3)]
        self.layer1 = _stage(bottleneck, deep, factors[2], blocks[0], signed)
        self.layer2 = _stage(deep, middle, factors[1], blocks[1], signed)
        self.layer3 = _stage(middle, shallow, factors[0], blocks[2], signed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # the teacher's layout

    def forward(self, bottleneck: Tensor) -> list[Tensor]:
        """Predict the teacher's first three levels.

        Args:
            bottleneck: (B, C_4, h, w), the teacher's deepest level.

        Returns:
            Three tensors with the shapes of the teacher's levels 1-3, shallow to deep.
        """
        deep = self.layer1(bottleneck)
        middle = self.layer2(deep)
        shallow = self.layer3(middle)
        return [shallow, middle, deep]


def _stage(in_channels: int, out_channels: int, factor: int, blocks: int, signed: bool) -> nn.Sequential:
    stage = [
        UpBlock(in_channels, out_channels, factor),
        *(UpBlock(out_channels, out_channels) for _ in range(blocks - 1)),
    ]
    stage[-1].signed = signed
    return nn.Sequential(*stage)
