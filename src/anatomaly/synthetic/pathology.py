"""The pathologies of the phantom benchmark: each one changes the tissue of a scene and says where.

Every function takes (scene, rng, severity): severity in [0, 1] sets size and contrast, 0 being subtle.  It returns the
changed tissue (C, H, W) and the lesion's opacity (H, W) in [0, 1]; the scene itself is left as it is.
"""

from __future__ import annotations

import numpy as np

from anatomaly.synthetic.scene import Scene
from anatomaly.synthetic.shapes import (
    Float,
    blob,
    grid,
    over,
    pick,
    ramp,
    smooth_noise,
    stamp,
    warp,
)

Lesion = tuple[Float, Float]


def _between(low: float, high: float, severity: float) -> float:
    """Interpolate from `low` (severity 0) to `high` (severity 1)."""
    return low + (high - low) * severity


def _push(tissue: Float, centre: tuple[float, float], radius: float, strength: float) -> tuple[Float, Float]:
    """Push tissue away from a centre, as a growing mass does; returns it and where it moved, in [0, 1]."""
    y, x = grid(tissue.shape[-1])
    dy, dx = y - centre[0], x - centre[1]
    distance = np.hypot(dy, dx) / radius
    fade = np.clip(1.0 - distance**2, 0.0, None) ** 2
    moved = warp(tissue, -strength * fade * dy, -strength * fade * dx)
    shift = fade * distance  # the centre itself does not move
    return moved, np.maximum(shift / shift.max(), fade * (distance < 0.5))


# --- brain MR and head CT ---


def glioma(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Infiltrating mass: enhancing rim, dark or isointense core, oedema that spreads through the white matter."""
    size, brain = scene.tissue.shape[-1], scene.regions["brain"]
    place, radius = pick(rng, scene.regions["deep"]), _between(0.08, 0.20, severity)
    outer = blob(rng, size, place, radius, ragged=0.15, soft=0.25) * brain
    inner = blob(rng, size, place, radius * 0.6, ragged=0.25, soft=0.4) * outer
    oedema = blob(rng, size, place, radius * rng.uniform(1.5, 2.0), ragged=0.35, soft=0.5) * scene.regions["white"]
    tone = float(np.median(scene.tissue[0][brain > 0.9]))
    tissue = over(scene.tissue, tone * rng.uniform(0.6, 0.75), 0.7 * oedema)
    tissue = over(tissue, tone * rng.uniform(1.2, 1.4) + 0.08 * smooth_noise(rng, size, 26), 0.9 * outer)
    tissue = over(tissue, tone * rng.uniform(0.3, 0.8), 0.9 * inner)
    return tissue, np.maximum(outer, 0.8 * oedema)


def metastases(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Two to five small round deposits, enhancing or dark, at random places in the brain."""
    size, count = scene.tissue.shape[-1], int(rng.integers(2, 6))
    places = np.array([pick(rng, scene.regions["deep"]) for _ in range(count)])
    radii = _between(0.035, 0.07, severity) * rng.uniform(0.7, 1.3, (count, 1)) * rng.uniform(0.85, 1.15, (count, 2))
    spots = stamp(size, places, radii, rng.uniform(0, 3.1, count)) * scene.regions["brain"]
    cores = stamp(size, places, radii * 0.45, 0.0, 0.8) * spots
    change = _between(0.22, 0.38, severity) * rng.choice([-1.0, 1.0])
    tissue = over(scene.tissue, scene.tissue + change, spots)
    return over(tissue, scene.tissue - 0.4 * change, cores), spots


def white_matter_patches(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Confluent dark patches beside the ventricles and scattered through the white matter (small-vessel disease)."""
    size = scene.tissue.shape[-1]
    near = ramp(smooth_noise(rng, size, 9) - _between(0.9, 0.1, severity), 0.3) * scene.regions["periventricular"]
    count = round(_between(3, 9, severity))
    places = np.array([pick(rng, scene.regions["white"]) for _ in range(count)])
    spots = stamp(size, places, rng.uniform(0.025, 0.055, (count, 2)), rng.uniform(0, 3.1, count))
    patches = np.maximum(near, spots * scene.regions["white"])
    return over(scene.tissue, scene.tissue * (1.0 - _between(0.35, 0.5, severity)), patches), patches


def mass_effect(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Isointense mass: nothing changes its tone, but folds and ventricles are pushed aside."""
    place = pick(rng, scene.regions["deep"])
    inside = scene.regions["brain"]
    moved, shift = _push(scene.tissue, place, _between(0.36, 0.52, severity), _between(0.7, 0.95, severity))
    return over(scene.tissue, moved, inside), shift * inside


def resection_cavity(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Fluid-filled hole near the surface of the brain with a thin bright scar."""
    size, brain = scene.tissue.shape[-1], scene.regions["brain"]
    place, radius = pick(rng, scene.regions["cortex"]), _between(0.09, 0.19, severity)
    hole = blob(rng, size, place, radius, ragged=0.2, soft=0.15) * brain
    rim = ramp(0.35 - np.abs(hole - 0.5), 0.3) * brain
    tissue = over(scene.tissue, rng.uniform(0.06, 0.18), hole)
    return over(tissue, 0.8, 0.5 * rim), hole


def haemorrhage(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Bright blood in the brain with a thin dark halo."""
    size, brain = scene.tissue.shape[-1], scene.regions["brain"]
    place, radius = pick(rng, scene.regions["deep"]), _between(0.06, 0.15, severity)
    blood = blob(rng, size, place, radius, ragged=0.25, soft=0.3) * brain
    halo = blob(rng, size, place, radius * 1.6, ragged=0.3, soft=0.6) * brain
    tissue = over(scene.tissue, scene.tissue - 0.10, 0.8 * halo)
    return over(tissue, scene.tissue + _between(0.14, 0.32, severity), blood), blood


def subdural(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Crescent of blood between skull and brain on one side: bright when fresh, dark when old."""
    depth = scene.regions["coordinate_depth"]
    back, across = scene.regions["coordinate_back"], scene.regions["coordinate_across"]
    turn = np.arctan2(back, across) - (rng.choice([0.0, np.pi]) + rng.normal(0, 0.4))
    turn = (turn + np.pi) % (2 * np.pi) - np.pi
    span = _between(0.8, 1.3, severity)
    thickness = _between(0.09, 0.20, severity) * np.clip(1.0 - (turn / span) ** 2, 0.0, None)
    crescent = ramp(thickness - depth, 0.03) * ramp(depth - 0.005, 0.02) * (thickness > 0.01)
    tone = float(np.median(scene.tissue[0][scene.regions["brain"] > 0.9]))
    tone += rng.choice([_between(0.14, 0.28, severity), -_between(0.14, 0.20, severity)])
    return over(scene.tissue, tone, 0.95 * crescent), crescent


def infarct(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Wedge of dark, structureless brain that reaches the surface."""
    size, brain = scene.tissue.shape[-1], scene.regions["brain"]
    place = pick(rng, scene.regions["cortex"])
    patch = blob(rng, size, place, _between(0.16, 0.32, severity), ragged=0.2, soft=0.35) * brain
    flat = float(np.median(scene.tissue[0][brain > 0.9])) - _between(0.09, 0.16, severity)
    return over(scene.tissue, np.minimum(scene.tissue, flat), patch), patch


def calcified_mass(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Slightly dense mass with coarse calcifications that pushes the brain aside."""
    size, brain = scene.tissue.shape[-1], scene.regions["brain"]
    place, radius = pick(rng, scene.regions["deep"]), _between(0.08, 0.16, severity)
    moved, _ = _push(scene.tissue, place, 2.2 * radius, 0.6)
    body = blob(rng, size, place, radius, ragged=0.15, soft=0.3) * brain
    grains = ramp(smooth_noise(rng, size, 30) - rng.uniform(1.0, 1.5), 0.4) * body
    tissue = over(over(scene.tissue, moved, brain), moved + 0.09, body)
    return over(tissue, 0.9, 0.8 * grains), body


# --- chest X-ray ---


def consolidation(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Patchy cloud in the lung that hides the vessels."""
    size = scene.tissue.shape[-1]
    place = pick(rng, scene.regions["lung_core"])
    cloud = blob(rng, size, place, _between(0.14, 0.27, severity), ragged=0.3, soft=0.8) * scene.regions["lung"]
    patchy = 1.0 + 0.15 * smooth_noise(rng, size, 14)
    return over(scene.tissue, 0.62 * patchy, _between(0.45, 0.75, severity) * cloud), cloud


def nodule(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """One to three round opacities in the lung."""
    size, count = scene.tissue.shape[-1], int(rng.integers(1, 4))
    opacity = np.zeros((size, size), dtype=np.float32)
    for _ in range(count):
        place, radius = pick(rng, scene.regions["lung_core"]), _between(0.045, 0.085, severity) * rng.uniform(0.8, 1.25)
        opacity = np.maximum(opacity, blob(rng, size, place, radius, ragged=0.06, soft=0.5))
    return over(scene.tissue, scene.tissue + _between(0.20, 0.34, severity), opacity), opacity


def effusion(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Fluid at the base of one lung: a white, curved upper edge that hides the diaphragm and its corner."""
    side = float(rng.choice([-1.0, 1.0]))
    across, above = side * scene.regions["coordinate_across"], scene.regions["coordinate_above_dome"]
    level = _between(0.12, 0.42, severity) + 0.5 * np.clip(across - 0.25, 0.0, None) ** 1.5
    fluid = ramp(level - above, 0.10) * scene.regions["thorax"] * (across > 0.1) * scene.regions["lung"]
    return over(scene.tissue, rng.uniform(0.70, 0.80), 0.9 * fluid), fluid


def pneumothorax(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Air around a collapsed lung: a black outer zone without vessels and a fine pleural line."""
    side = float(rng.choice([-1.0, 1.0]))
    across, rim = side * scene.regions["coordinate_across"], scene.regions["coordinate_rim"]
    lung = scene.regions["lung"] * ramp(across - 0.1, 0.05)
    outside = ramp(across - 0.25, 0.2)  # the lung stays attached at the hilum
    edge = _between(0.18, 0.55, severity) * outside + 0.12 * ramp(-scene.regions["coordinate_down"], 0.8)
    air = ramp(edge - rim, 0.05) * lung
    line = ramp(0.035 - np.abs(rim - edge - 0.02), 0.03) * lung
    lung_tone = float(np.percentile(scene.tissue[0][lung > 0.5], 10))
    tissue = over(scene.tissue, lung_tone - 0.08, 0.85 * air)
    return over(tissue, tissue + 0.25, line), air


# --- fundus ---


def retinal_haemorrhages(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Dark red dots, blots and flames scattered over the retina."""
    size, count = scene.tissue.shape[-1], round(_between(5, 18, severity))
    places = np.array([pick(rng, scene.regions["retina"]) for _ in range(count)])
    radii = rng.uniform(0.022, _between(0.045, 0.085, severity), (count, 1)) * rng.uniform(0.6, 1.4, (count, 2))
    spots = stamp(size, places, radii, rng.uniform(0, 3.1, count), rng.uniform(0.75, 1.0, count))
    spots *= scene.regions["field"]
    blood = scene.tissue * np.array([0.55, 0.22, 0.35], dtype=np.float32)[:, None, None]
    return over(scene.tissue, blood, spots), spots


def exudates(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Clusters of sharp, bright yellow lipid deposits."""
    size = scene.tissue.shape[-1]
    clusters = []
    for _ in range(round(_between(1, 3, severity))):
        count, centre = int(rng.integers(6, 16)), pick(rng, scene.regions["macular"])
        clusters.append(centre + rng.normal(0, rng.uniform(0.06, 0.12), (count, 2)))
    places = np.concatenate(clusters)
    radii = rng.uniform(0.016, _between(0.028, 0.045, severity), (len(places), 2))
    spots = stamp(size, places, radii, rng.uniform(0, 3.1, len(places)), rng.uniform(0.6, 1.0, len(places)))
    spots *= scene.regions["field"]
    return over(scene.tissue, np.array([0.98, 0.85, 0.45])[:, None, None], 0.85 * spots), spots


def drusen(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Many small, soft, pale spots around the macula."""
    size, count = scene.tissue.shape[-1], round(_between(18, 50, severity))
    places = np.array([pick(rng, scene.regions["macular"]) for _ in range(count)])
    radii = rng.uniform(0.02, 0.04, (count, 1)) * rng.uniform(0.85, 1.15, (count, 2))
    spots = stamp(size, places, radii, 0.0, rng.uniform(0.5, 1.0, count)) * (1.0 - scene.regions["vessels"])
    pale = scene.tissue * 0.5 + np.array([0.48, 0.36, 0.16], dtype=np.float32)[:, None, None]
    return over(scene.tissue, pale, _between(0.55, 0.85, severity) * spots), spots


def retinal_atrophy(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Sharply bounded patch of lost pigment through which pale choroid shows."""
    size = scene.tissue.shape[-1]
    place = pick(rng, scene.regions["retina"])
    patch = blob(rng, size, place, _between(0.10, 0.22, severity), ragged=0.3, soft=0.2) * scene.regions["field"]
    mottled = 1.0 + 0.12 * smooth_noise(rng, size, 24)
    pale = (scene.tissue * 0.7 + np.array([0.26, 0.24, 0.14], dtype=np.float32)[:, None, None]) * mottled
    dark = scene.tissue * np.array([0.62, 0.55, 0.6], dtype=np.float32)[:, None, None] * mottled
    tone = pale if rng.random() < 0.5 else dark
    return over(scene.tissue, tone, 0.9 * patch * (1.0 - scene.regions["vessels"])), patch


def enlarged_cup(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Glaucoma: the pale cup takes up most of the optic disc and the vessels bend over its edge."""
    radius, ratio = scene.regions["coordinate_disc_radius"], float(scene.regions["coordinate_cup_ratio"][0, 0])
    wide = _between(0.74, 0.92, severity) + rng.uniform(-0.03, 0.03)
    cup = ramp(wide - radius, 0.12)
    grown = cup * ramp(radius - ratio, 0.1)
    pale = np.array([0.98, 0.90, 0.70], dtype=np.float32)[:, None, None]
    tissue = over(scene.tissue, pale, 0.85 * cup * (1.0 - 0.5 * scene.regions["vessels"]))
    return tissue, grown


# --- histology ---


def tumour_nest(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Crowded, large, irregular nuclei that grow without forming glands."""
    size = scene.tissue.shape[-1]
    place, radius = pick(rng, scene.regions["stroma"]), _between(0.20, 0.42, severity)
    nest = blob(rng, size, place, radius, ragged=0.2, soft=0.15) * scene.regions["tissue"]
    count = round(_between(1.0, 1.3, severity) * 90 * (radius / 0.3) ** 2)
    places = _spread(rng, place, radius * 1.3, count)
    radii = rng.uniform(0.034, _between(0.046, 0.060, severity), (count, 1)) * rng.uniform(0.75, 1.3, (count, 2))
    nuclei = stamp(size, places, radii, rng.uniform(0, 3.1, count), rng.uniform(0.45, 0.8, count)) * (nest > 0.5)
    mottled = 0.72 + 0.2 * smooth_noise(rng, size, 48)
    haematoxylin = over(over(scene.tissue[0], 0.13, nest), mottled, nuclei)
    eosin = over(over(scene.tissue[1], 0.36, nest), 0.25, nuclei)
    return np.stack([haematoxylin, eosin]), nest


def necrosis(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Dead tissue: smudgy, granular pink without nuclei, some dust of broken ones."""
    size = scene.tissue.shape[-1]
    place = pick(rng, scene.regions["tissue"])
    patch = blob(rng, size, place, _between(0.24, 0.46, severity), ragged=0.25, soft=0.25) * scene.regions["tissue"]
    granular = 0.10 * smooth_noise(rng, size, 44) + 0.06 * smooth_noise(rng, size, 12)
    count = int(rng.integers(20, 60))
    dust = stamp(size, _spread(rng, place, 0.4, count), rng.uniform(0.008, 0.014, (count, 2)), 0.0, 0.8)
    haematoxylin = over(over(scene.tissue[0], 0.10, patch), 0.6, dust * patch)
    eosin = over(scene.tissue[1], _between(0.62, 0.80, severity) + granular, patch)
    return np.stack([haematoxylin, eosin]), patch


def lymphocytes(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Inflammation: a dense crowd of small, round, very dark nuclei in the stroma."""
    size = scene.tissue.shape[-1]
    place, radius = pick(rng, scene.regions["stroma"]), _between(0.20, 0.40, severity)
    crowd = blob(rng, size, place, radius, ragged=0.3, soft=0.4) * scene.regions["tissue"]
    count = round(_between(110, 190, severity) * (radius / 0.3) ** 2)
    places = _spread(rng, place, radius * 1.4, count)
    row, column = np.clip(((places.T + 1.0) * size / 2.0).astype(np.intp), 0, size - 1)
    places = places[crowd[row, column] > 0.4]
    cells = stamp(size, places, rng.uniform(0.018, 0.024, (len(places), 1)) * np.ones((1, 2)), 0.0, 0.9)
    return np.stack([over(scene.tissue[0], 0.95, cells), over(scene.tissue[1], 0.3, cells)]), crowd


def mucin(scene: Scene, rng: np.random.Generator, severity: float) -> Lesion:
    """Pool of pale, streaky mucus that has pushed the stroma away, with a few floating cells."""
    size = scene.tissue.shape[-1]
    place, radius = pick(rng, scene.regions["stroma"]), _between(0.18, 0.36, severity)
    pool = blob(rng, size, place, radius, ragged=0.25, soft=0.12)
    streaks = np.abs(smooth_noise(rng, size, (8, 26))) * 0.12
    count = int(rng.integers(4, 14))
    cells = stamp(size, _spread(rng, place, radius, count), rng.uniform(0.03, 0.05, (count, 2)), 0.0, 0.9) * pool
    haematoxylin = over(over(scene.tissue[0], 0.16 + streaks, pool), 0.7, cells)
    return np.stack([haematoxylin, over(scene.tissue[1], 0.08 + 0.5 * streaks, pool)]), pool


def _spread(rng: np.random.Generator, centre: tuple[float, float], radius: float, count: int) -> Float:
    """Places (count, 2) spread evenly, with jitter, over a disc: a sunflower, so cells crowd but seldom overlap."""
    order = np.arange(count) + rng.uniform(0.2, 0.8, count)
    reach, turn = radius * np.sqrt(order / count), 2.39996 * np.arange(count) + rng.uniform(0, 6.3)
    spiral = np.stack([reach * np.sin(turn), reach * np.cos(turn)], axis=1)
    places: Float = np.asarray(centre) + spiral + rng.normal(0, 0.15 * radius / np.sqrt(count), (count, 2))
    return places
