"""Pictures of an answer: the image, its map on the session's colour scale, and the one over the other."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from anatomaly.results.pictures import as_rgb, encode_picture, overlay, render_map, thumbnail

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from anatomaly.data.transforms import Prepared
    from anatomaly.service.records import Picture
    from anatomaly.types import Prediction, SupportBank


def painted(prediction: Prediction, bank: SupportBank, kind: Picture, side: int | None = None) -> NDArray[np.uint8]:
    """One picture of a verdict.

    Args:
        prediction: One without an error.
        bank: The normals, whose colour scale is that of all maps.
        kind: "image" is the image as judged, "map" its map in colours, "overlay" the map over the image in grey.
        side: Pixels of the longest side at most; None for the file's own grid.

    Returns:
        (H, W, 3) RGB.
    """
    image, heat = prediction.image, prediction.anomaly_map
    assert image is not None and heat is not None
    if kind == "map":
        pixels = render_map(heat, bank.map_range)
    elif kind == "overlay":
        pixels = overlay(image, heat, bank.map_range)
    else:
        pixels = as_rgb(image)
    return pixels if side is None else _fitted(pixels, side)


def thumbnail_png(prepared: Prepared) -> str:
    """A normal image as base64 of a PNG, its longest side at most 256 pixels."""
    return base64_png(as_rgb(thumbnail(prepared.display, prepared.image.spacing)))


def base64_png(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3) RGB as base64 of a PNG."""
    return base64.b64encode(encode_picture(pixels, kind="PNG")).decode("ascii")


def _fitted(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.BILINEAR)
    return np.asarray(picture)
