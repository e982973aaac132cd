"""The errors a user of anatomaly can cause.

Every message has one form: "`where`: what is wrong with which item, the value got, the value expected. What to do."
The command line prints it as one line and exits with 2; the service answers 4xx.  No message holds pixel data or
patient names.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, get_args, get_type_hints


class AnatomalyError(Exception):
    """Base of all errors that come from input rather than from a defect of this package."""


class ManifestError(AnatomalyError):
    """A data set table or folder is incomplete, contradictory or leaks between splits."""


class ReadError(AnatomalyError):
    """A file cannot be read as an image, or its pixels cannot be used."""


class ShapeError(AnatomalyError):
    """Two tensors, or an image and a model, do not fit each other."""


class WeightsError(AnatomalyError):
    """Weights are missing, of the wrong architecture, or not the ones they are said to be."""


class NotReadyError(AnatomalyError):
    """Something must be done first, such as giving the support images or installing an extra."""


class ConfigError(AnatomalyError):
    """A setting is unknown, out of range or contradicts another one."""


class OutputError(AnatomalyError):
    """A result cannot be written, for example because the disk is full."""


def check(where: str, value: object, valid: bool, expected: str) -> None:
    """Refuse a setting in one line.

    Raises:
        ConfigError: Unless `valid`.
    """
    if not valid:
        shown = str(value) if len(str(value)) <= _SHOWN else f"{str(value)[:_SHOWN]}..."
        raise ConfigError(" ".join(f"{where}: got {shown}, expected {expected}.".split()))  # in one line


#: Characters of a refused value that a message shows.
_SHOWN = 200


def check_words(settings: Any, where: str) -> None:
    """Hold the fields of a settings record that take one of a few words, true and false, or a number to these.

    Raises:
        ConfigError: A value is another one.
    """
    for name, kind in get_type_hints(type(settings)).items():
        words, value = get_args(kind), getattr(settings, name)
        if words and isinstance(words[0], str):
            check(f"{where}.{name}", value, value in words, f"one of {', '.join(words)}")
        elif kind is int:
            check(f"{where}.{name}", repr(value), type(value) is int, "a whole number")
        elif kind is bool:
            check(f"{where}.{name}", value, isinstance(value, bool), "true or false")
        elif kind in _NUMBERS:
            base, expected = _NUMBERS[kind]
            check(f"{where}.{name}", value, isinstance(value, base) and not isinstance(value, bool), expected)


_NUMBERS: dict[Any, tuple[type, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}
