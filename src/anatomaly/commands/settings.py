"""The settings of `fit` as options: defaults follow the method, a preset and YAML files lie over them, flags win."""

from __future__ import annotations

import logging
from argparse import SUPPRESS
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from anatomaly.commands.intensity import SPELLINGS, intensity_type
from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.errors import ConfigError
from anatomaly.methods import METHODS
from anatomaly.methods.settings import D24FADSettings
from anatomaly.presets import DEFAULT_PRESET, configured, defaults_of, load_preset, preset_file, preset_names
from anatomaly.types import Preprocessing, Scoring

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jsonargparse import ArgumentParser, Namespace

logger = logging.getLogger(__name__)

#: The settings that most people need; `--help` hides the others.
_COMMON = {
    *("method.name", "teacher.name", "preprocessing.size"),
    *("preprocessing.intensity", *(f"preprocessing.intensity.{name}" for name in ("rule", "low", "high"))),
    *("training.shots", "training.epochs", "training.batch_size", "training.device", "training.seed"),
}
#: The groups of settings.
_GROUPS = tuple(each.name for each in fields(FitConfig))
#: Settings that stood beside the method's name before each method had a group of its own: old name -> new place.
_FORMER = {
    f"method.{each.name}": f"method.{record.name}.{each.name}"
    for record in [METHODS[name] for name in METHODS.built_in]
    if record.settings is D24FADSettings
    for each in fields(D24FADSettings)
}


def settings_arguments(parser: ArgumentParser) -> None:
    """Every setting of `fit`, and `--preset`."""
    parser.add_argument("--preset", type=str, help=f"{', '.join(preset_names())}. Without: what goes with the method.")
    names = "; ".join(f"{name}: {METHODS[name].summary}" for name in METHODS.built_in)
    parser.add_argument("--method.name", type=str, help=f"{names}.")
    for name in METHODS.loadable():
        parser.add_class_arguments(METHODS[name].settings, f"method.{name}")
    for former in _FORMER:
        parser.add_argument(f"--{former}", default=SUPPRESS, help=SUPPRESS)
    parser.add_class_arguments(TeacherConfig, "teacher")
    parser.add_class_arguments(TeacherConfig, "global_teacher")
    rule: Any = intensity_type()
    parser.add_class_arguments(Preprocessing, "preprocessing", skip={"intensity"})
    parser.add_argument("--preprocessing.intensity", type=rule, help=f"Values to [0, 1], {SPELLINGS}.")
    parser.add_argument("--task_intensity", type=dict[str, rule], help="Tasks that need another one.")
    parser.add_class_arguments(Scoring, "scoring")
    parser.add_class_arguments(TrainingConfig, "training")
    parser.add_argument("--help_all", action="help", help="Show every setting, not only those that most people need.")
    _set_defaults(parser, load_preset())


def parse_layered(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Read words over the defaults that go with the method these words are about.

    The method is the one that is named, in a flag or a file; else the one whose settings are given; else the default.
    A preset brings all its settings: its file takes its place among the words.

    Returns:
        The options; `given` holds the settings that words and files name, group by group.

    Raises:
        ConfigError: The preset is unknown, or settings of several methods are given and none is named.
    """
    replaced, given = _with_preset_files(words), {}
    if {"-h", "--help"}.intersection(words):
        _show_common(parser)
    elif "--help_all" not in words:
        explicit = [word for word in replaced if not word.startswith("--print_config")]
        found = moved(parser.parse_args(explicit, defaults=False), tell=False)
        given = {name: found[name] for name in _GROUPS if name in found}
        given = {name: group.as_dict() if hasattr(group, "as_dict") else group for name, group in given.items()}
        if any(word.partition("=")[0] == "--preset" for word in words):
            _set_defaults(parser, FitConfig(MethodConfig(_method_of(found) or DEFAULT_PRESET)))
        else:
            set_method_defaults(parser, _method_of(found))
    options = moved(parser.parse_args(replaced))
    options["given"] = given
    return options


def set_method_defaults(parser: ArgumentParser, method: str | None) -> None:
    """Let the parser's defaults be those that go with a method; None takes the default one."""
    _set_defaults(parser, load_preset() if method is None else configured(defaults_of(method)))


def fit_config(options: Namespace) -> FitConfig:
    """The settings as the record that `fit` takes.

    Raises:
        ConfigError: A setting of another method than the chosen one was given.
    """
    name = options.method.name
    for other in METHODS.loadable():
        settings = options.method.get(other)
        if other != name and settings is not None and settings != METHODS[other].settings():
            raise ConfigError(
                f"method.{other}: got settings of {other}, but the method is {name}. Leave them out, or choose it with "
                f"--method.name {other}."
            )
    groups = {each.name: options[each.name] for each in fields(FitConfig) if each.name != "method"}
    return FitConfig(MethodConfig(name, options.method.get(name)), **groups)


def moved(options: Namespace, *, tell: bool = True) -> Namespace:
    """The options with settings of former versions at their places of now; unless told before, one line says so."""
    for former, place in _FORMER.items():
        if former in options:
            options[place] = options.pop(former)
            if tell:
                logger.warning("--%s is now --%s.", former, place)
    return options


def _method_of(given: Namespace) -> str | None:
    """The method that explicit settings are about, or None."""
    if given.get("whose") is not None:  # of `benchmark ablation`
        return str(given["whose"])
    method = given.get("method") or {}
    if method.get("name") is not None:
        return str(method["name"])
    about = [name for name in METHODS.loadable() if method.get(name) is not None]
    if len(about) > 1:
        raise ConfigError(f"method: got settings of {' and '.join(about)}, but no method. Choose one: --method.name.")
    return about[0] if about else None


def _show_common(parser: ArgumentParser) -> None:
    """Leave the settings that few people need out of the help text."""
    hidden = [each for each in parser._actions if each.dest.split(".")[0] in _GROUPS and each.dest not in _COMMON]
    for action in hidden:
        action.help = SUPPRESS
    parser.epilog = "These are the most common settings. --help_all shows every one; docs/ says what they are for."


def _set_defaults(parser: ArgumentParser, config: FitConfig) -> None:
    facts = config.as_dict()
    facts["task_intensity"] = config.task_intensity
    parser.set_defaults(dict(_flat(facts)))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names; those that are one option stay whole."""
    for key, value in facts.items():
        if isinstance(value, dict) and prefix + key not in ("task_intensity", "preprocessing.intensity"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _with_preset_files(words: Sequence[str]) -> list[str]:
    """Put the file of a `--preset NAME` in its place, so that what comes after it wins; rename former flags.

    Of several presets, each of which says everything, the last one counts.
    """
    replaced: list[str] = []
    presets: list[int] = []
    for word in words:
        flag, equals, rest = word.partition("=")
        if (flag == "--preset" and equals) or (replaced and replaced[-1] == "--preset"):
            name = rest if equals else word
            replaced = replaced[: -1 if replaced[-1:] == ["--preset"] else None]
            presets.append(len(replaced))
            replaced.append(f"--config={preset_file(name)}")
        elif place := _FORMER.get(flag.removeprefix("--")):
            logger.warning("%s is now --%s.", flag, place)
            replaced.append(f"--{place}{equals}{rest}")
        else:
            replaced.append(word)
    return [word for place, word in enumerate(replaced) if place not in presets[:-1]]
