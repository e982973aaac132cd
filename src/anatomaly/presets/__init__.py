"""Named settings of `fit`: ours, what the two papers say and what their releases do, as YAML files beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from anatomaly.config import FitConfig, MethodConfig
from anatomaly.errors import ConfigError
from anatomaly.methods import METHODS

#: What `fit` does where no method, preset or file says otherwise.
DEFAULT_PRESET = "matching"
#: What others are compared with.
REFERENCE_PRESET = "nearest"
#: What the demo compares; its report is that of the first.
DEMO_PRESETS = (DEFAULT_PRESET, "d24fad-quick", REFERENCE_PRESET)


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
        >>> load_preset().method.name, load_preset("d24fad").training.epochs
        ('matching', 70)
    """
    import yaml

    return configured(yaml.safe_load(preset_file(name).read_text(encoding="utf-8")))


def defaults_of(method: str) -> Mapping[str, Any]:
    """The settings of `fit` that go with a method: those of the preset of its name, or of its record.

    Raises:
        ConfigError: The method is unknown.
    """
    import yaml

    record = METHODS[method]
    if method in preset_names():
        return dict(yaml.safe_load(preset_file(method).read_text(encoding="utf-8")))
    return {**record.defaults, "method": {"name": method, **dict(record.defaults.get("method", {}))}}


def configured(settings: Mapping[str, Any], base: FitConfig | None = None) -> FitConfig:
    """Settings as a mapping, spelled as in a YAML file of `fit`, laid over a configuration.

    Args:
        settings: Groups of settings; "method" names the method where there is no `base` or it is another one's.
        base: What holds where `settings` say nothing; None takes the defaults of `FitConfig`.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    method = dict(settings.get("method", {}))
    name = method.pop("name", base.method.name if base is not None else DEFAULT_PRESET)
    kept = base.method.settings if base is not None and base.method.name == name else METHODS[name].settings()
    if unknown := [key for key in method if key not in METHODS]:
        raise ConfigError(f"method: unknown setting {unknown[0]!r}, expected name and {name}.")
    chosen = MethodConfig(name, _filled(kept, method.get(name, {}), f"method.{name}"))
    whole = FitConfig(chosen) if base is None else replace(base, method=chosen)
    return _filled(whole, {key: value for key, value in settings.items() if key != "method"}, "")


_Record = TypeVar("_Record")


def _filled(record: _Record, settings: Mapping[str, Any], where: str) -> _Record:
    """A frozen record with some fields replaced, nested ones too."""
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        place = f"{where}.{name}".removeprefix(".")
        if name not in {each.name for each in fields(record)}:  # type: ignore[arg-type]
            raise ConfigError(f"{place}: there is no such setting. See anatomaly fit --help_all.")
        old = getattr(record, name)
        if is_dataclass(old):
            changed[name] = _filled(old, value, place)
        else:
            changed[name] = tuple(value) if isinstance(old, tuple) else value
    return replace(record, **changed)  # type: ignore[type-var]
