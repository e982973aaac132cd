"""Named settings of `fit`: ours, what the two papers say and what their releases do, as YAML files beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from anatomaly.config import FitConfig
from anatomaly.errors import ConfigError

#: What `fit` does where neither a preset, a file nor a method is named.
DEFAULT_PRESET = "attention"


def preset_names() -> list[str]:
    """All presets, in alphabetical order."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The YAML file of a preset, in the form `fit --config` reads.

    Raises:
        ConfigError: The name is unknown.
    """
    names = preset_names()
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"preset: unknown name {name!r}, expected one of {', '.join(names)}.{hint}")
    return Path(__file__).parent / f"{name}.yaml"


def load_preset(name: str = DEFAULT_PRESET) -> FitConfig:
    """The settings of a preset, as `anatomaly fit --preset NAME` would use them.

    Raises:
        ConfigError: The name is unknown.

    Example:
        >>> load_preset("attention").method.name
        'attention'
    """
    import yaml

    return _filled(FitConfig(), yaml.safe_load(preset_file(name).read_text(encoding="utf-8")))


_Record = TypeVar("_Record")


def _filled(record: _Record, settings: Mapping[str, Any]) -> _Record:
    """A frozen record with some fields replaced, nested ones too."""
    changed = {}
    for name, value in settings.items():
        old = getattr(record, name)
        changed[name] = _filled(old, value) if is_dataclass(old) else tuple(value) if isinstance(old, tuple) else value
    return replace(record, **changed)  # type: ignore[type-var]
