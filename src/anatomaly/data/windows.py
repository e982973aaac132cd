"""Intensity rules as words: `brain`, `window:40/80`, `range:0..4095`, `percentile:1..99`, `auto`."""

from __future__ import annotations

import re
from difflib import get_close_matches

from anatomaly.errors import ConfigError
from anatomaly.types import Intensity

#: Usual CT windows as (centre, width) in Hounsfield units, after https://radiopaedia.org/articles/windowing-ct.
CT_WINDOWS = {
    "brain": (40.0, 80.0),
    "subdural": (80.0, 200.0),
    "stroke": (40.0, 40.0),
    "temporal-bone": (600.0, 2800.0),
    "bone": (400.0, 1800.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "soft-tissue": (50.0, 400.0),
    "liver": (30.0, 150.0),
}
_NUMBER = r"([-+]?(?:\d+\.?\d*?|\.\d+)(?:e[-+]?\d+)?)"
_SPELLINGS = {
    "window": re.compile(rf"window:{_NUMBER}/{_NUMBER}"),
    "range": re.compile(rf"range:{_NUMBER}\.\.{_NUMBER}"),
    "percentile": re.compile(rf"percentile:{_NUMBER}\.\.{_NUMBER}"),
}


def parse_intensity(text: str) -> Intensity:
    """Read a rule as it is typed; whether its numbers make sense is `config.check_intensity`'s to say.

    Args:
        text: A name of `CT_WINDOWS`, "auto", "window:CENTRE/WIDTH", "range:LOWEST..HIGHEST" or
            "percentile:LOWER..UPPER".

    Raises:
        ConfigError: It is none of these.

    Example:
        >>> parse_intensity("brain") == parse_intensity("window:40/80") == Intensity("window", 40.0, 80.0)
        True
    """
    word = text.strip().lower().replace("_", "-")
    if word == "auto":
        return Intensity()
    if word in CT_WINDOWS:
        return Intensity("window", *CT_WINDOWS[word])
    for rule, spelling in _SPELLINGS.items():
        if found := spelling.fullmatch(word):
            return Intensity(rule, float(found[1]), float(found[2]))  # type: ignore[arg-type]
    near = get_close_matches(word, CT_WINDOWS, n=1)
    raise ConfigError(
        f"intensity: got {' '.join(text.split())[:60]}, expected auto, window:40/80 (centre/width), range:0..4095, "
        f"percentile:1..99 or a CT window: {', '.join(CT_WINDOWS)}{f' (do you mean {near[0]}?)' if near else ''}"
    )


def spell_intensity(intensity: Intensity) -> str:
    """The reverse: the shortest text that `parse_intensity` reads as this rule.

    Example:
        >>> spell_intensity(Intensity("window", 40, 80)), spell_intensity(Intensity("range", 0, 4095))
        ('brain', 'range:0..4095')
    """
    if intensity.rule == "auto":
        return "auto"
    if name := ct_window_of(intensity):
        return name
    low, high = (f"{number:.10g}" for number in (intensity.low, intensity.high))
    return f"window:{low}/{high}" if intensity.rule == "window" else f"{intensity.rule}:{low}..{high}"


def ct_window_of(intensity: Intensity) -> str | None:
    """The name of a CT window, or None for any other rule."""
    both = intensity.low, intensity.high
    return next((name for name, window in CT_WINDOWS.items() if window == both and intensity.rule == "window"), None)
