"""The settings of each built-in method, written once: constructors, command line, YAML and bundles all take these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from anatomaly.errors import check, check_words


@dataclass(frozen=True)
class NearestSettings:
    """Patch nearest neighbours have none."""


@dataclass(frozen=True)
class MatchingSettings:
    """What matching compares; levels are counted from 1, the finest, to 4.

    Attributes:
        places: Levels at which every place is compared.
        wholes: Levels at which whole images are compared.
        whole_weight: What a level of whole images counts, where one of places counts 1.
    """

    places: tuple[int, ...] = (2, 3)
    wholes: tuple[int, ...] = (4,)
    whole_weight: float = 0.25

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        for name, least in (("places", 1), ("wholes", 0)):
            value = getattr(self, name)
            levels = tuple(value) if isinstance(value, (tuple, list)) else (0,)
            fits = len(levels) >= least and all(levels.count(level) == 1 and level in _LEVELS for level in levels)
            check(f"method.matching.{name}", value, fits, f"{'some' if least else 'none or some'} of the levels 1 to 4")
            object.__setattr__(self, name, tuple(sorted(levels)))  # a bundle has lists
        weight = self.whole_weight
        check("method.matching.whole_weight", weight, 0 <= weight <= 1e6, "0 to a million")


_LEVELS = (1, 2, 3, 4)


@dataclass(frozen=True)
class D24FADSettings:
    """D24FAD's losses and learn-to-weight, where paper and release differ, and its ablations.

    Attributes:
        distance: Of the losses: flattened (release) or positionwise (paper).
        softmax_scale: Of learn-to-weight: channels (release) or elements.
        tsd_weight: Weight of the teacher-student loss; the paper's lambda, 0.1.
        self_distillation: False trains and scores against the teacher alone (an ablation).
        learn_to_weight: False gives all supports the same weight (an ablation).
        detach_supports: True takes the supports' student features as they are (stop-gradient): self-distillation then
            moves the query towards them, not them towards the query.
    """

    distance: Literal["flattened", "positionwise"] = "flattened"
    softmax_scale: Literal["channels", "elements"] = "channels"
    tsd_weight: float = 0.1
    self_distillation: bool = True
    learn_to_weight: bool = True
    detach_supports: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        check_words(self, "method.d24fad")
        check("method.d24fad.tsd_weight", self.tsd_weight, 0 <= self.tsd_weight < math.inf, "at least 0")


@dataclass(frozen=True)
class PDDSettings:
    """PDD's parts, weights and thresholds; the defaults are the paper's.

    Attributes:
        shared_students: Both students are one network (release); False gives each its own weights (paper).
        cosine_sign: paper pulls the prior-injected student towards the target, release pushes it away.
        detach_targets: Keep the losses' gradients out of the adapters that make the targets.
        mpa: Inject the manifold priors.
        two_students: False leaves one student and no diversity loss.
        reconstruction_weight: Of the mean squared errors between students and targets.
        cosine_weight: Of the cosine between the prior-injected student and the targets.
        diversity_weight: Of the relation between the students.
        relation: diverse (the paper's hinge loss) or alike (its counter-test).
        tau_low: Cosine above which the students' shallow levels are pushed apart.
        tau_high: Cosine below which their other levels are pulled together.
        low_levels: Number of shallow levels.
    """

    shared_students: bool = False
    cosine_sign: Literal["paper", "release"] = "paper"
    detach_targets: bool = False
    mpa: bool = True
    two_students: bool = True
    reconstruction_weight: float = 0.02
    cosine_weight: float = 0.05
    diversity_weight: float = 0.5
    relation: Literal["diverse", "alike"] = "diverse"
    tau_low: float = 0.75
    tau_high: float = 0.30
    low_levels: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        check_words(self, "method.pdd")
        for name in ("reconstruction_weight", "cosine_weight", "diversity_weight"):
            value = getattr(self, name)
            check(f"method.pdd.{name}", value, 0 <= value < math.inf, "at least 0")
        for name in ("tau_low", "tau_high"):
            value = getattr(self, name)
            check(f"method.pdd.{name}", value, -1 <= value <= 1, "a cosine from -1 to 1")
        check("method.pdd.low_levels", self.low_levels, self.low_levels in (0, 1, 2, 3), "0 to 3")


@dataclass(frozen=True)
class AttentionSettings:
    """Parts of patch attention that can be left out, to see what each is worth (docs/patch-attention.md).

    Attributes:
        mirrored: The supports' mirror images (left and right exchanged) are supports too.
        resized: The supports a tenth larger and a tenth smaller are supports too.
        surroundings: Every place is judged against its surroundings; False takes its distance as it is.
        teacher_levels: Number of shallow levels of which the teacher's own nearest patches count as well.
        deepest: What the deepest level counts, times what it learned to count.
    """

    mirrored: bool = True
    resized: bool = True
    surroundings: bool = True
    teacher_levels: int = 3
    deepest: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values out of range with a ConfigError."""
        check_words(self, "method.attention")
        levels = self.teacher_levels
        check("method.attention.teacher_levels", levels, levels in (0, 1, 2, 3, 4), "0 to 4")
        check("method.attention.deepest", self.deepest, 0 <= self.deepest <= 1e6, "0 to a million")
