"""Matching: a query beside its supports place by place, and as a whole (docs/matching.md).

Every place of the query is compared with the most similar place of the K supports, at the middle levels of the frozen
teacher.  The query as a whole, its mean features of the deepest level, is compared with the best mixture of the
supports as a whole: what is spread all over an image, or missing from it, is in no single place.  Nothing is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from anatomaly.errors import ShapeError
from anatomaly.methods.nearest import matched
from anatomaly.methods.settings import MatchingSettings
from anatomaly.types import Comparison

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Features

_DEFAULT = MatchingSettings()
#: Of the mixture's least squares, as a share of the supports' mean square: two equal supports share the weight.
_RIDGE = 0.01
#: Of `_solve`, for K of thousands.
_STEPS = 24


class Matching(nn.Module):
    """Nearest places, and whole images; follows `types.Method` and has no weights.

    Args:
        teacher: Frozen backbone with four levels.  The first is averaged to the grid of the second.
        global_teacher: Another one, whose levels count beside those of the first.
        settings: Which levels are compared, and what whole images count.
    """

    needs_support = True

    def __init__(
        self, teacher: Teacher, global_teacher: Teacher | None = None, *, settings: MatchingSettings = _DEFAULT
    ) -> None:
        super().__init__()
        self.settings = settings
        self.teachers = {"teacher": teacher}
        if global_teacher is not None:
            self.teachers["global_teacher"] = global_teacher

    def extract(self, images: Tensor) -> Features:
        """Teacher pyramids of (B, 3, H, W) images in [0, 1]."""
        return {role: teacher(images) for role, teacher in self.teachers.items()}

    extract_support = extract

    def encode(self, features: Features) -> list[Tensor]:
        """Unit-length features: (B, C, h, w) of places, then (B, C, 1, 1) of whole images."""
        places, wholes = [], []
        for role in self.teachers:
            levels = features[role]
            places += [_level(levels, number) for number in self.settings.places]
            wholes += [_level(levels, number).mean(dim=(2, 3), keepdim=True) for number in self.settings.wholes]
        return [F.normalize(level, dim=1) for level in (*places, *wholes)]

    def embed_support(self, features: Features) -> dict[str, Tensor]:
        """What `encode` says of K supports, as "level_i", each (K, h, w, C)."""
        return {f"level_{i}": level.permute(0, 2, 3, 1).contiguous() for i, level in enumerate(self.encode(features))}

    def compare(self, encoded: Sequence[Tensor], support: Mapping[str, Tensor]) -> list[Comparison]:
        """Pair every place of the queries with the most similar one, and every whole with the best mixture.

        Args:
            encoded: What `encode` returned, each (B, C, h, w).
            support: What `embed_support` returned.

        Returns:
            One comparison per tensor of `encoded`; where they compare places, the (B, K) weights are the share of the
            query's places whose most similar one is in support k.

        Raises:
            ShapeError: Query and support have other feature sizes.
        """
        comparisons = []
        for i, level in enumerate(encoded):
            bank = support[f"level_{i}"].float()
            if level.shape[1:] != bank.movedim(-1, 1).shape[1:]:
                raise ShapeError(
                    f"Matching.compare: level {i + 1} of the query is {tuple(level.shape)}, the support bank holds "
                    f"{tuple(bank.shape)}; C, h and w must match. Make the bank anew with this model and size."
                )
            if i < len(self.settings.places) * len(self.teachers):
                comparisons.append(Comparison(level, *matched(level.float(), bank)))
            else:
                comparisons.append(_mixed(level.float(), bank)._replace(scale=self.settings.whole_weight))
        return comparisons

    def training_loss(self, query: Features, support: Features) -> dict[str, Tensor]:
        """There is nothing to train.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Matching has no trainable part; use it without fit.")


def _level(levels: Sequence[Tensor], number: int) -> Tensor:
    """A level by its number from 1; the first is averaged to the grid of the second."""
    level = levels[number - 1].float()
    if number > 1:
        return level
    h, w = levels[1].shape[-2:]
    return F.adaptive_avg_pool2d(level, (h, w))


def _mixed(queries: Tensor, bank: Tensor) -> Comparison:
    """Whole images (B, C, 1, 1) beside the mixture of a bank's (K, 1, 1, C) that is nearest in least squares."""
    wholes, rows = bank.flatten(1).double(), queries.flatten(1).double()
    alike = wholes @ wholes.T
    ridge = _RIDGE * alike.diagonal().mean() * torch.eye(len(wholes), dtype=alike.dtype, device=alike.device)
    solve = _solve if torch.compiler.is_compiling() else torch.linalg.solve
    shares = solve(alike + ridge, wholes @ rows.T).T
    return Comparison(queries, (shares @ wholes).to(queries).reshape(queries.shape))


def _solve(matrix: Tensor, rows: Tensor) -> Tensor:
    """`torch.linalg.solve` of a positive definite (K, K) with a ridge, in operators that ONNX has: Newton and Schulz.

    A step squares what is left of the error, at first at most 1 - ridge / (K + ridge): `_STEPS` do for K of thousands.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = identity / matrix.diagonal().sum()
    for _ in range(_STEPS):
        inverse = inverse @ (2 * identity - matrix @ inverse)
    return inverse @ rows
