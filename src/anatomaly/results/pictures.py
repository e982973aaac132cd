"""Colour anomaly maps on one fixed scale, and turn pixels into picture files.

The colour scale belongs to the run, not to the image: stretching every map to its own minimum and maximum would paint
normal images red.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.decoding import usable_spacing

# Nine anchors of the "inferno" colour map (van der Walt and Smith, CC0): its lightness rises evenly from black to pale
# yellow, so that equal steps of the map look like equal steps and grey-scale printing keeps the order.
_ANCHORS = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
    (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
)  # fmt: skip
_STEPS = np.arange(256) / 255 * (len(_ANCHORS) - 1)
_CHANNELS = [np.interp(_STEPS, range(len(_ANCHORS)), channel) for channel in zip(*_ANCHORS, strict=True)]
_COLOURS = np.rint(np.stack(_CHANNELS, axis=1)).astype(np.uint8)  # (256, 3)
_NO_VALUE = np.uint8(128)
_STRIP = 2**20  # pixels that are coloured at a time
_THUMBNAIL = 256  # longest side in pixels
_LAYER_STEPS = 63  # of colour and clearness in a page's map: as even to the eye as 255, and a third of the bytes
_OVERLAY_STRENGTH = 0.75  # below 1, so that anatomy shows through the brightest spot


def _on_scale(anomaly_map: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.floating[Any]]:
    """Map values as positions on the colour scale: (H, W) in [0, 1], NaN where the map has no value."""
    low, high = checked_scale(scale)
    if anomaly_map.ndim != 2:
        raise ValueError(f"anomaly map: has shape {anomaly_map.shape}, expected (H, W).")
    values = np.asarray(anomaly_map, dtype=np.result_type(anomaly_map, np.float32))
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def checked_scale(scale: tuple[float, float]) -> tuple[float, float]:
    """(low, high) as it is; a ValueError unless both are finite and low < high."""
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"colour scale: got ({low}, {high}), expected two finite numbers, low < high.")
    return low, high


def render_map(anomaly_map: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.uint8]:
    """Colour an anomaly map: dark at the low end of the scale, pale yellow at the high end.

    Args:
        anomaly_map: (H, W) in map units.
        scale: (low, high) in map units, the same for all images of a run; values outside take the end colours.

    Returns:
        (H, W, 3) RGB; mid-grey where the map is NaN.

    Raises:
        ValueError: The map is not two-dimensional, or not low < high.
    """
    from PIL import Image

    position = _on_scale(anomaly_map, scale)
    known = np.isfinite(position)
    picture = Image.fromarray(np.rint(np.where(known, position, 0.0) * 255).astype(np.uint8))
    picture.putpalette(_COLOURS.tobytes())
    colours = np.array(picture.convert("RGB"))
    colours[~known] = _NO_VALUE
    return colours


def overlay(image: NDArray[Any], anomaly_map: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.uint8]:
    """Lay the coloured map over the image in grey; the less anomalous a pixel, the more of the image shows.

    Args:
        image: (C, H, W) in [0, 1], C in {1, 3}.
        anomaly_map: (H, W) in map units.
        scale: (low, high) in map units, the same for all images of a run.

    Returns:
        (H, W, 3) RGB; the plain grey image wherever the map is at or below `low` or is NaN.

    Raises:
        ValueError: The shapes do not fit, or not low < high.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.shape[1:] != anomaly_map.shape:
        raise ValueError(
            f"overlay: the image is {image.shape} and the map {anomaly_map.shape}; "
            "expected (C, H, W) with C 1 or 3, and (H, W) of the same size."
        )
    height, width = anomaly_map.shape
    rows = max(1, _STRIP // max(1, width))  # in strips, for the numbers in between are many times the picture
    strips = [slice(start, start + rows) for start in range(0, max(1, height), rows)]
    return np.concatenate([_blend(image[:, strip], anomaly_map[strip], scale) for strip in strips])


def _blend(image: NDArray[Any], anomaly_map: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.uint8]:
    """`overlay` of a strip."""
    from PIL import Image

    luma = (0.299, 0.587, 0.114) if len(image) == 3 else (1.0,)  # no matrix product: its threads would wait spinning
    grey = np.clip(np.nan_to_num(sum(part * channel for part, channel in zip(luma, image, strict=True))), 0.0, 1.0)
    share = _OVERLAY_STRENGTH * np.nan_to_num(_on_scale(anomaly_map, scale))
    below, mask = (Image.fromarray(np.rint(each * 255).astype(np.uint8)) for each in (grey, share))
    return np.asarray(Image.composite(Image.fromarray(render_map(anomaly_map, scale)), below.convert("RGB"), mask))


def as_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    """(C, H, W) as displayed, in [0, 1], as (H, W, 3) RGB; what is no number is black."""
    return np.broadcast_to(np.atleast_3d(as_shown(image)), (*image.shape[1:], 3))


def as_shown(image: NDArray[Any]) -> NDArray[np.uint8]:
    """(C, H, W) as displayed, in [0, 1], as (H, W) grey or (H, W, 3) RGB; what is no number is black."""
    pixels = np.rint(np.clip(np.nan_to_num(image), 0.0, 1.0) * 255).astype(np.uint8)
    return pixels[0] if len(image) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def encode_picture(pixels: NDArray[np.uint8], *, kind: str) -> bytes:
    """The bytes of a picture file.

    Args:
        pixels: (H, W, 3) RGB, or (H, W) grey.
        kind: "PNG" (lossless) or "JPEG" (small, for thumbnails).
    """
    from PIL import Image

    buffer = io.BytesIO()
    png = {"compress_level": 1}  # of a scan's overlay smaller than PNG's usual 6, in a quarter of the time
    settings = {"quality": 80, "subsampling": 2} if kind == "JPEG" else png
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **settings)
    return buffer.getvalue()


def encode_layer(anomaly_map: NDArray[Any], scale: tuple[float, float]) -> bytes:
    """The bytes of a PNG to lay over an image: the higher on the scale, the less of the image shows through.

    Args:
        anomaly_map: (H, W) in map units.
        scale: (low, high) in map units; clear at `low` or below and where the map is NaN, solid from `high` on.
    """
    from PIL import Image

    steps = np.rint(np.nan_to_num(_on_scale(anomaly_map, scale)) * _LAYER_STEPS).astype(np.uint8)
    shades = np.rint(np.arange(_LAYER_STEPS + 1) * (255 / _LAYER_STEPS)).astype(np.uint8)
    picture = Image.fromarray(steps)
    picture.putpalette(_COLOURS[shades].tobytes())  # which makes it one of numbered colours
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=shades.tobytes(), compress_level=4)
    return buffer.getvalue()


def thumbnail(
    image: NDArray[Any], spacing: tuple[float, float] | None, longest: int = _THUMBNAIL
) -> NDArray[np.float32]:
    """(C, H, W) with its longest side at most `longest` pixels, and square pixels where a usable spacing is known."""
    from PIL import Image

    if not image.size:
        raise ValueError(f"thumbnail: the image is {image.shape}, expected at least one pixel.")
    sizes = np.array(image.shape[1:]) * np.array((spacing and usable_spacing(*spacing)) or (1.0, 1.0))
    sizes *= min(longest, max(image.shape[1:])) / sizes.max()
    height, width = (max(1, round(float(size))) for size in sizes)
    channels: Iterable[Any] = (np.ascontiguousarray(channel, dtype=np.float32) for channel in image)
    resized = [Image.fromarray(each).resize((width, height), Image.Resampling.BILINEAR) for each in channels]
    return np.stack([np.asarray(each, dtype=np.float32) for each in resized])
