"""Frozen features, computed once per image: with them an epoch costs the student only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from anatomaly.types import Features, Method


class FeatureCache:
    """Features of N images in memory; call it with indices to get those of a batch.

    Args:
        method: Its `extract` is called once per batch of images.
        batches: Image batches (b, 3, H, W), in index order.

    Attributes:
        levels: By teacher, (N, C, h, w) tensors from shallow to deep.
    """

    def __init__(self, method: Method, batches: Iterable[Tensor]) -> None:
        parts = [method.extract(images) for images in batches]
        self.levels: dict[str, list[Tensor]] = {
            name: [torch.cat([part[name][level].cpu() for part in parts]) for level in range(len(first))]
            for name, first in parts[0].items()
        }

    def __call__(self, index: Tensor) -> Features:
        """Features of the images with these indices; the index's shape comes first in every tensor."""
        return {name: [level[index] for level in levels] for name, levels in self.levels.items()}


def bytes_per_image(features: Features) -> int:
    """Memory one image's features take, in bytes, measured on a batch."""
    return sum(level[0].numel() * level.element_size() for levels in features.values() for level in levels)
