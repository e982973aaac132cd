"""D24FAD: dual distillation for few-shot anomaly detection (ICLR 2026, arXiv 2603.01713).

A student decoder learns to rebuild a frozen teacher's features of normal images (teacher-student distillation, TSD) and
to agree with itself on K normal support images of the same task (student self-distillation, SSD), each support weighted
by how well it fits the query (learn-to-weight, L2W).  At test time the task is unseen: where the student's features of
the query differ from the weighted support, the query is not normal.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from anatomaly.errors import ShapeError
from anatomaly.methods.decoder import Decoder
from anatomaly.methods.settings import D24FADSettings
from anatomaly.types import Comparison

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Features

Distance = Literal["flattened", "positionwise"]
SoftmaxScale = Literal["channels", "elements"]
_DEFAULT = D24FADSettings()


class LearnToWeight(nn.Module):
    """Per level, share K support feature maps out by their similarity to the query (D24FAD sec. 3.3).

    weights = softmax over K of <vec(z_q), vec(phi(z_s))> / sqrt(scale);  reference = sum over K of weights * z_s.

    Args:
        channels: Channels of the levels.
        scale: "channels" divides by sqrt(C) (release; the softmax is nearly one-hot), "elements" by sqrt(C * h * w).

    Note: phi's bias adds the same number to all K logits and cancels in the softmax; it is kept for its checkpoints.
    """

    def __init__(self, channels: Sequence[int], *, scale: SoftmaxScale = "channels") -> None:
        super().__init__()
        self.scale = scale
        self.projections = nn.ModuleList(nn.Conv2d(c, c, 1) for c in channels)

    def project(self, level: int, support: Tensor) -> Tensor:
        """Phi of one level: (N, C, h, w) -> (N, C, h, w)."""
        projected: Tensor = self.projections[level](support)
        return projected

    def logits(self, query: Tensor, projected: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Similarity of each query to each support; softmax over K gives the weights.

        Args:
            query: (B, C, h, w).
            projected: phi(support): (K, C, h, w) shared by all queries, or (B, K, C, h, w).
            dtype: To add up in.  The sums reach 10^5, where float32 errs by up to 0.4 in an order that depends on B;
                the softmax makes that a quarter as much in a weight.  What scores come from is added up in float64.

        Returns:
            (B, K), of `dtype`.
        """
        flat = query.flatten(1).to(dtype)  # (B, C*h*w)
        keys = projected.flatten(-3).to(dtype)  # (K, C*h*w) or (B, K, C*h*w)
        logits = flat @ keys.T if keys.ndim == 2 else torch.einsum("bm,bkm->bk", flat, keys)
        size = query.shape[1] if self.scale == "channels" else flat.shape[1]
        scaled: Tensor = logits / size**0.5
        return scaled


class D24FAD(nn.Module):
    """Teacher, student and learn-to-weight of D24FAD; see `types.Method` for how the steps are used.

    Args:
        teacher: Frozen backbone with four levels; the last one feeds the student.
        settings: Losses and ablations.  Flattened distance: the cosine of a whole level; positionwise: per position,
            averaged.  Without self-distillation queries are compared with the teacher, and supports count for nothing.

    Note: differs from the release in that the teacher is frozen (there all its tensors collect unused gradients).
    """

    needs_support = True

    def __init__(self, teacher: Teacher, *, settings: D24FADSettings = _DEFAULT) -> None:
        super().__init__()
        self.settings = settings
        # In a dict a teacher is no submodule: state_dict(), parameters() and train() concern the trainable part only.
        self.teachers = {"teacher": teacher}
        self.student = Decoder(teacher.channels, teacher.strides, signed=teacher.signed)
        self.l2w = LearnToWeight(teacher.channels[:-1], scale=settings.softmax_scale)

    def extract(self, images: Tensor) -> Features:
        """Teacher pyramid of (B, 3, H, W) images in [0, 1]: {"teacher": four levels, shallow to deep}."""
        return {"teacher": self.teachers["teacher"](images)}

    extract_support = extract

    def encode(self, features: Features) -> list[Tensor]:
        """Student features, three levels shallow to deep, from the teacher's deepest level.

        Without self-distillation the teacher's own three levels follow.
        """
        encoded: list[Tensor] = self.student(features["teacher"][-1])
        return encoded if self.settings.self_distillation else [*encoded, *features["teacher"][:-1]]

    def embed_support(self, features: Features) -> dict[str, Tensor]:
        """Student features of K supports and their projections: "value_l" and "key_l", each (K, C, h, w)."""
        embedded: dict[str, Tensor] = {}
        for level, value in enumerate(self.encode(features)[: len(self.l2w.projections)]):
            embedded[f"value_{level}"] = value
            embedded[f"key_{level}"] = self.l2w.project(level, value)
        return embedded

    def compare(self, encoded: Sequence[Tensor], support: Mapping[str, Tensor]) -> list[Comparison]:
        """Compare queries with the weighted support (Eq. of SSD), level by level.

        Args:
            encoded: Student features of the queries, three (B, C, h, w).
            support: What `embed_support` returned.

        Returns:
            Three comparisons with their (B, K) support weights; without self-distillation with none.

        Raises:
            ShapeError: Query and support have other feature sizes.
        """
        if not self.settings.self_distillation:
            return [Comparison(student, teacher) for student, teacher in zip(encoded[:3], encoded[3:], strict=True)]
        comparisons = []
        for level, query in enumerate(encoded):
            value, key = support[f"value_{level}"], support[f"key_{level}"]
            if query.shape[1:] != value.shape[1:]:
                raise ShapeError(
                    f"D24FAD.compare: level {level + 1} of the query is {tuple(query.shape)}, the support bank holds "
                    f"{tuple(value.shape)}; C, h and w must match. Make the bank anew with this model and input size."
                )
            weights = self._share(query, key, dtype=torch.float64).float()
            reference = torch.einsum("bk,kchw->bchw", weights.to(value.dtype), value)
            comparisons.append(Comparison(query, reference, weights))
        return comparisons

    def training_loss(self, query: Features, support: Features) -> dict[str, Tensor]:
        """SSD + lambda * TSD of B episodes (D24FAD sec. 3.2).

        Args:
            query: Teacher features of the queries, four levels (B, C, h, w).
            support: Teacher features of their supports, at least the last level, (B, K, C, h, w).

        Returns:
            Scalars "total", "ssd" and "tsd" ("total" is "tsd" without self-distillation).  Gradients flow through both
            student branches and phi; with `detach_supports` through the query's branch and phi.

        Note: as in the release, BatchNorm sees the query batch and each of the K support batches separately.
        """
        encoded = self.encode(query)[: len(self.l2w.projections)]
        if not self.settings.self_distillation:
            pairs = zip(encoded, query["teacher"], strict=False)
            tsd = torch.stack([distance(student, teacher, self.settings.distance) for student, teacher in pairs]).sum()
            return {"total": tsd, "tsd": tsd}
        bottlenecks = support["teacher"][-1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.detach_supports):
            shots = [self.student(bottlenecks[:, k]) for k in range(bottlenecks.shape[1])]
        ssd = encoded[0].new_zeros((), dtype=torch.float32)
        tsd = torch.zeros_like(ssd)
        for level, student in enumerate(encoded):
            values = torch.stack([shot[level] for shot in shots], dim=1)  # (B, K, C, h, w)
            keys = self.l2w.project(level, values.flatten(0, 1)).reshape(values.shape)
            weights = self._share(student, keys, dtype=torch.float32)
            reference = torch.einsum("bk,bkchw->bchw", weights.to(values.dtype), values)
            ssd = ssd + distance(student, reference, self.settings.distance)
            tsd = tsd + distance(student, query["teacher"][level], self.settings.distance)
        return {"total": ssd + self.settings.tsd_weight * tsd, "ssd": ssd, "tsd": tsd}

    def _share(self, query: Tensor, keys: Tensor, *, dtype: torch.dtype) -> Tensor:
        """(B, K) weights of the supports, rows sum to 1."""
        logits = self.l2w.logits(query, keys, dtype=dtype)
        return torch.softmax(logits if self.settings.learn_to_weight else torch.zeros_like(logits), dim=1)


def distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Mean of 1 - cosine similarity of two feature maps, in [0, 2].

    Args:
        a: (B, C, h, w).
        b: Same shape.
        kind: "flattened" takes one cosine over all C*h*w entries of an image, "positionwise" one over C per position.

    Example:
        >>> f = torch.ones(2, 8, 4, 4)
        >>> distance(f, -f, "flattened"), distance(f, f, "positionwise").round(decimals=6)
        (tensor(2.), tensor(0.))
    """
    if kind == "flattened":
        a, b = a.flatten(1), b.flatten(1)
    return (1.0 - F.cosine_similarity(a.float(), b.float(), dim=1)).mean()


def import_d24fad(content: Mapping[str, object], method: D24FAD, *, where: str) -> None:
    """Load an official checkpoint, ``{"decoder": ..., "weight": ...}``, into a method.

    Args:
        content: What `weights.read_state` returned.
        method: A D24FAD on a WideResNet-50-2 teacher.
        where: File name for messages.

    Raises:
        WeightsError: A part is missing or does not fit.
    """
    from anatomaly.backbones.weights import load_strict, tensors_of

    load_strict(method.student, tensors_of(content, where=where, key="decoder"), where=f"{where} (decoder)")
    projections = tensors_of(content, where=where, key="weight")
    renamed = {
        re.sub(r"^proj_in([123])", lambda found: f"projections.{int(found[1]) - 1}", key): tensor
        for key, tensor in projections.items()
    }
    load_strict(method.l2w, renamed, where=f"{where} (weight)")
