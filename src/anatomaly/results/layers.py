"""The layers of a case's picture: the image, the coloured map over it, and contours over both."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.results.contours import contour_path
from anatomaly.results.pictures import as_shown, encode_layer, encode_picture, thumbnail
from anatomaly.tables import escaped
from anatomaly.types import Prediction

LONGEST = 384  # of a case's picture, in pixels
_LONGEST_MAP = 256
_LONGEST_CONTOUR = 128
_BOX = 1000  # units of the longer side of the contours' view box
TOP_SHARE = 0.05  # of the image's own map values, within the solid contour
THUMBNAIL = 64


def shrink(prediction: Prediction) -> Prediction:
    """The same prediction with picture and map at the page's size, for callers that collect many."""
    if prediction.image is None or prediction.anomaly_map is None:
        return prediction
    image, anomaly_map = _small(prediction)
    return replace(prediction, image=image, anomaly_map=anomaly_map, spacing=None)


def _small(prediction: Prediction) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Image and map at the page's size; None for what is absent or cannot be shown, which must not cost the page."""
    image, anomaly_map = prediction.image, prediction.anomaly_map
    small = small_map = None
    with contextlib.suppress(Exception):  # numpy's and Pillow's many ways to refuse an odd array
        if image is not None and image.shape[0] in (1, 3):
            small = thumbnail(image, prediction.spacing, LONGEST)
    with contextlib.suppress(Exception):
        fits = image is None or anomaly_map is None or image.shape[1:] == anomaly_map.shape
        if anomaly_map is not None and fits:
            small_map = thumbnail(anomaly_map[None], prediction.spacing, LONGEST)[0]
    return small, small_map


def layered(prediction: Prediction, scale: tuple[float, float], key: str) -> str:
    """The picture of a case, as HTML.

    Args:
        prediction: With image and map, as far as they were kept.
        scale: (low, high) in map units.
        key: A word no other case of the page has.
    """
    name = escaped(prediction.sample.name)
    image, anomaly_map = _small(prediction)
    layers, peak, shape = "", "50 50", (1, 1)
    with contextlib.suppress(Exception):  # an odd array costs its layer, not the page
        if image is not None:
            layers += f'<img class="base" src="{jpeg_uri(image)}" alt="Image of {name}" decoding="async">'
            shape = image.shape[1:]
    with contextlib.suppress(Exception):
        if anomaly_map is not None:
            colours = thumbnail(anomaly_map[None], None, _LONGEST_MAP)[0]
            uri = _uri(encode_layer(colours, scale), "png")
            over = f'<img class="map" src="{uri}" alt="Map of {name}, laid over the image" decoding="async">'
            layers += over + _contours(anomaly_map, scale, key)
            peak, shape = _peak(anomaly_map), anomaly_map.shape
    if not layers:
        return '<div class="absent">picture not kept</div>'
    note = "" if 'class="map"' in layers else "<p>map not kept</p>"
    note = note if 'class="base"' in layers else "<p>image not kept</p>"
    ratio = f"{shape[1] / shape[0]:.4f}"
    return f'<div class="view" style="--r:{ratio}" data-peak="{peak}"><div class="stack">{layers}</div></div>{note}'


def _contours(anomaly_map: NDArray[np.float32], scale: tuple[float, float], key: str) -> str:
    """Both lines as SVG: each a dark halo and a light line, so that it stands out from dark and bright."""
    small = thumbnail(anomaly_map[None], None, _LONGEST_CONTOUR)[0]
    known = small[np.isfinite(small)]
    if not known.size:
        return ""
    longest = max(anomaly_map.shape)
    height, width = (max(1, round(_BOX * side / longest)) for side in anomaly_map.shape)
    levels = {"top": float(np.quantile(known, 1 - TOP_SHARE)), "high": scale[1]}
    paths = {kind: contour_path(small, level, (height, width)) for kind, level in levels.items()}
    drawn = "".join(
        f'<g class="{kind}"><path id="{kind}-{key}" d="{path}"/><use href="#{kind}-{key}"/></g>'
        for kind, path in paths.items()
        if path
    )
    return (
        f'<svg class="lines" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'
    )


def _peak(anomaly_map: NDArray[np.float32]) -> str:
    """Where the map is highest, as "x y" in percent."""
    row, column = np.unravel_index(np.argmax(np.nan_to_num(anomaly_map, nan=-np.inf)), anomaly_map.shape)
    height, width = anomaly_map.shape
    return f"{100 * (int(column) + 0.5) / width:.0f} {100 * (int(row) + 0.5) / height:.0f}"


def jpeg_uri(image: NDArray[Any], longest: int = LONGEST) -> str:
    """(C, H, W) in [0, 1] as the address of a small picture that holds it whole."""
    return _uri(encode_picture(as_shown(thumbnail(image, None, longest)), kind="JPEG"), "jpeg")


def small_uri(prediction: Prediction) -> str:
    """The picture of a case's line in the list, or empty."""
    with contextlib.suppress(Exception):
        image, _ = _small(prediction)
        return "" if image is None else jpeg_uri(image, THUMBNAIL)
    return ""


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3) RGB as the address of a lossless picture that holds it whole."""
    return _uri(encode_picture(pixels, kind="PNG"), "png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
