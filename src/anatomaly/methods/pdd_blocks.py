"""The trained blocks of PDD that are not students: adapters between two teachers, and the manifold prior."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Adapter(nn.Module):
    """Residual block that gives a level of the global teacher the channels of the local one (PDD: InA and MMU).

    1x1 -> BN -> GELU -> 3x3, dilation 2 -> BN -> GELU -> 1x1 -> BN, plus shortcut, -> GELU.  No biases; size is kept.

    Args:
        in_channels: Channels of the global teacher's level.
        out_channels: Channels of the local teacher's level.  The inner width is a quarter of the larger number.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = max(in_channels, out_channels) // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=2, dilation=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        shortcut = self.shortcut(x)
        x = F.gelu(self.bn1(self.conv1(x)))
        x = F.gelu(self.bn2(self.conv2(x)))
        return F.gelu(self.bn3(self.conv3(x)) + shortcut)


class ManifoldPrior(nn.Module):
    """Manifold prior affine (MPA): what the second student is told between its stages.

    Args:
        channels: Channels of the local teacher's four levels; the priors have those of levels 3 and 2.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        _, middle, deep, bottleneck = channels
        self.shared = nn.Sequential(nn.Conv2d(bottleneck, deep, 1, bias=False), nn.BatchNorm2d(deep), nn.GELU())
        self.heads = nn.ModuleList([nn.Conv2d(deep, deep, 1, bias=False), nn.Conv2d(deep, middle, 1, bias=False)])

    def forward(self, bottleneck: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Make both priors.

        Args:
            bottleneck: (B, C_4, h, w), the students' input.
            sizes: (height, width) of levels 3 and 2.

        Returns:
            (B, C_3, *sizes[0]) and (B, C_2, *sizes[1]), added to the inputs of stages 2 and 3.
        """
        shared = self.shared(bottleneck)
        return [resize(head(shared), size, corners=False) for head, size in zip(self.heads, sizes, strict=True)]


def resize(x: Tensor, size: Sequence[int], *, corners: bool) -> Tensor:
    """Bilinear to (height, width); `corners` aligns the corner cells' centres (adapters yes, priors no)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=corners)
