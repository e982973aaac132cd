"""Whether support images still show something after their intensity rule, and which rule would mend it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from statistics import median
from typing import NamedTuple

from anatomaly.data.contrast import LEAST_USED, Contrast, measure, suggest
from anatomaly.data.readers import read_sample
from anatomaly.data.transforms import Prepared, apply_intensity, load
from anatomaly.data.windows import CT_WINDOWS, ct_window_of, spell_intensity
from anatomaly.errors import AnatomalyError, ConfigError, ReadError
from anatomaly.types import Image, Intensity, Preprocessing, Sample

logger = logging.getLogger(__name__)

_A_FEW = 8  # images that a suggestion rests on
_said: set[tuple[str, str, str]] = set()  # (task, rule, what to do): many draws of supports say it once


class Glance(NamedTuple):
    """What is kept of a prepared image.

    Attributes:
        contrast: Of the image after the rule.
        modality: As in `Image`.
        value_range: As in `Image`.
    """

    contrast: Contrast
    modality: str | None
    value_range: tuple[float, float] | None


class Fault(NamedTuple):
    """Why images make poor supports.

    Attributes:
        line: One line: what is wrong, and the rule to give.
        blank: Whether nothing at all is to be seen.
    """

    line: str
    blank: bool = False


def glance(prepared: Prepared) -> Glance:
    """Keep what `find_fault` needs of an image."""
    return Glance(measure(prepared.display), prepared.image.modality, prepared.image.value_range)


def tell_supports(samples: Sequence[Sample], glances: Sequence[Glance], rule: Intensity) -> None:
    """Warn in one line where supports show next to nothing after their rule, once for each task, rule and remedy.

    Args:
        samples: The supports, at least one.
        glances: One of each.
        rule: The resolved rule they were prepared with.

    Raises:
        ConfigError: Every one is a constant.
    """
    fault = find_fault(samples, glances, rule)
    if fault is None:
        return
    if fault.blank:
        raise ConfigError(f"support: {fault.line}")
    key = samples[0].task, spell_intensity(rule), fault.line.partition(". ")[2]
    if key not in _said:
        _said.add(key)
        logger.warning("support: %s", fault.line)


def tell_training(samples: Sequence[Sample], preprocessing: Preprocessing, flag: str) -> None:
    """The same of a task's training images, of which a few are looked at; nothing is refused.

    Args:
        samples: The images of one task, at least one.
        preprocessing: With the task's resolved rule.
        flag: As in `find_fault`.
    """
    looked: list[Sample] = []
    glances: list[Glance] = []
    for sample in _spread(samples):
        with suppress(AnatomalyError):  # told where the image is needed
            glances.append(glance(load(sample, preprocessing)))
            looked.append(sample)
    if looked and (fault := find_fault(looked, glances, preprocessing.intensity, flag=flag)):
        logger.warning("%s: %s", samples[0].task, fault.line)


def find_fault(
    samples: Sequence[Sample], glances: Sequence[Glance], rule: Intensity, *, flag: str = "--intensity RULE"
) -> Fault | None:
    """What is wrong with images of one task after their intensity rule, or None.

    Args:
        samples: The images, at least one.
        glances: One of each.
        rule: The resolved rule they were prepared with.
        flag: How the command in use is given a rule; RULE stands for it.
    """
    used, levels = (median(each.contrast[number] for each in glances) for number in (0, 1))
    blank = all(each.contrast.blank for each in glances)
    name, windowless = spell_intensity(rule), rule.rule == "auto" and any(map(_windowless_ct, glances))
    if blank:
        what = f"intensity {name} leaves one value for all pixels of all {len(glances)} images"
    elif ct_window_of(rule) and (found := _no_ct(glances)):
        what = f"intensity {name} is a window for CT in Hounsfield units, these images are {found}"
    elif windowless:
        what = "these CT files name no window, so intensity auto spreads all that they can hold over the input range"
    elif used < LEAST_USED:
        what = f"after intensity {name} the images use {100 * used:.0f} % of the input range"
    elif Contrast(used, levels, blank=False).poor:
        what = f"after intensity {name} the images show about {levels:.0f} of 256 grey levels"
    else:
        return None
    return Fault(f"{what}. {_remedy(samples, rule, flag)}", blank)


def _remedy(samples: Sequence[Sample], rule: Intensity, flag: str) -> str:
    """What to do: the rule that the files' own values ask for, if it shows more than the one there is."""
    images = list(_readable(_spread(samples)))
    better = suggest(images) if images else None
    if better is None:
        return "The files hold nothing else: give others, or export them again."
    if better == rule or median(measure(apply_intensity(image, better)).levels for image in images) < 2:
        return "The files hold no more: export them again with their full range of values."
    given = flag.replace("RULE", spell_intensity(better))
    if name := ct_window_of(better):
        others = ", ".join(each for each in CT_WINDOWS if each != name)
        return f"Give {given} for a head, or the window of another part: {others}."
    return f"Give {given}, the values these files use."


def _spread(samples: Sequence[Sample]) -> Sequence[Sample]:
    """A few of the images, evenly spread."""
    return samples[:: max(1, len(samples) // _A_FEW)][:_A_FEW]


def _readable(samples: Iterable[Sample]) -> Iterator[Image]:
    for sample in samples:
        with suppress(ReadError):
            yield read_sample(sample)


def _windowless_ct(image: Glance) -> bool:
    """A CT image in Hounsfield units that no window of its own was applied to."""
    return image.modality == "CT" and image.value_range is not None and image.value_range[0] < 0


def _no_ct(glances: Sequence[Glance]) -> str | None:
    """What images are that cannot be CT in Hounsfield units, or None."""
    for _, modality, value_range in glances:
        if modality not in (None, "CT", "OT", "SC"):
            return f"of modality {modality}"
        if modality != "CT" and value_range is not None and value_range[0] >= 0:
            return f"stored as {value_range[0]:g} to {value_range[1]:g}"
    return None
