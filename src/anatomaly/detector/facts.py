"""What a model says of itself besides its weights: method, teachers, training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from anatomaly.backbones.teacher import TeacherFacts
from anatomaly.backbones.weights import state_digest
from anatomaly.config import MethodConfig, TeacherConfig
from anatomaly.errors import check
from anatomaly.methods import METHODS
from anatomaly.methods.settings import D24FADSettings

if TYPE_CHECKING:
    from anatomaly.methods import MethodRecord
    from anatomaly.types import Method

#: What bundles and flags call a method's teachers, in the method's own order.
TEACHERS = ("teacher", "global_teacher")


@dataclass(frozen=True)
class ModelFacts:
    """What a model says of itself.

    Attributes:
        method: Its method and settings.
        teachers: Its frozen backbones, in the method's own order.
        training: Settings, tasks and figures of its training; empty where it was not trained here.
        map_ranges: By task, the (low, high) of the fixed colour scale of a method without support.
    """

    method: MethodConfig
    teachers: tuple[TeacherFacts, ...]
    training: Mapping[str, Any] = field(default_factory=dict)
    map_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: MethodConfig, method: Method, training: Mapping[str, Any] | None = None) -> ModelFacts:
        """The facts of a method that was built from these settings."""
        return cls(config, tuple(teacher.facts() for teacher in method.teachers.values()), training or {})

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method.name

    @property
    def record(self) -> MethodRecord:
        """The method's own record."""
        return METHODS[self.method.name]

    def as_dict(self) -> dict[str, Any]:
        """As `config.json` spells it."""
        teachers = {role: asdict(facts) for role, facts in zip(TEACHERS, self.teachers, strict=False)}
        ranges = {task: list(scale) for task, scale in self.map_ranges.items()}
        return {
            "method": self.method.as_dict(),
            **teachers,
            **({"training": dict(self.training)} if self.training else {}),
            **({"map_ranges": ranges} if ranges else {}),
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> ModelFacts:
        """The reverse; everything that will be relied on is checked here.

        Raises:
            ConfigError: A setting is out of range or of another type, or a name is unknown.
            KeyError, TypeError, ValueError: A part is missing or of another form.
        """
        roles = [role for role in TEACHERS if role in facts or role == TEACHERS[0]]
        teachers = tuple(
            TeacherFacts(
                **{key: facts[role][key] for key in ("name", "weights", "normalise", "hash")},
                blocks=TeacherConfig(blocks=facts[role].get("blocks")).blocks,  # bundles of before have none
            )
            for role in roles
        )
        for role, each in zip(roles, teachers, strict=True):
            TeacherConfig(each.name, each.weights, each.normalise)
            known = ("auto", "random", "file")
            check(f"{role}.weights", each.weights, each.weights in known, "auto, random or file")
            check(f"{role}.name", repr(each.name), each.name.isprintable(), "a name of one line")
            check(f"{role}.hash", each.hash, isinstance(each.hash, str) and each.hash.isprintable(), "a digest")
        method = MethodConfig.from_dict(facts["method"])
        most = METHODS[method.name].teachers
        check("teachers", len(teachers), len(teachers) <= most, f"at most {most} of {method.name}")
        ranges = {task: map_range(scale, f"map_ranges.{task}") for task, scale in facts.get("map_ranges", {}).items()}
        return cls(method, teachers, _training(facts.get("training", {})), ranges)


def map_range(scale: Sequence[Any], where: str) -> tuple[float, float]:
    """The (low, high) of a colour scale that was read from a file.

    Raises:
        ConfigError: They are no numbers, too large for a map, or not in this order.
        TypeError, ValueError: They are not two.
    """
    low, high = scale
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (low, high))
    check(where, f"{low} to {high}", numbers and -1e30 < low < high < 1e30, "two numbers, the lower one first")
    return float(low), float(high)


def _training(facts: Any) -> dict[str, Any]:
    """What is told of a training, with those parts checked that reports and commands rely on.

    Raises:
        ConfigError: A part is of another type.
    """
    check("training", facts, isinstance(facts, dict), "settings and figures by name")
    for name in ("best_epoch", "images", "synthetic"):
        value = facts.get(name, 0)
        check(f"training.{name}", value, isinstance(value, int) and not isinstance(value, bool), "a whole number")
    tasks = facts.get("tasks", [])
    check("training.tasks", tasks, isinstance(tasks, list) and all(isinstance(each, str) for each in tasks), "names")
    return dict(facts)


def model_hash(facts: ModelFacts, method: Method) -> str:
    """Digest of everything a bank's tensors depend on besides its images: weights, teachers' scaling, choices.

    The first bundles spelled the settings of one method beside those of every other.  They are still digested like
    that, so that their banks and calibrations keep fitting.  `detach_supports` came later and is left out: it says how
    the weights were trained and changes nothing that they compute.
    """
    name, own = facts.name, asdict(facts.method.settings)
    plain = isinstance(facts.method.settings, D24FADSettings)
    choices = {"name": name, **(own if plain else asdict(D24FADSettings()))}
    del choices["detach_supports"]
    if own and not plain:
        choices[name] = own
    teachers: Sequence[Any] = list(method.teachers.values())
    told = (fact for teacher in teachers for fact in (teacher.name, teacher.normalise, teacher.weights_hash))
    text = repr((choices, *told)) + state_digest(method.state_dict())
    return hashlib.sha256(text.encode()).hexdigest()
