"""Named settings of `fit`: what the two papers say and what their releases do, as YAML files beside this one."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from anatomaly.errors import ConfigError


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
