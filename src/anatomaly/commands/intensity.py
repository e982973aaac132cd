"""The type of options that take an intensity rule: braces as ever, or words such as `brain` and `range:0..4095`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

#: What a word may be, for the help.
SPELLINGS = "such as brain, window:40/80, range:0..4095, percentile:1..99 or auto"


def intensity_argument(parser: ArgumentParser, text: str) -> None:
    """`--intensity`, which nothing has to be given for."""
    parser.add_argument("--intensity", type=intensity_type() | None, default=None, help=f"{text}, {SPELLINGS}.")


@lru_cache(maxsize=1)
def intensity_type() -> Any:
    """`types.Intensity`, or a text or mapping that stands for one; for jsonargparse, in flags and in YAML.

    Braces and nested flags are read as the record, what else there is by `data.windows.parse_intensity`.
    """
    from dataclasses import asdict

    from jsonargparse.typing import register_type

    from anatomaly.data.windows import parse_intensity
    from anatomaly.types import Intensity

    class IntensityWords:
        """Only a name for the second member of the union."""

    def read(value: Any) -> dict[str, Any]:  # which the union then takes for its first member
        if isinstance(value, dict) and {"centre", "center"}.intersection(value):
            rule = _of_window(**value)
        elif isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
            rule = parse_intensity(value)
        else:
            raise ValueError("no intensity rule")  # the record's own message is shown
        return asdict(rule)

    register_type(IntensityWords, serializer=repr, deserializer=read, type_check=lambda *_: False)
    return Intensity | IntensityWords


def _of_window(*, width: Any, centre: Any = None, center: Any = None, rule: str = "window") -> Any:
    """`{rule: window, centre: 40, width: 80}`, as windows are called everywhere else."""
    from anatomaly.types import Intensity

    if rule != "window":
        raise ValueError(f"centre and width are of a window, not of {rule}")
    return Intensity("window", float(centre if center is None else center), float(width))
