"""PDD: manifold-prior diverse distillation for one-class anomaly detection (CVPR 2026, arXiv 2603.07142).

Two frozen teachers, one that sees local structure (a ResNet) and one that sees global context (VMamba), are united
into one set of targets (inter-level feature adaption, InA) and one input (manifold matching and unification, MMU).
Two students learn to rebuild the targets of normal images: one layer by layer, the other with priors from the
united features injected between its stages (manifold prior affine, MPA); a diversity loss keeps them apart.  Where
the students' features differ from the targets, the image is not normal.  There are no support images.

Shapes of the paper's pair at 256x256 (WideResNet-50-2 and merged VMamba-Tiny), levels shallow to deep:

    local    256@64   512@32   1024@16   2048@8
    global   192@32   384@16    768@8     768@8   adapted to the local channels, then resized to the local sizes
    united   256@64   512@32   1024@16 | 2048@8   three targets (InA) | the students' input (MMU)
    priors            512@32   1024@16            added to the inputs of the second student's last two stages (MPA)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

from anatomaly.errors import ConfigError, ShapeError
from anatomaly.methods.decoder import Decoder
from anatomaly.methods.pdd_blocks import Adapter, ManifoldPrior, resize
from anatomaly.methods.settings import PDDSettings
from anatomaly.types import Comparison

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Features


_DEFAULT = PDDSettings()
#: Blocks per stage of a student, deep to shallow.
BLOCKS = (2, 2, 2)


class PDD(nn.Module):
    """Adapters, prior and students of PDD on two frozen teachers; see `types.Method` for how the steps are used.

    The rows of the paper's ablation: one teacher without `mpa` and `two_students` is plain reverse distillation (one
    student rebuilds levels 1-3 of its teacher from level 4), the second teacher adds InA and MMU, `mpa` the priors, and
    `two_students` the second student; ``diversity_weight=0`` leaves the diversity loss out.

    Args:
        local: Frozen backbone whose channels and sizes targets and students have.
        global_: Frozen backbone that is adapted to `local`, or None: no InA and no MMU.
        settings: Parts, weights and thresholds.  With `detach_targets` the three InA adapters are not trained at all;
            the release lets the gradients flow, which allows targets to collapse.  Without `two_students` the only
            student is the prior-injected one where there is `mpa`.

    Raises:
        ConfigError: Settings contradict each other.

    Note: with `shared_students` stage 1 is the same for both students and run once; the release runs it twice and moves
        its running statistics twice per step.  Here one update goes as far as two; `num_batches_tracked`, which
        nothing reads, counts one.
    Note: the students end in a ReLU where the local teacher does (release), although a target may be as low as GELU's
        minimum, -0.17, where the local feature is 0.
    """

    needs_support = False

    def __init__(self, local: Teacher, global_: Teacher | None = None, *, settings: PDDSettings = _DEFAULT) -> None:
        super().__init__()
        _check_settings(settings)
        self.settings = settings
        # In a dict they are no submodules: state_dict(), parameters() and train() concern the trainable part only.
        self.teachers = {"local": local} if global_ is None else {"local": local, "global": global_}
        pairs = [] if global_ is None else zip(global_.channels, local.channels, strict=True)
        self.adapters = nn.ModuleList(Adapter(*pair) for pair in pairs)  # InA, InA, InA, MMU
        self.prior = ManifoldPrior(local.channels) if settings.mpa else None
        self.students = nn.ModuleList(
            _students(local, 2 if settings.two_students and not settings.shared_students else 1)
        )
        #: What the students are, in the order of `encode`.
        self.roles = ("plain", "prior") if settings.two_students else ("prior",) if settings.mpa else ("plain",)
        if settings.shared_students:
            _update_twice(cast("Decoder", self.students[0]).layer1)
        self.to(memory_format=torch.channels_last)  # the teachers' layout

    def extract(self, images: Tensor) -> Features:
        """Pyramids of (B, 3, H, W) images in [0, 1]: {"local": four levels, "global": four levels}."""
        return {name: teacher(images) for name, teacher in self.teachers.items()}

    def unite(self, features: Features) -> list[Tensor]:
        """InA and MMU: add the adapted and resized levels of the global teacher to those of the local one.

        Args:
            features: What `extract` returned.

        Returns:
            Four tensors with the shapes of the local teacher's levels: the three targets and the students' input.

        Raises:
            ShapeError: The students cannot make the local levels' sizes.
        """
        local = features["local"]
        self._check_sizes(local)
        if not self.adapters:
            return list(local)
        pairs = zip(self.adapters, local, features["global"], strict=True)
        return [near + resize(adapter(far), near.shape[-2:], corners=True) for adapter, near, far in pairs]

    def _check_sizes(self, levels: Sequence[Tensor]) -> None:
        """Each student stage enlarges by the whole-number quotient of two strides: do the levels have such sizes?"""
        teacher = self.teachers["local"]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        for level in range(3):
            factor = max(1, teacher.strides[level + 1] // teacher.strides[level])
            made = tuple(factor * side for side in sizes[level + 1])
            if made != sizes[level]:
                raise ShapeError(
                    f"PDD: level {level + 1} of {teacher.name} is {sizes[level][0]}x{sizes[level][1]}, expected "
                    f"{made[0]}x{made[1]}, {factor} times level {level + 2}. Use images whose sides are multiples of "
                    f"{teacher.strides[-1]} and a local teacher whose strides divide each other."
                )

    extract_support = extract

    def encode(self, features: Features) -> list[Tensor]:
        """Run the trainable part.

        Args:
            features: What `extract` returned.

        Returns:
            Levels shallow to deep, each (B, C, h, w): three of student 1 (plain), three of student 2 (prior-injected)
            and the three targets; six tensors with one student.

        Raises:
            ShapeError: The students cannot make the local levels' sizes.
        """
        *targets, bottleneck = self.unite(features)
        priors: list[Tensor] = []
        if self.prior is not None:
            priors = self.prior(bottleneck, [targets[2].shape[-2:], targets[1].shape[-2:]])
        students = cast("list[Decoder]", list(self.students))  # one or two; a shared one plays both roles
        deeps = [student.layer1(bottleneck) for student in students]
        encoded = targets
        for role in reversed(self.roles):  # the release's order; shared running statistics remember the last run best
            own = -1 if role == "prior" else 0
            encoded = _finish(students[own], deeps[own], priors if role == "prior" else []) + encoded
        return encoded

    def embed_support(self, features: Features) -> dict[str, Tensor]:
        """Nothing: PDD has no support images.  `features` is ignored."""
        return {}

    def compare(self, encoded: Sequence[Tensor], support: Mapping[str, Tensor]) -> list[Comparison]:
        """Pair every student's levels with the targets; the map is the sum over all of them.

        Args:
            encoded: What `encode` returned.
            support: Ignored.

        Returns:
            Three comparisons of each student, student 1 first, shallow to deep.
        """
        targets = encoded[-3:]
        return [Comparison(student, targets[i % 3]) for i, student in enumerate(encoded[:-3])]

    def training_loss(self, query: Features, support: Features) -> dict[str, Tensor]:
        """Weighted sum of L_kr, L_prp and L_div (PDD's loss; cosines of whole flattened levels).

        Args:
            query: Teacher features of B normal images.
            support: Ignored.

        Returns:
            Scalars "total" and, before weighting, "plain_mse" (L_kr), "prior_mse" and "prior_cosine" (L_prp),
            and "relation" (L_div); those of a student that is left out are absent.
        """
        encoded = self.encode(query)
        targets = [target.detach() if self.settings.detach_targets else target for target in encoded[-3:]]
        students = dict(zip(self.roles, (encoded[:3], encoded[3:6]), strict=False))
        losses, total = {}, encoded[0].new_zeros((), dtype=torch.float32)
        for role, levels in students.items():
            losses[f"{role}_mse"] = mse(levels, targets)
            total = total + self.settings.reconstruction_weight * losses[f"{role}_mse"]
        if "prior" in students:
            cosine = cosine_similarities(students["prior"], targets).mean(dim=1)
            losses["prior_cosine"] = (cosine if self.settings.cosine_sign == "release" else 1 - cosine).sum()
            total = total + self.settings.cosine_weight * losses["prior_cosine"]
        if len(students) == 2:
            losses["relation"] = self._relation(students["plain"], students["prior"])
            total = total + self.settings.diversity_weight * losses["relation"]
        return {"total": total, **losses}

    def _relation(self, plain: Sequence[Tensor], prior: Sequence[Tensor]) -> Tensor:
        if self.settings.relation == "alike":
            return (1 - cosine_similarities(plain, prior).mean(dim=1)).sum()
        return diversity(
            plain,
            prior,
            tau_low=self.settings.tau_low,
            tau_high=self.settings.tau_high,
            low_levels=self.settings.low_levels,
        )


def _check_settings(settings: PDDSettings) -> None:
    if settings.shared_students and not (settings.two_students and settings.mpa):
        raise ConfigError(
            f"PDD: got shared_students with two_students={settings.two_students} and mpa={settings.mpa}, expected both "
            "True: without a second student or a prior there are no two students to share weights. Set "
            "shared_students to False."
        )


def _students(local: Teacher, number: int) -> list[Decoder]:
    return [Decoder(local.channels, local.strides, blocks=BLOCKS, signed=local.signed) for _ in range(number)]


def _update_twice(stage: nn.Module) -> None:
    """One update of the running statistics counts as two with the same batch: r + m' (b - r), 1 - m' = (1 - m)^2."""
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - (1 - 0.1) ** 2


def _finish(student: Decoder, deep: Tensor, priors: Sequence[Tensor]) -> list[Tensor]:
    """A student's three levels, shallow to deep, from its stage 1 and, for the prior-injected one, two priors."""
    middle = student.layer2(deep + priors[0] if priors else deep)
    shallow = student.layer3(middle + priors[1] if priors else middle)
    return [shallow, middle, deep]


def cosine_similarities(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Cosine of each image's whole flattened levels: sequences of (B, C, h, w) -> (levels, B), float32."""
    return torch.stack(
        [F.cosine_similarity(x.flatten(1).float(), y.flatten(1).float()) for x, y in zip(a, b, strict=True)]
    )


def mse(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum over the levels of the mean squared errors; a scalar, float32."""
    return torch.stack([F.mse_loss(x.float(), y.float()) for x, y in zip(a, b, strict=True)]).sum()


def diversity(
    plain: Sequence[Tensor], prior: Sequence[Tensor], *, tau_low: float, tau_high: float, low_levels: int
) -> Tensor:
    """Hinge loss that keeps two students apart where it is shallow and together where it is deep (PDD: L_div).

    Args:
        plain: Levels of student 1, shallow to deep, each (B, C, h, w).
        prior: Levels of student 2.
        tau_low: At the first `low_levels` levels, cosines above this cost.
        tau_high: At the others, cosines below this cost.
        low_levels: Number of shallow levels.

    Returns:
        Scalar, float32: sum over the levels of the mean over the images.

    Example:
        >>> f = torch.ones(2, 8, 4, 4)
        >>> diversity([f, f], [f, -f], tau_low=0.75, tau_high=0.25, low_levels=1)
        tensor(1.5000)
    """
    cosines = cosine_similarities(plain, prior)  # (levels, B)
    excess = (cosines[:low_levels] - tau_low).clamp(min=0)
    deficit = (tau_high - cosines[low_levels:]).clamp(min=0)
    return torch.cat([excess, deficit]).mean(dim=1).sum()


def import_pdd(content: Mapping[str, object], method: PDD, *, where: str) -> None:
    """Load an official checkpoint, whose one decoder is run as both students, into a method.

    Args:
        content: What `weights.read_state` returned.
        method: A PDD on WideResNet-50-2 and merged VMamba-Tiny; if its students have their own weights, both get the
            decoder's.
        where: File name for messages.

    Raises:
        WeightsError: A part is missing or does not fit.
    """
    from anatomaly.backbones.weights import load_strict, tensors_of

    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors_of(content, where=where).items():
        if re.match(r"layer[123]\.", key):
            renamed |= {f"students.{i}.{key}": tensor for i in range(len(method.students))}
        else:
            renamed[_own_name(key)] = tensor
    load_strict(method, renamed, where=where)


def _own_name(key: str) -> str:
    """Our name of an official key outside the decoder; others stay as they are and are reported as unexpected."""
    key = re.sub(r"^up_dim_v_r([1-4])\.", lambda found: f"adapters.{int(found[1]) - 1}.", key)
    key = re.sub(r"^(adapters\..*)residual_proj\.", r"\1shortcut.", key)
    key = re.sub(r"^mlp\.shared_transform\.", "prior.shared.", key)
    return re.sub(r"^mlp\.branch([12])\.", lambda found: f"prior.heads.{int(found[1]) - 1}.", key)
