"""Patch nearest neighbours: the reference every few-shot method has to beat.

Each patch of the query is compared with its nearest patch, by cosine, among the frozen teacher's patches of the K
supports, at each of the first three levels.  Nothing is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from anatomaly.methods.settings import NearestSettings
from anatomaly.types import Comparison

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Features

_DEFAULT = NearestSettings()


class PatchNearestNeighbours(nn.Module):
    """Nearest support patch of the teacher's features; follows `types.Method` and has no weights of its own.

    Args:
        teacher: Frozen backbone.
        settings: There are none.
    """

    needs_support = True

    def __init__(self, teacher: Teacher, *, settings: NearestSettings = _DEFAULT) -> None:
        super().__init__()
        self.settings = settings
        self.teachers = {"teacher": teacher}

    def extract(self, images: Tensor) -> Features:
        """Teacher pyramid of (B, 3, H, W) images in [0, 1]."""
        return {"teacher": self.teachers["teacher"](images)}

    extract_support = extract

    def encode(self, features: Features) -> list[Tensor]:
        """The teacher's first three levels, unchanged."""
        return list(features["teacher"][:-1])

    def embed_support(self, features: Features) -> dict[str, Tensor]:
        """Unit-length patches of K supports: "patches_l", each (K, C, h, w)."""
        return {f"patches_{level}": F.normalize(f.float(), dim=1) for level, f in enumerate(self.encode(features))}

    def compare(self, encoded: Sequence[Tensor], support: Mapping[str, Tensor]) -> list[Comparison]:
        """Pair every query patch with the most similar of the K*h*w support patches of its level.

        The (B, K) weights are the share of the query's patches whose nearest neighbour is in support k.
        """
        comparisons = []
        for level, query in enumerate(encoded):
            bank = support[f"patches_{level}"].float().permute(0, 2, 3, 1)
            comparisons.append(Comparison(query, *matched(F.normalize(query.float(), dim=1), bank)))
        return comparisons

    def training_loss(self, query: Features, support: Features) -> dict[str, Tensor]:
        """There is nothing to train.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("PatchNearestNeighbours has no trainable part; use it without fit.")


#: Similarities worked out at a time: so few stay in a CPU's cache; on a GPU they take 1 GiB.
_BLOCK, _CUDA_BLOCK = 2**19, 2**28


def matched(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar patch of a bank for every patch of the queries.

    Args:
        queries: (B, C, h, w), unit length, float32.
        bank: (K, h, w, C), likewise.

    Returns:
        (B, C, h, w), and (B, K): the share of a query's patches whose most similar one is in support k.
    """
    shots, patches = len(bank), bank.flatten(0, 2)  # (K*h*w, C)
    if torch.compiler.is_compiling():  # a graph has no loop over images
        nearest = most_similar(queries.flatten(2).mT.flatten(0, 1), patches).reshape(queries.shape[0], -1)
        owners = F.one_hot(nearest // (len(patches) // shots), shots).float()
        return patches[nearest].mT.reshape(queries.shape), owners.mean(dim=1)
    targets, weights = [], []
    for one in queries:  # one image at a time bounds memory
        nearest = most_similar(one.flatten(1).T, patches)  # (h*w,)
        targets.append(patches[nearest].T.reshape(one.shape))
        weights.append(torch.bincount(nearest // (len(patches) // shots), minlength=shots) / len(nearest))
    return torch.stack(targets), torch.stack(weights)


def most_similar(queries: Tensor, patches: Tensor) -> Tensor:
    """Index of the patch with the largest dot product for each query: (Q, C) and (P, C) -> (Q,)."""
    if torch.compiler.is_compiling():  # a graph knows neither blocks nor numpy
        return (queries @ patches.T).argmax(dim=1)
    blocks = torch.split(queries, max(1, (_CUDA_BLOCK if queries.is_cuda else _BLOCK) // len(patches)))
    if queries.is_cuda:
        return torch.cat([(block @ patches.T).argmax(dim=1) for block in blocks])
    return torch.from_numpy(np.concatenate([(block @ patches.T).numpy().argmax(axis=1) for block in blocks]))
