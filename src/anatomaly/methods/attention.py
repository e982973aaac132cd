"""Patch attention: a student that may see a query only through the supports' patches (docs/patch-attention.md).

The frozen teacher describes the query and the K supports.  The student re-reads both with one learned linear map per
level and rebuilds every query patch as an attention over all patches of all supports, seen four ways; what they
cannot rebuild is anomalous.  Linear maps, temperatures, the pull of the position and what each level counts are
learned on normal images of other tasks with lesions pasted into them: the weights know what a lesion does and nothing
of the task at hand.  Every place is judged against its surroundings, and the teacher's own nearest patches count
beside the student's.
"""

from __future__ import annotations

from itertools import cycle
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from anatomaly.errors import ShapeError
from anatomaly.methods.nearest import most_similar
from anatomaly.methods.settings import AttentionSettings
from anatomaly.scoring import surroundings
from anatomaly.types import Comparison

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Features

#: Scalars are kept at a tenth of their size, so that Adam's one learning rate moves them ten times as fast as the maps.
_SCALAR = 10.0
_TEMPERATURE, _LOCALITY, _SURROUND, _DEEP_SURROUND, _GAIN, _BIAS = 0.03, -3.0, 0.8, 0.05, 2.5, -3.0
#: Supports that get a column each in the attention, and weights worked out at a time where there are more.
_FEW, _WEIGHTS = 16, 2**20
#: In the loss: weight of a lesion's cells, and share of the cells that make an image's score.
_LESION_WEIGHT, _TOP = 4.0, 0.05


def _zoomed(images: Tensor, factor: float) -> Tensor:
    """Images (B, 3, H, W) enlarged about their centre, the border repeated where nothing is known."""
    matrix = images.new_tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]) / factor
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


#: What else a support shows: exchanged left for right, a tenth larger, a tenth smaller.
_VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda images: images.flip(-1),
    "larger": lambda images: _zoomed(images, 1.1),
    "smaller": lambda images: _zoomed(images, 1 / 1.1),
}

_DEFAULT = AttentionSettings()


class PatchAttention(nn.Module):
    """Attention over support patches; follows `types.Method`.

    Args:
        teacher: Frozen backbone with four levels.  The first is averaged to the grid of the second.
        settings: Which views, surroundings and levels count.  The deepest level counts more than it learned to: disease
            is often larger than a pasted lesion.
    """

    needs_support = True

    def __init__(self, teacher: Teacher, *, settings: AttentionSettings = _DEFAULT) -> None:
        super().__init__()
        self.settings = settings
        self.teachers = {"teacher": teacher}
        self._views = (*["mirrored"] * settings.mirrored, *["larger", "smaller"] * settings.resized)
        levels = len(teacher.channels)
        self.readings = nn.ParameterList([nn.Parameter(torch.eye(channels)) for channels in teacher.channels])
        self.temperature = _scalars(np.log(_TEMPERATURE), levels)
        self.locality = _scalars(_LOCALITY, levels)
        self.scale = _scalars(0.0, levels)
        surround = torch.tensor([_SURROUND] * (levels - 1) + [_DEEP_SURROUND])
        self.surround = nn.Parameter(torch.logit(surround) / _SCALAR)
        self.gain = _scalars(_GAIN, 1)
        self.bias = _scalars(_BIAS, 1)
        self._counts: dict[int, tuple[float, float]] = {}

    def extract(self, images: Tensor) -> Features:
        """Teacher pyramid of (B, 3, H, W) images in [0, 1]."""
        return {"teacher": self.teachers["teacher"](images)}

    def extract_support(self, images: Tensor) -> Features:
        """Teacher pyramids of (K, 3, H, W) supports, as they are and as `_VIEWS` shows them."""
        teacher = self.teachers["teacher"]
        return {"teacher": teacher(images), **{view: teacher(_VIEWS[view](images)) for view in self._views}}

    def encode(self, features: Features) -> list[Tensor]:
        """Unit-length patches: the student's reading of all levels, then the teacher's own of the shallow ones."""
        first, *deeper = (level.float() for level in features["teacher"])
        h, w = deeper[0].shape[-2:]
        levels = [F.adaptive_avg_pool2d(first, (h, w)), *deeper]
        pairs = zip(self.readings, levels, strict=True)
        read = [torch.einsum("dc,bchw->bdhw", reading, level) for reading, level in pairs]
        return [F.normalize(level, dim=1) for level in (*read, *levels[: self.settings.teacher_levels])]

    def embed_support(self, features: Features) -> dict[str, Tensor]:
        """What `encode` says of K supports, as "patches_i", each (K, views, h, w, C).

        The views are the image and those of `_VIEWS` that `features` has.
        """
        views = [self.encode({"teacher": features[view]}) for view in ("teacher", *_VIEWS) if view in features]
        return {
            f"patches_{i}": torch.stack(levels, dim=1).permute(0, 1, 3, 4, 2).contiguous()
            for i, levels in enumerate(zip(*views, strict=True))
        }

    def compare(self, encoded: Sequence[Tensor], support: Mapping[str, Tensor]) -> list[Comparison]:
        """Pair every query patch with what the supports make of it.

        Args:
            encoded: What `encode` returned, each (B, C, h, w).
            support: What `embed_support` returned.

        Returns:
            One comparison per tensor of `encoded`; the (B, K) weights are the supports' shares of the rebuilt patches.

        Raises:
            ShapeError: Query and support have other feature sizes.
        """
        comparisons = []
        for i, level in enumerate(encoded):
            bank = support[f"patches_{i}"]
            if level.shape[1:] != bank.movedim(-1, 2).shape[2:]:
                raise ShapeError(
                    f"PatchAttention.compare: level {i + 1} of the query is {tuple(level.shape)}, the support bank "
                    f"holds {tuple(bank.shape)}; C, h and w must match. Make the bank anew with this model and size."
                )
            target, weights = self._rebuild(i, level.float(), bank.float())
            if not torch.compiler.is_compiling():  # a graph has no numbers: it takes those of the comparison before
                self._counts[i] = (self._scale(i), float(self._surround()[i % len(self.readings)]))
            scale, surround = self._counts[i]
            comparisons.append(Comparison(level, target, weights, scale, surround))
        return comparisons

    def training_loss(self, query: Features, support: Features) -> dict[str, Tensor]:
        """Find the pasted lesions in B images of one task.

        Args:
            query: "teacher" and "pasted", the teacher's levels (B, C, h, w) of the images without and with a lesion,
                and "mask", one (B, H, W) tensor, non-zero on the lesions.
            support: "teacher", the levels (B, K, C, h, w) of K other images for each of them.

        Returns:
            Scalars "total", "cells" (cross-entropy per cell of the map: lesion or not) and "images" (every image with a
            lesion is to score higher than every one without).
        """
        both = [torch.cat(pair) for pair in zip(query["pasted"], query["teacher"], strict=True)]
        with torch.autocast(both[0].device.type, enabled=False):  # logits of some tens need all their digits
            maps = self._student_maps(both, support["teacher"])
        h, w = maps.shape[1:]
        mask = F.adaptive_avg_pool2d(query["mask"][0][:, None].float(), (h, w))[:, 0]
        truth = torch.cat([mask, torch.zeros_like(mask)])
        gain, weight = torch.exp(_SCALAR * self.gain), maps.new_tensor(_LESION_WEIGHT)
        cells = F.binary_cross_entropy_with_logits(gain * maps + _SCALAR * self.bias, truth, pos_weight=weight)
        count = max(1, round(_TOP * maps[0].numel()))
        top = maps.flatten(1).topk(count, dim=1).values.mean(dim=1)
        high, low = top.chunk(2)
        images = F.softplus(-gain * (high[:, None] - low[None, :])).mean()
        return {"total": cells + images, "cells": cells, "images": images}

    def _student_maps(self, query: Sequence[Tensor], support: Sequence[Tensor]) -> Tensor:
        """The student's part of the map, on the grid of the second level: (n * B, h, w) of n B queries and B supports.

        The teacher's own distances are left out: beside them the student would only learn what they lack.
        """
        encoded, surround = self.encode({"teacher": query}), self._surround()
        banks = [self.embed_support({"teacher": [level[b] for level in support]}) for b in range(len(support[0]))]
        total = torch.zeros_like(encoded[1][:, 0])
        for i, level in enumerate(encoded[: len(self.readings)]):
            pairs = zip(level, cycle(banks))
            distance = torch.stack([self._distance(i, one, bank[f"patches_{i}"]) for one, bank in pairs])
            distance = torch.exp(_SCALAR * self.scale[i]) * (distance - surround[i] * surroundings(distance))
            size = tuple(total.shape[1:])
            total = total + F.interpolate(distance[:, None], size, mode="bilinear", align_corners=True)[:, 0]
        return total

    def _distance(self, i: int, query: Tensor, bank: Tensor) -> Tensor:
        """1 - cosine between a query (C, h, w) and what the bank (K, views, h, w, C) makes of it: (h, w)."""
        target, _ = self._rebuild(i, query[None], bank)
        return 1.0 - F.cosine_similarity(query, target[0], dim=0)

    def _scale(self, i: int) -> float:
        """What the i-th of `encode`'s tensors counts in the map."""
        if i >= len(self.readings):
            return 1.0
        return (self.settings.deepest if i == len(self.readings) - 1 else 1.0) * float(
            torch.exp(_SCALAR * self.scale[i])
        )

    def _surround(self) -> Tensor:
        """What the surroundings of each level count, from 0 to 1."""
        return float(self.settings.surroundings) * torch.sigmoid(_SCALAR * self.surround)

    def _rebuild(self, i: int, queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Rebuild patches from those of the supports: by attention (student) or as the most similar one (teacher).

        The attention's logits are (similarity - pull * squared distance of the places) / temperature.  The distance is
        multiplied out, |p|^2 - 2pq + |q|^2, and its first term, the same for a whole row, left out: one product of
        matrices does it all.

        Args:
            i: Which of `encode`'s tensors the patches are of.
            queries: (B, C, h, w), unit length.
            bank: (K, views, h, w, C), unit length.

        Returns:
            (B, C, h, w) and the supports' shares of the patches, (B, K), each row of sum 1.
        """
        b, c, h, w = queries.shape
        rows, patches = queries.permute(0, 2, 3, 1).reshape(-1, c), bank.flatten(0, 3)
        if i >= len(self.readings):
            nearest = most_similar(rows, patches)
            target, share = patches[nearest], _owners(bank)[nearest]
        else:
            pull, here = F.softplus(_SCALAR * self.locality[i]), _places(queries)
            place = torch.cat([2.0 * pull * here, -pull.expand(h * w, 1)], dim=1)
            there = torch.cat([here, here.square().sum(dim=1, keepdim=True)], dim=1)
            seek = torch.cat([rows, place.repeat(b, 1)], dim=1) / torch.exp(_SCALAR * self.temperature[i])
            key = torch.cat([patches, there.repeat(len(patches) // (h * w), 1)], dim=1)
            target, share = _attend(seek, key, bank)
        return target.reshape(b, h, w, c).permute(0, 3, 1, 2), share.reshape(b, h * w, -1).mean(dim=1)


def _attend(query: Tensor, key: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of (n, A) to (m, A) over the m patches of a bank (K, views, h, w, C): (n, C), (n, K).

    Few supports: a column per support beside the patches sums the attention it gets, and the (n, m) weights are never
    held in memory.  Many: so many columns would cost more than the weights of some rows at a time.
    """
    patches, shots = bank.flatten(0, 3), len(bank)
    if shots <= _FEW:
        value = torch.cat([patches, _owners(bank)], dim=1)
        width = 8 * ceil(max(key.shape[1], value.shape[1]) / 8)  # the fast kernels want one width, and such a one
        q, k, v = (F.pad(tensor, (0, width - tensor.shape[1]))[None, None] for tensor in (query, key, value))
        found = F.scaled_dot_product_attention(q, k, v, scale=1.0)[0, 0]
        return found[:, : patches.shape[1]], found[:, patches.shape[1] : value.shape[1]]
    weights = (torch.softmax(rows @ key.T, dim=1) for rows in torch.split(query, max(1, _WEIGHTS // len(key))))
    parts = [(weight @ patches, weight.reshape(len(weight), shots, -1).sum(dim=2)) for weight in weights]
    targets, shares = zip(*parts, strict=True)
    return torch.cat(targets), torch.cat(shares)


def _owners(bank: Tensor) -> Tensor:
    """Which support of a bank (K, views, h, w, C) a patch is of: (K * views * h * w, K) of ones and zeros."""
    return torch.eye(len(bank), device=bank.device).repeat_interleave(bank[0, ..., 0].numel(), dim=0)


def _places(level: Tensor) -> Tensor:
    """Centres of the cells of (..., h, w), row by row: (h * w, 2)."""
    h, w = level.shape[-2:]
    y, x = (torch.arange(h, device=level.device) + 0.5) / h, (torch.arange(w, device=level.device) + 0.5) / w
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)


def _scalars(value: float, count: int) -> nn.Parameter:
    return nn.Parameter(torch.full((count,), float(value) / _SCALAR))
