"""The table of methods: one record each, of the built-in ones here, of others in the packages that bring them.

Everything that is asked of a method before it is built, or about it afterwards, is a field of its record.  Nobody else
asks for a method's name.  This file loads no torch, so that the command line can list settings at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal

from anatomaly.errors import ConfigError
from anatomaly.methods.settings import (
    AttentionSettings,
    D24FADSettings,
    MatchingSettings,
    NearestSettings,
    PDDSettings,
)

if TYPE_CHECKING:
    from anatomaly.types import Method

#: Where packages declare a method: ``[project.entry-points."anatomaly.methods"]``, name = "module:record".
GROUP = "anatomaly.methods"


@dataclass(frozen=True)
class MethodRecord:
    """Everything there is to know about a method besides its code.

    Attributes:
        name: What users call it; also the key of its settings in YAML files and flags (``--method.<name>.<setting>``).
        summary: One line for help texts.
        method: The class, or where it is as "module:Class"; called as ``method(*teachers, settings=settings)``, it
            follows `types.Method`.
        settings: Frozen dataclass of its settings, every field with a default.
        few_shot: It compares a query with K supports of a task; what has to be trained is trained on other tasks.
        one_class: It can be trained on normal images of the very task, and be judged like that.
        learns_from: "lesions": images with and without a pasted lesion beside supports of their task; "episodes": a
            normal query and K supports; "normals": normal images alone; "": nothing, it is never trained.
        deepest_support: Its loss looks at the deepest level of the supports only; the others need not be loaded then.
        teachers: The most frozen backbones it takes, 1 or 2.
        conservative_leave_one_out: A support judged against the others scores no lower than a new normal image does.
        defaults: Settings of `fit` that go with it, as in a preset file; a preset of its name takes their place.
        release: Preset with the settings of the method's official release, where there is one.
        load_release: What loads a checkpoint of that release into the method, as "module:function".
    """

    name: str
    summary: str
    method: str | type[Method]
    settings: type[Any]
    few_shot: bool
    one_class: bool
    learns_from: Literal["lesions", "episodes", "normals", ""]
    deepest_support: bool = False
    teachers: Literal[1, 2] = 1
    conservative_leave_one_out: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    release: str = ""
    load_release: str = ""

    @property
    def trained(self) -> bool:
        """Whether it has to be trained before it can judge."""
        return self.learns_from != ""

    def build(self, teachers: Sequence[Any], settings: Any) -> Method:
        """The method on these frozen backbones, its weights drawn from torch's random state."""
        kind: Any = imported(self.method) if isinstance(self.method, str) else self.method
        built: Method = kind(*teachers[: self.teachers], settings=settings)
        return built


def imported(place: str) -> Any:
    """What stands at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class _Table(Mapping[str, MethodRecord]):
    """The built-in records, and those of installed packages, which are loaded when they are first asked for."""

    def __init__(self, *records: MethodRecord) -> None:
        self._records = {record.name: record for record in records}
        self._built_in = tuple(self._records)
        self._outside: dict[str, EntryPoint] | None = None

    def _found(self) -> dict[str, EntryPoint]:
        if self._outside is None:
            self._outside = {each.name: each for each in entry_points(group=GROUP) if each.name not in self._records}
        return self._outside

    def __getitem__(self, name: str) -> MethodRecord:
        if name not in self._records:
            self._records[name] = _loaded(self._entry(name))
        return self._records[name]

    def _entry(self, name: str) -> EntryPoint:
        if name not in self._found():
            near = get_close_matches(str(name), list(self), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"method: unknown name {name!r}, expected one of {', '.join(self)}.{hint}")
        return self._found()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._records or name in self._found()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._records, *self._found()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def built_in(self) -> tuple[str, ...]:
        """Names of the methods that come with anatomaly."""
        return self._built_in

    def loadable(self) -> list[str]:
        """Names of all methods but those of packages that cannot be loaded; naming one of these says why."""
        names = []
        for name in self:
            with suppress(ConfigError):
                names.append(self[name].name)
        return names

    def register(self, record: MethodRecord) -> None:
        """Add a method for this process; an entry point adds it for every one.

        Raises:
            ConfigError: There is another method of this name.
        """
        if record.name in self and self[record.name] != record:
            raise ConfigError(f"method: the name {record.name!r} is taken. Choose another one.")
        self._records[record.name] = record


def _loaded(entry: EntryPoint) -> MethodRecord:
    """The record of an installed package."""
    where = f"method {entry.name!r} of {entry.value}"
    try:
        record = entry.load()
    except Exception as err:  # whatever a foreign package does when it is imported
        reason = " ".join(f"{type(err).__name__}: {err}".split())
        raise ConfigError(f"{where}: cannot be loaded ({reason}). Mend or remove its package.") from err
    if not isinstance(record, MethodRecord) or record.name != entry.name or not is_dataclass(record.settings):
        raise ConfigError(
            f"{where}: got {type(record).__name__}, expected a MethodRecord of this name whose settings are a "
            "dataclass. Mend or remove its package."
        )
    return record


#: The methods by name.  Looking up a name nobody knows is a `ConfigError`.
METHODS = _Table(
    MethodRecord(
        "attention",
        "patch attention: rebuilds a query from the supports' patches (docs/patch-attention.md)",
        "anatomaly.methods.attention:PatchAttention",
        AttentionSettings,
        few_shot=True,
        one_class=True,
        learns_from="lesions",
    ),
    MethodRecord(
        "d24fad",
        "dual distillation for few shots (docs/d24fad.md)",
        "anatomaly.methods.d24fad:D24FAD",
        D24FADSettings,
        few_shot=True,
        one_class=False,
        learns_from="episodes",
        deepest_support=True,
        release="d24fad-release",
        load_release="anatomaly.methods.d24fad:import_d24fad",
    ),
    MethodRecord(
        "pdd",
        "manifold-prior diverse distillation, one class (docs/pdd.md)",
        "anatomaly.methods.pdd:PDD",
        PDDSettings,
        few_shot=False,
        one_class=True,
        learns_from="normals",
        teachers=2,
        release="pdd-release",
        load_release="anatomaly.methods.pdd:import_pdd",
    ),
    MethodRecord(
        "nearest",
        "patch nearest neighbours of the teacher's features",
        "anatomaly.methods.nearest:PatchNearestNeighbours",
        NearestSettings,
        few_shot=True,
        one_class=True,
        learns_from="",
        conservative_leave_one_out=True,
    ),
    MethodRecord(
        "matching",
        "matches a query with the supports place by place and as a whole (docs/matching.md)",
        "anatomaly.methods.matching:Matching",
        MatchingSettings,
        few_shot=True,
        one_class=True,
        learns_from="",
        teachers=2,
        conservative_leave_one_out=True,
    ),
)
