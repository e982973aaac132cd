"""The errors a user of anatomaly can cause.

Every message has one form: "`where`: what is wrong with which item, the value got, the value expected. What to do."
The command line prints it as one line and exits with 2; the service answers 4xx.  No message holds pixel data or
patient names.
"""


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
