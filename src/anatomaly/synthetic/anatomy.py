"""The five normal anatomies of the phantom benchmark.

An anatomy function draws one patient: the tissue, named regions that pathologies grow in, and the camera.  The numbers
are tones and proportions chosen by eye; every `rng` call is natural variation between patients.
"""

from __future__ import annotations

import numpy as np

from anatomaly.synthetic.scene import Scene, colour_camera, gray_camera, stain_camera
from anatomaly.synthetic.shapes import Float, grid, over, radius_from, ramp, smooth_noise, stamp, strokes


def _head(rng: np.random.Generator, size: int) -> tuple[Float, Float, Float]:
    """Pose and outline of a head: coordinates (v front to back, u across) in units of its radii, and the radius."""
    y, x = grid(size)
    angle, dy, dx = rng.normal(0, 0.1), rng.normal(0, 0.04), rng.normal(0, 0.04)
    v = (np.cos(angle) * (y - dy) - np.sin(angle) * (x - dx)) / rng.uniform(0.80, 0.93)
    u = (np.sin(angle) * (y - dy) + np.cos(angle) * (x - dx)) / rng.uniform(0.64, 0.78)
    v, u = v.astype(np.float32), u.astype(np.float32)
    turn = np.arctan2(v, u)
    bumps = [
        np.float32(rng.normal(0, 0.02 / k)) * np.cos(k * turn + np.float32(rng.uniform(0, 6.3))) for k in (2, 3, 4)
    ]
    egg = 1.0 - np.float32(rng.uniform(0.0, 0.05)) * np.sin(turn)
    return v, u, (np.hypot(u, v) * egg + np.sum(bumps, axis=0)).astype(np.float32)


def _ventricles(rng: np.random.Generator, v: Float, u: Float, level: float) -> Float:
    """Opacity of the lateral ventricles (front and back horns) and the third ventricle at a slice level in [0, 1]."""
    wide = rng.uniform(0.75, 1.5) * np.clip((1.05 - level) * 1.6, 0.0, 1.0)
    if wide < 0.3:
        return np.zeros_like(v)
    shapes = []
    for side in (-1.0, 1.0):
        w = wide * rng.uniform(0.85, 1.15)
        tilt = side * rng.uniform(0.15, 0.4)
        shapes.append(radius_from(v, u, (-0.22, side * (0.06 + 0.06 * w)), (0.24, 0.07 * w), tilt))
        shapes.append(radius_from(v, u, (0.20, side * (0.10 + 0.08 * w)), (0.22, 0.06 * w), -tilt * 1.3))
    shapes.append(radius_from(v, u, (0.03, 0.0), (0.16, 0.03 * w)))
    return ramp(1.0 - np.minimum.reduce(shapes), 0.35)


def brain_mr(rng: np.random.Generator, size: int) -> Scene:
    """Axial T1-like brain slice: scalp, skull, folded cortex, white matter, deep nuclei, ventricles."""
    v, u, r = _head(rng, size)
    level = rng.uniform(0.0, 1.0)
    white_tone = rng.uniform(0.62, 0.80)
    gray_tone = white_tone - rng.uniform(0.14, 0.24)
    csf_tone = rng.uniform(0.08, 0.18)
    folds, depth = smooth_noise(rng, size, 15), 0.84 - r
    texture = smooth_noise(rng, size, 24)

    tissue = over(0.02 + 0.0 * r, rng.uniform(0.6, 0.95) + 0.05 * texture, ramp(1.0 - r, 0.03))
    tissue = over(tissue, rng.uniform(0.08, 0.2), ramp(rng.uniform(0.93, 0.96) - r, 0.03))
    tissue = over(tissue, csf_tone, ramp(0.87 - r, 0.03))
    brain = ramp(depth, 0.03)
    tissue = over(tissue, gray_tone + 0.015 * texture, brain)
    reach = rng.uniform(0.24, 0.32)
    white = ramp(depth - reach + 0.20 * np.minimum(np.abs(folds), 1.3), 0.06)
    white *= 1.0 - ramp(0.06 - np.abs(u), 0.05) * ramp(np.abs(v) - 0.35, 0.1)
    sulci = np.exp(-((folds / 0.22) ** 2)) * ramp(rng.uniform(0.18, 0.30) - depth, 0.1) * brain
    fissure = ramp(0.018 - np.abs(u + 0.01 * folds), 0.03) * ramp(np.abs(v) - rng.uniform(0.3, 0.5) * (1 - level), 0.1)
    tissue = over(tissue, white_tone + 0.02 * texture, white)
    tissue = over(tissue, csf_tone, np.maximum(sulci, fissure * brain))
    if level < 0.75:
        for side in (-1.0, 1.0):
            nucleus = ramp(1.0 - radius_from(v, u, (-0.05, side * 0.30), (0.22, 0.10), side * 0.35), 0.3)
            thalamus = ramp(1.0 - radius_from(v, u, (0.10, side * 0.13), (0.14, 0.09), side * 0.2), 0.3)
            tissue = over(tissue, gray_tone + 0.05, 0.8 * np.maximum(nucleus, thalamus))
    ventricles = _ventricles(rng, v, u, level)
    tissue = over(tissue, csf_tone, ventricles)
    regions = {
        "brain": brain,
        "deep": ramp(depth - 0.15, 0.02) * (1 - ventricles),
        "white": white * (1 - ventricles),
        "cortex": ramp(depth - 0.03, 0.02) * ramp(0.22 - depth, 0.02),
        "periventricular": ramp(0.45 - np.hypot(u, v * 0.8), 0.1) * white * (1 - ventricles),
        "coordinate_radius": r,
        "coordinate_across": u,
    }
    return Scene(tissue[None], regions, gray_camera(rng, size, bias=0.14, noise=(0.012, 0.04)))


def head_ct(rng: np.random.Generator, size: int) -> Scene:
    """Axial head CT in a brain window: white skull, dark CSF, brain of little contrast, calcified specks."""
    v, u, r = _head(rng, size)
    level = rng.uniform(0.0, 1.0)
    brain_tone = rng.uniform(0.38, 0.54)
    contrast, csf_tone = rng.uniform(0.03, 0.07), brain_tone - rng.uniform(0.14, 0.24)
    folds, texture = smooth_noise(rng, size, 10), smooth_noise(rng, size, 16)
    inner = rng.uniform(0.84, 0.90)
    depth = inner - 0.015 - r

    tissue = over(np.zeros((size, size), np.float32), rng.uniform(0.25, 0.45), ramp(1.0 - r, 0.03))
    tissue = over(tissue, rng.uniform(0.95, 1.1), ramp(rng.uniform(0.955, 0.98) - r, 0.02))
    tissue = over(tissue, csf_tone, ramp(inner - r, 0.02))
    brain = ramp(depth, 0.03)
    white = ramp(depth - 0.20 + 0.12 * np.minimum(np.abs(folds), 1.3), 0.10)
    tissue = over(tissue, brain_tone + 0.5 * contrast - contrast * white + 0.012 * texture, brain)
    atrophy = rng.uniform(0.1, 0.9)
    sulci = np.exp(-((folds / 0.22) ** 2)) * ramp(0.05 + 0.15 * atrophy - depth, 0.1) * brain
    tissue = over(tissue, csf_tone, atrophy * sulci)
    falx = ramp(0.015 - np.abs(u), 0.02) * ramp(np.abs(v) - 0.45, 0.1) * brain
    tissue = over(tissue, brain_tone + 0.12, 0.7 * falx)
    ventricles = _ventricles(rng, v, u, level)
    tissue = over(tissue, csf_tone, 0.9 * ventricles)
    if rng.random() < 0.5 and level < 0.8:  # choroid plexus and pineal calcification are normal
        for place in ((0.30, -0.20), (0.30, 0.20), (0.22, 0.0)):
            speck = ramp(1.0 - radius_from(v, u, place, (0.03, 0.025)), 0.6)
            tissue = over(tissue, 0.95, np.float32(rng.uniform(0.3, 1.0)) * speck)
    regions = {
        "brain": brain,
        "deep": ramp(depth - 0.15, 0.02) * (1 - ventricles),
        "cortex": ramp(depth - 0.05, 0.02) * ramp(0.30 - depth, 0.02),
        "coordinate_depth": (inner - r).astype(np.float32),
        "coordinate_back": v,
        "coordinate_across": u,
    }
    return Scene(tissue[None], regions, gray_camera(rng, size, bias=0.03, noise=(0.015, 0.05)))


def chest_xray(rng: np.random.Generator, size: int) -> Scene:
    """Frontal chest radiograph: lungs, heart, mediastinum, ribs, clavicles, diaphragm, sometimes a side marker."""
    y, x = grid(size)
    zoom, angle = rng.uniform(0.92, 1.12), rng.normal(0, 0.03)
    v = ((y - rng.normal(0, 0.05) + angle * x) / zoom).astype(np.float32)
    u = ((x - rng.normal(0, 0.04) - angle * y) / (zoom * rng.uniform(0.94, 1.06))).astype(np.float32)
    across, right = np.abs(u), u > 0  # right half of the image = the patient's left side
    build, base = rng.uniform(0.0, 1.0), rng.uniform(0.45, 0.68)

    shoulder = 0.24 + (0.66 + 0.1 * build) * ramp(v + rng.uniform(0.76, 0.86), 0.35)
    tissue = over(np.full((size, size), 0.03, np.float32), 0.52 + 0.12 * build, ramp(shoulder - across, 0.05))
    tissue = tissue + 0.03 * smooth_noise(rng, size, 3) * ramp(shoulder - across, 0.05)
    rim = 1.0 - ((across - 0.37) / rng.uniform(0.33, 0.38)) ** 2 - ((v - 0.45) / rng.uniform(1.15, 1.28)) ** 2
    dome = base + np.float32(0.04) * right + 0.28 * ((across - 0.30) / 0.4) ** 2
    below = ramp(v - dome, 0.03)
    lung = ramp(rim, 0.10) * (1.0 - below)
    body = ramp(0.80 + 0.05 * build - across, 0.04)
    tissue = over(tissue, 0.78 + 0.05 * smooth_noise(rng, size, 3), below * body)
    tissue = over(tissue, rng.uniform(0.18, 0.30), lung * rng.uniform(0.88, 1.0))
    middle = ramp(rng.uniform(0.11, 0.15) + 0.06 * ramp(v - 0.1, 0.8) - across, 0.06)
    tissue = over(tissue, 0.80, middle * ramp(v + 0.95, 0.3))
    heart_size = rng.uniform(0.85, 1.2)
    heart_radius = radius_from(v, u, (0.30, 0.11 * heart_size), (0.30 * heart_size, 0.27 * heart_size), 0.5)
    heart = ramp(1.0 - heart_radius, 0.18)
    tissue = over(tissue, 0.80 + 0.04 * rng.random(), heart)
    tissue = over(tissue, 0.74, 0.8 * ramp(1.0 - radius_from(v, u, (-0.25, 0.13), (0.10, 0.09)), 0.3))  # aortic arch
    tissue = over(tissue, 0.88, 0.5 * ramp(1.0 - radius_from(v, u, (-0.6, 0.0), (0.5, 0.045)), 0.5) * (v < -0.3))
    tissue = tissue + _lung_vessels(rng, size) * lung * (1.0 - heart) * rng.uniform(0.12, 0.22)
    tissue = tissue + _ribs(rng, v, across) * body * (1.0 - 0.6 * below)
    tissue = tissue + _clavicles(rng, v, u)
    if rng.random() < 0.35:  # lead side marker
        place = np.array([[rng.uniform(-0.9, -0.75), rng.choice([-1, 1]) * rng.uniform(0.75, 0.9)]])
        tissue = over(tissue, 1.0, stamp(size, place, np.array([[0.06, 0.025]]), 0.0))
    field = lung * (1.0 - heart)
    regions = {
        "lung": field,
        "lung_core": field * ramp(rim - 0.2, 0.05) * ramp(0.9 * dome - 0.04 - v, 0.05),
        "thorax": ramp(rim, 0.10) * body,
        "coordinate_rim": rim.astype(np.float32),
        "coordinate_above_dome": (dome - v).astype(np.float32),
        "coordinate_down": v,
        "coordinate_across": u,
    }
    return Scene(tissue.astype(np.float32)[None], regions, gray_camera(rng, size, bias=0.08, noise=(0.01, 0.035)))


def _clavicles(rng: np.random.Generator, v: Float, u: Float) -> Float:
    """Brightness that the two collar bones add, (H, W)."""
    bones = np.zeros_like(v)
    for side in (-1.0, 1.0):
        line = -0.62 + 0.16 * rng.uniform(0.5, 1.3) * (0.5 - side * u) + 0.03 * np.sin(side * u * 7)
        bone = ramp(0.035 - np.abs(v - line), 0.03) * ramp(side * u - 0.1, 0.05) * ramp(0.72 - side * u, 0.1)
        bones = bones + rng.uniform(0.10, 0.2) * bone
    return bones


def _ribs(rng: np.random.Generator, v: Float, across: Float) -> Float:
    """Brightness that ribs add: back ribs fall gently to the side, front ribs rise steeply, both are periodic."""
    spacing, strength = rng.uniform(0.17, 0.21), rng.uniform(0.05, 0.10)
    back = (v - 0.25 * across + 0.55 * (across - 0.35) ** 2 * 2 + rng.uniform(0, 0.2)) / spacing
    front = (v + 0.75 * across - 0.3 * across**2 + rng.uniform(0, 0.2)) / (spacing * 1.15)
    bands = np.zeros_like(back)
    for phase, weight, start in ((back, 1.0, 0.1), (front, 0.5, 0.25)):
        offset = np.abs(phase - np.floor(phase) - 0.5)
        band = ramp(0.22 - offset, 0.12) + 0.5 * ramp(0.06 - np.abs(offset - 0.2), 0.06)  # a rib's edges are denser
        bands = bands + weight * band * ramp(across - start, 0.1)
    ribs: Float = strength * bands * ramp(v + 0.85, 0.2) * ramp(0.8 - v, 0.3)
    return ribs


def _grow_lines(
    rng: np.random.Generator, starts: Float, angles: Float, bends: Float, *, length: float, step: float, wiggle: float
) -> tuple[Float, Float]:
    """Walk N lines at once from their starts; returns points (N, T, 2) as (y, x) and directions (N, T)."""
    steps = round(length / step)
    turns = bends[:, None] * step + wiggle * np.sqrt(step) * rng.standard_normal((len(starts), steps))
    directions = angles[:, None] + np.cumsum(turns, axis=1)
    moves = step * np.stack([np.sin(directions), np.cos(directions)], axis=-1)
    return starts[:, None, :] + np.cumsum(moves, axis=1), directions


def _lung_vessels(rng: np.random.Generator, size: int) -> Float:
    """Vascular markings that fan out from both hila and thin out towards the rim, (H, W) in [0, 1]."""
    step, count = 0.012, 22
    sides = np.repeat([-1.0, 1.0], count // 2)
    starts = np.stack([rng.normal(0.02, 0.06, count), sides * rng.normal(0.16, 0.02, count)], axis=1)
    fan = rng.uniform(-1.3, 1.3, count)
    angles = np.where(sides > 0, fan, np.pi - fan)
    points, directions = _grow_lines(rng, starts, angles, rng.normal(0, 1.0, count), length=0.5, step=step, wiggle=0.8)
    thinning = np.linspace(0.045, 0.012, points.shape[1])[None, :] * rng.uniform(0.5, 1.0, (count, 1))
    fork = rng.integers(8, points.shape[1] - 8, count)
    rows = np.arange(count)
    turn = directions[rows, fork] + rng.choice([-0.6, 0.6], count)
    twigs, _ = _grow_lines(rng, points[rows, fork], turn, np.zeros(count), length=0.25, step=step, wiggle=0.8)
    every = np.concatenate([points.reshape(-1, 2), twigs.reshape(-1, 2)])
    widths = np.concatenate([thinning.ravel(), np.full(twigs.shape[0] * twigs.shape[1], 0.014)])
    return strokes(size, every, widths, step)


def fundus(rng: np.random.Generator, size: int) -> Scene:
    """Colour photograph of the retina: disc with cup, branching vessels, macula, uneven light, black surround."""
    y, x = grid(size)
    side = float(rng.choice([-1.0, 1.0]))  # left or right eye
    disc_place = (rng.normal(0, 0.05), side * rng.uniform(0.38, 0.56))
    macula_place = (disc_place[0] + rng.normal(0.08, 0.03), disc_place[1] - side * rng.uniform(0.52, 0.62))
    field = ramp(rng.uniform(0.90, 1.08) - np.hypot(y - rng.normal(0, 0.02), x - rng.normal(0, 0.02)), 0.02)
    colour = np.array([rng.uniform(0.60, 0.88), rng.uniform(0.27, 0.47), rng.uniform(0.08, 0.24)], dtype=np.float32)

    choroid = 0.04 * smooth_noise(rng, size, 9) + 0.025 * smooth_noise(rng, size, 26)
    choroid = choroid + 0.04 * smooth_noise(rng, size, 2)
    tissue = colour[:, None, None] * (1.0 + choroid)
    macula = np.exp(-((np.hypot(y - macula_place[0], x - macula_place[1]) / rng.uniform(0.14, 0.24)) ** 2))
    shade = rng.uniform(0.7, 1.2) * np.array([0.30, 0.38, 0.30], dtype=np.float32)[:, None, None]
    tissue = tissue * (1.0 - shade * macula)
    disc_size, disc_tilt = rng.uniform(0.12, 0.155), rng.uniform(-0.4, 0.4)
    disc_radius = radius_from(y, x, disc_place, (disc_size, disc_size * rng.uniform(0.82, 1.0)), disc_tilt)
    cup_ratio = rng.uniform(0.25, 0.5)
    pale = np.array([0.96, 0.80, 0.52], dtype=np.float32)[:, None, None]
    tissue = over(tissue, colour[:, None, None] * 0.45 + pale * 0.5, 0.9 * ramp(1.0 - disc_radius, 0.2))
    tissue = over(tissue, pale, 0.9 * ramp(cup_ratio - disc_radius, 0.2))
    vessels = _retinal_vessels(rng, size, disc_place, side) * (1.0 - 0.8 * macula)
    tissue = over(tissue, tissue * np.array([0.62, 0.36, 0.45], np.float32)[:, None, None], 0.9 * vessels)
    regions = {
        "retina": field * ramp(0.85 - np.hypot(y, x), 0.02) * ramp(disc_radius - 1.4, 0.1),
        "field": field,
        "macular": ramp(0.40 - np.hypot(y - macula_place[0], x - macula_place[1]), 0.1) * ramp(disc_radius - 1.3, 0.1),
        "vessels": vessels,
        "coordinate_disc_radius": disc_radius,
        "coordinate_cup_ratio": np.full((size, size), cup_ratio, np.float32),
    }
    return Scene(tissue.astype(np.float32), regions, colour_camera(rng, size, field))


def _retinal_vessels(rng: np.random.Generator, size: int, disc: tuple[float, float], side: float) -> Float:
    """Four arcades from the disc, twice each (artery and vein), with branches and twigs, (H, W) in [0, 1]."""
    step = 0.014
    fan = np.array([-1.9, -1.25, 1.25, 1.9, -1.55, 1.55, -2.6, 2.6]) + rng.normal(0, 0.12, 8)
    bends = np.array([1.5, 0.2, -0.2, -1.5, 0.7, -0.7, 0.3, -0.3]) * rng.uniform(0.7, 1.2, 8) * side
    # fan = 0 points away from the macula; the first and fourth vessels arch around it.
    angles = np.where(side > 0, fan, np.pi - fan)
    starts = np.tile(np.asarray(disc), (8, 1)) + rng.normal(0, 0.012, (8, 2))
    mains, directions = _grow_lines(rng, starts, angles, -bends, length=1.5, step=step, wiggle=0.35)
    calibre = rng.uniform(0.028, 0.044, (8, 1)) * np.linspace(1.0, 0.4, mains.shape[1])
    points, widths = [mains.reshape(-1, 2)], [calibre.ravel()]
    for count, length, width in ((20, 0.55, 0.016), (24, 0.3, 0.009)):
        line, place = rng.integers(0, len(mains), count), rng.integers(6, int(mains.shape[1] * 0.8), count)
        turn = directions[line, place] + rng.choice([-1.0, 1.0], count) * rng.uniform(0.3, 0.8, count)
        mains, directions = _grow_lines(
            rng, mains[line, place], turn, rng.normal(0, 0.5, count), length=length, step=step, wiggle=0.5
        )
        points.append(mains.reshape(-1, 2))
        widths.append(np.tile(np.linspace(width, width * 0.5, mains.shape[1]), count))
    return strokes(size, np.concatenate(points), np.concatenate(widths), step)


def histology(rng: np.random.Generator, size: int) -> Scene:
    """H&E-stained section: fibrous stroma with spindle nuclei, glands with a lumen and a ring of basal nuclei.

    The tissue holds stain densities: haematoxylin (purple, nuclei) and eosin (pink, everything else).
    """
    angle = rng.uniform(0, np.pi)
    fibres = np.abs(_fibres(rng, size, angle))
    eosin = rng.uniform(0.40, 0.75) + 0.16 * fibres * rng.uniform(0.5, 1.0) + 0.05 * smooth_noise(rng, size, 5)
    haematoxylin = 0.06 + 0.02 * smooth_noise(rng, size, 8)
    gaps = ramp(smooth_noise(rng, size, 7) - rng.uniform(1.2, 2.2), 0.3)  # torn or oedematous stroma
    eosin = over(eosin, 0.05, 0.8 * gaps)

    gland, lumen, basal = _glands(rng, size)
    eosin = over(eosin, rng.uniform(0.35, 0.55) + 0.04 * smooth_noise(rng, size, 16), gland)
    haematoxylin = over(haematoxylin, rng.uniform(0.14, 0.26), gland)
    eosin, haematoxylin = over(eosin, 0.03, lumen), over(haematoxylin, 0.02, lumen)

    count = int(rng.integers(70, 190))
    spots = rng.uniform(-1.02, 1.02, (count, 2))
    row, column = np.clip(((spots.T + 1.0) * size / 2.0).astype(np.intp), 0, size - 1)
    spots = spots[(gland + lumen)[row, column] < 0.3]
    spindle = np.stack([rng.uniform(0.014, 0.024, len(spots)), rng.uniform(0.028, 0.055, len(spots))], axis=1)
    turns = angle + rng.normal(0, 0.35, len(spots))
    nuclei = stamp(size, spots, spindle, turns, rng.uniform(0.55, 1.0, len(spots)))
    round_radius = rng.uniform(0.028, 0.040, (len(basal), 1)) * rng.uniform(0.85, 1.2, (len(basal), 2))
    nuclei = np.maximum(nuclei, stamp(size, basal, round_radius, rng.uniform(0, 3.1, len(basal)), 0.85))
    chromatin = 0.75 + 0.12 * smooth_noise(rng, size, 40)
    haematoxylin = over(haematoxylin, chromatin, nuclei)
    regions = {
        "tissue": 1.0 - lumen,
        "stroma": (1.0 - gland) * (1.0 - lumen),
        "gland": gland,
        "lumen": lumen,
        "nuclei": nuclei,
    }
    return Scene(np.stack([haematoxylin, eosin]).astype(np.float32), regions, stain_camera(rng, size))


def _fibres(rng: np.random.Generator, size: int, angle: float) -> Float:
    """Unit-variance texture of wavy fibres that run along one direction, (H, W)."""
    y, x = grid(size)
    across = float(np.cos(angle)) * y - float(np.sin(angle)) * x + 0.06 * smooth_noise(rng, size, 3)
    phase = 14.0 * across + 1.5 * smooth_noise(rng, size, 6)
    texture: Float = np.sin(3.0 * phase) + 0.4 * smooth_noise(rng, size, 30)
    return texture


def _glands(rng: np.random.Generator, size: int) -> tuple[Float, Float, Float]:
    """Epithelium and lumen as opacities (H, W), and the places of the basal nuclei (N, 2)."""
    y, x = grid(size)
    epithelium, lumen = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    basal: list[Float] = [np.zeros((0, 2))]
    taken: list[tuple[Float, float]] = []
    for _ in range(int(rng.integers(2, 9))):
        radius, place = rng.uniform(0.22, 0.40), rng.uniform(-1.0, 1.0, 2)
        if any(np.hypot(*(place - other)) < radius + size_other for other, size_other in taken):
            continue
        taken.append((place, radius + 0.05))
        waves, shifts = rng.normal(0, 0.07, 3), rng.uniform(0, 6.3, 3)
        dy, dx = y - np.float32(place[0]), x - np.float32(place[1])
        distance = np.hypot(dy, dx) / (radius * _wavy(np.arctan2(dy, dx), waves, shifts))
        epithelium = np.maximum(epithelium, ramp(1.0 - distance, 0.08))
        lumen = np.maximum(lumen, ramp(rng.uniform(0.35, 0.6) - distance, 0.1))
        around = np.linspace(0, 2 * np.pi, int(2 * np.pi * radius / 0.075), endpoint=False) + rng.uniform(0, 1)
        reach = radius * _wavy(around, waves, shifts) * rng.normal(0.84, 0.03, len(around))
        basal.append(place + np.stack([reach * np.sin(around), reach * np.cos(around)], axis=1))
    return epithelium * (1.0 - lumen), lumen, np.concatenate(basal)


def _wavy(turn: Float, waves: Float, shifts: Float) -> Float:
    """Relative radius of a wavy circle at the angles `turn`."""
    outline = np.ones_like(turn)
    for k, wave, shift in zip((2, 3, 5), waves.tolist(), shifts.tolist(), strict=True):
        outline += wave * np.cos(k * turn + shift)
    return outline
