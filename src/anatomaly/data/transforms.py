"""The only preprocessing: intensity rule, resize to the network's input, and the way back for maps.

Training, prediction, service and export all pass through here, so what a model was trained on is what it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.contrast import NOTE, measure, spell_suggestion
from anatomaly.data.dicom import WINDOWLESS
from anatomaly.data.readers import read_sample
from anatomaly.errors import ConfigError, ReadError, ShapeError
from anatomaly.types import Image, Intensity, Preprocessing, Sample

_PIXELS_PER_IMAGE = 10_000
_POOLED_PIXELS = 20_000_000


class Prepared(NamedTuple):
    """One image on its way into a network.

    Attributes:
        input: (3, H, W) float32 in [0, 1] at the network's input size, grey repeated.
        display: (C, H0, W0) float32 in [0, 1] on the source grid.
        image: The image as read.
    """

    input: NDArray[np.float32]
    display: NDArray[np.float32]
    image: Image


def needs_voi(intensity: Intensity) -> bool:
    """Whether images for this rule are to be read with `apply_voi=True`: only "auto" trusts the file's own window."""
    return intensity.rule == "auto"


def load(sample: Sample, preprocessing: Preprocessing) -> Prepared:
    """Read one manifest row and prepare it; where hardly any contrast is left of it, `image.note` says so.

    Raises:
        ReadError: The file cannot be read, or declares no value range while the rule is "auto".
        ConfigError: The intensity rule is unresolved or empty.
    """
    image = read_sample(sample, apply_voi=needs_voi(preprocessing.intensity))
    prepared = preprocess(image, preprocessing)
    if image.note == WINDOWLESS or not measure(prepared.display).poor:
        return prepared
    return prepared._replace(image=replace(image, note="; ".join(filter(None, [image.note, NOTE]))))


def preprocess(image: Image, preprocessing: Preprocessing) -> Prepared:
    """Apply the intensity rule, then fit to the network's input size.

    Raises:
        ReadError: The rule is "auto" and the file declares no value range.
        ConfigError: The intensity rule is unresolved or empty.
    """
    display = apply_intensity(image, preprocessing.intensity)
    return Prepared(fit_to_input(display, preprocessing), display, image)


def apply_intensity(image: Image, intensity: Intensity) -> NDArray[np.float32]:
    """Map stored values to [0, 1], clip, then invert where the image says that low values are bright.

    "window" is linear from centre - width/2 to centre + width/2 (DICOM's LINEAR_EXACT).

    Args:
        image: As read; with `apply_voi=True` for "auto".
        intensity: The data set's rule; "percentile" must have been resolved.

    Returns:
        (C, H0, W0).

    Raises:
        ConfigError: "percentile" is unresolved, or the rule spans no values.
        ReadError: "auto", and the file declares no value range.
    """
    low, high = _limits(image, intensity)
    scaled: NDArray[np.float32] = image.pixels - np.float32(low)
    scaled /= np.float32(high - low)  # in place: a copy of a large image is a lot
    np.clip(scaled, 0.0, 1.0, out=scaled)
    return np.subtract(np.float32(1), scaled, out=scaled) if image.invert else scaled


def _limits(image: Image, intensity: Intensity) -> tuple[float, float]:
    """The stored values that become 0 and 1."""
    if intensity.rule == "percentile":
        raise ConfigError(
            f"intensity: percentile {intensity.low:g}, {intensity.high:g} is not resolved. "
            "Call transforms.resolve_intensity on the training images first."
        )
    if intensity.rule == "auto":
        if image.value_range is None:
            raise ReadError(
                f"{image.path}: the file declares no value range, intensity rule 'auto' needs one. Give --intensity "
                f"{spell_suggestion(image)} (in fit and benchmark: --preprocessing.intensity) or another rule."
            )
        return image.value_range
    if intensity.rule == "window":
        low, high = intensity.low - intensity.high / 2, intensity.low + intensity.high / 2
    else:
        low, high = intensity.low, intensity.high
    if not low < high:
        raise ConfigError(
            f"intensity: {intensity.rule} {intensity.low:g}, {intensity.high:g} spans no values. "
            "Give range as lowest, highest and window as centre, width > 0."
        )
    return low, high


def resolve_intensity(intensity: Intensity, images: Iterable[Image]) -> Intensity:
    """Turn "percentile" into a fixed "range" from the pooled pixels of training images; other rules pass unchanged.

    Every image counts alike: a fixed grid of at most 10,000 of its pixels enters the pool, which is thinned out evenly
    before it outgrows memory.  The result depends on nothing but the images.

    Args:
        intensity: The rule; `low` and `high` are percentiles in [0, 100] if it is "percentile".
        images: Training images, read with `apply_voi=False`; not touched for other rules.

    Raises:
        ConfigError: No images, percentiles out of order, or all pooled pixels between them are equal.
    """
    if intensity.rule != "percentile":
        return intensity
    if not 0 <= intensity.low < intensity.high <= 100:
        raise ConfigError(
            f"intensity: percentile is {intensity.low:g}, {intensity.high:g}, expected 0 <= lower < upper <= 100."
        )
    pool: list[NDArray[np.float32]] = []
    pooled, thinning = 0, 1
    for image in images:
        step = max(1, ceil(sqrt(image.size[0] * image.size[1] / _PIXELS_PER_IMAGE)))
        pool.append(image.pixels[:, ::step, ::step].ravel()[::thinning])
        pooled += pool[-1].size
        if pooled > _POOLED_PIXELS:
            pool = [np.concatenate([values[::2] for values in pool])]
            pooled, thinning = pool[0].size, thinning * 2
    if not pool:
        raise ConfigError("intensity: percentile needs at least one training image to be resolved, got none.")
    low, high = (float(value) for value in np.percentile(np.concatenate(pool), [intensity.low, intensity.high]))
    if not low < high:
        raise ConfigError(
            f"intensity: percentiles {intensity.low:g} and {intensity.high:g} of the training images are both {low:g}. "
            "Take percentiles further apart, or a range."
        )
    return replace(intensity, rule="range", low=low, high=high)


def fit_to_input(display: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Resize to the network's input, antialiased, clipped back to [0, 1] (Lanczos overshoots).

    Args:
        display: (C, H0, W0) in [0, 1], C in {1, 3}.
        preprocessing: Size, resize policy and filter.

    Returns:
        (3, H, W) in [0, 1]; grey is repeated, "pad" fills with 0 around the centred image.

    Note: differs from the official code of both papers, which resizes 8-bit pictures: Pillow then rounds to 1/255 and
        clips the overshoot between its horizontal and vertical pass.
    """
    top, left, height, width = _placement((display.shape[1], display.shape[2]), preprocessing)
    fitted = np.zeros((3, *preprocessing.size), np.float32)
    resized = [_resize(channel, (height, width), preprocessing.interpolation) for channel in display]
    fitted[:, top : top + height, left : left + width] = np.clip(resized, 0.0, 1.0)
    return fitted


def restore_map(
    anomaly_map: NDArray[np.float32], source_size: tuple[int, int], preprocessing: Preprocessing
) -> NDArray[np.float32]:
    """Bring a map back to the source grid: undo the padding, then resize bilinearly (averaging where it shrinks).

    Args:
        anomaly_map: (H, W) at the network's input size.
        source_size: (H0, W0).
        preprocessing: The one the input was prepared with.

    Returns:
        (H0, W0).

    Raises:
        ShapeError: The map is not of the input size.
    """
    if anomaly_map.shape != tuple(preprocessing.size):
        raise ShapeError(
            f"restore_map: the map is {anomaly_map.shape}, inputs are {tuple(preprocessing.size)}. "
            "Give the map at the network's input size."
        )
    top, left, height, width = _placement(source_size, preprocessing)
    return _resize(anomaly_map[top : top + height, left : left + width], source_size, "bilinear")


def mask_to_input(mask: NDArray[np.bool_], preprocessing: Preprocessing) -> NDArray[np.bool_]:
    """Bring a lesion mask to the network's input size, for pixel metrics at model resolution.

    A pixel is lesion where at least half of its area is, so the lesion's area is kept on average; a lesion smaller
    than half an input pixel disappears.  Padding is background.

    Args:
        mask: (H0, W0).
        preprocessing: The one the image is prepared with.

    Returns:
        (H, W).
    """
    top, left, height, width = _placement((mask.shape[0], mask.shape[1]), preprocessing)
    fitted = np.zeros(preprocessing.size, np.bool_)
    fitted[top : top + height, left : left + width] = _resize(mask.astype(np.float32), (height, width), "box") >= 0.5
    return fitted


def _placement(source_size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the image within the network's input."""
    height, width = preprocessing.size
    if preprocessing.resize == "squash":
        return 0, 0, height, width
    scale = min(height / source_size[0], width / source_size[1])
    inner_height = min(height, max(1, round(source_size[0] * scale)))
    inner_width = min(width, max(1, round(source_size[1] * scale)))
    return (height - inner_height) // 2, (width - inner_width) // 2, inner_height, inner_width


def _resize(plane: NDArray[np.float32], size: tuple[int, int], interpolation: str) -> NDArray[np.float32]:
    """Resize one (H, W) plane in float; Pillow widens the filter where it shrinks, which is the antialiasing."""
    from PIL import Image as Pillow

    resampling = Pillow.Resampling[interpolation.upper()]
    picture = Pillow.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(picture.resize((size[1], size[0]), resampling), np.float32)
