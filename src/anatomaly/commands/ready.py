"""A model with what it is given to compare with, as the options of a command say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anatomaly.commands.arguments import check_takes_support, load_detector, manifest_of, support_rows
from anatomaly.commands.support import warn_of_odd
from anatomaly.commands.volumes import check_bank, near, shown, support_slices

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import Namespace
    from numpy.typing import NDArray

    from anatomaly.detector.detector import Detector


def ready_detector(options: Namespace, verb: str) -> tuple[Detector, list[NDArray[np.float32]]]:
    """The model with its support as `support_arguments` say, and the supports as displayed, where they were read.

    Raises:
        ConfigError: Options of a support do not go with the model or with each other.
    """
    from anatomaly.data.transforms import load

    supports = _supports(options)
    detector: Detector = load_detector(options)
    check_takes_support(options, verb, detector)
    pictures = []
    if options.bank is not None:
        detector.load_support(options.bank)
        check_bank(options, detector)
    elif options.support is None:
        detector.set_task(options.task, intensity=options.intensity)
    else:
        detector.set_support(supports, task=options.task, intensity=options.intensity, near=near(options))
        pictures = [load(row, detector.ready().preprocessing).display for row in shown(supports, options)]
    if options.axis is None:  # slices of one volume differ by far
        warn_of_odd(detector.ready())
    if options.save_bank is not None:
        detector.save_support(options.save_bank)
    return detector, pictures


def _supports(options: Namespace) -> Any:
    """The rows of the support; none where there are no such options."""
    if options.support is None:
        return []
    if options.axis is None:
        return support_rows(options.support, options.task, options.shots)
    return support_slices(manifest_of(options.support, options.task), options)
