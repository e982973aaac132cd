"""A phantom patient before the picture is taken, and the cameras that take it.

Lesions are put into the tissue and pass through the same camera (exposure, contrast, bias field, blur, noise) as the
healthy rest, so neither noise nor sharpness tells an anomalous image from a normal one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from anatomaly.synthetic.shapes import Float, grid, smooth_noise, warp

Camera = Callable[[Float, np.random.Generator], Float]


@dataclass(frozen=True, slots=True)
class Scene:
    """One patient before the picture is taken.

    Attributes:
        tissue: (C, H, W) float32; the unit is the anatomy's own (gray tone, colour, stain density).
        regions: Name -> (H, W) float32: memberships in [0, 1], or coordinates where the name says so.
        expose: Takes the picture: (tissue, generator of the noise) -> pixels (1 or 3, H, W) float32 in [0, 1].
    """

    tissue: Float
    regions: Mapping[str, Float]
    expose: Camera


def gray_camera(rng: np.random.Generator, size: int, *, bias: float, noise: tuple[float, float]) -> Camera:
    """Draw a patient's gain, gamma, offset, blur, noise level and bias field; return the camera that applies them."""
    gain, gamma, offset = rng.uniform(0.72, 1.12), rng.uniform(0.75, 1.35), rng.uniform(-0.02, 0.06)
    grain, blur = float(rng.uniform(*noise)), rng.uniform(0.35, 0.75) * size / 128
    field = 1.0 + bias * rng.uniform(0.3, 1.0) * smooth_noise(rng, size, 1)

    def expose(tissue: Float, rng: np.random.Generator) -> Float:
        from scipy import ndimage

        sharp = gain * np.clip(tissue[0] * field, 0.0, None) ** gamma + offset
        grains = grain * rng.standard_normal((size, size), dtype=np.float32)
        pixels: Float = ndimage.gaussian_filter(sharp, blur, truncate=3.0) + grains
        return np.clip(pixels, 0.0, 1.0)[None]

    return expose


def colour_camera(rng: np.random.Generator, size: int, field: Float) -> Camera:
    """Fundus camera: light gradient, vignette, white balance, blur, noise; black outside the field of view."""
    y, x = grid(size)
    tilt_y, tilt_x, vignette = rng.normal(0, 0.15), rng.normal(0, 0.15), rng.uniform(0.0, 0.35)
    light = rng.uniform(0.75, 1.12) * (1.0 + tilt_y * y + tilt_x * x - vignette * (y**2 + x**2))
    balance = rng.normal(1.0, 0.06, 3)[:, None, None]
    gain = (balance * np.clip(light, 0.1, None) * field).astype(np.float32)
    blur, grain = rng.uniform(0.3, 0.7) * size / 128, rng.uniform(0.006, 0.02)

    def expose(tissue: Float, rng: np.random.Generator) -> Float:
        from scipy import ndimage

        sharp = ndimage.gaussian_filter(tissue * gain, (0, blur, blur), truncate=3.0)
        grains = grain * rng.standard_normal((3, size, size), dtype=np.float32)
        pixels: Float = sharp + grains * (0.2 + 0.8 * field)
        return np.clip(pixels, 0.0, 1.0)

    return expose


def stain_camera(rng: np.random.Generator, size: int) -> Camera:
    """Microscope: each stain absorbs light by Beer-Lambert with a patient's own stain colours and strengths."""
    purple = np.array([0.85, 1.15, 0.50]) * rng.normal(1.0, 0.08, 3) * rng.uniform(0.75, 1.25)
    pink = np.array([0.10, 0.85, 0.42]) * rng.normal(1.0, 0.10, 3) * rng.uniform(0.60, 1.25)
    colours = np.stack([purple, pink], axis=1).astype(np.float32)  # (3, 2)
    white, blur = rng.uniform(0.88, 0.98), rng.uniform(0.3, 0.7) * size / 128
    grain = rng.uniform(0.01, 0.03)

    def expose(tissue: Float, rng: np.random.Generator) -> Float:
        from scipy import ndimage

        densities = ndimage.gaussian_filter(np.clip(tissue, 0.0, None), (0, blur, blur), truncate=3.0)
        light = white * np.exp(-np.tensordot(colours, densities, axes=1))
        pixels: Float = light + grain * rng.standard_normal((3, size, size), dtype=np.float32)
        return np.clip(pixels, 0.0, 1.0)

    return expose


def neighbouring_slice(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same patient a little further: tissue and regions bend and shift by a few percent of the image.

    Args:
        scene: The first slice.
        rng: Source of the change.

    Returns:
        A scene with the same camera.
    """
    size = scene.tissue.shape[-1]
    y, x = grid(size)
    zoom, turn = rng.normal(0, 0.03), rng.normal(0, 0.03)
    dy = zoom * y + turn * x + rng.normal(0, 0.02) + 0.012 * smooth_noise(rng, size, 4)
    dx = zoom * x - turn * y + rng.normal(0, 0.02) + 0.012 * smooth_noise(rng, size, 4)
    names = list(scene.regions)
    moved = warp(np.concatenate([scene.tissue, np.stack([scene.regions[name] for name in names])]), dy, dx)
    channels = len(scene.tissue)
    return replace(scene, tissue=moved[:channels], regions=dict(zip(names, moved[channels:], strict=True)))
