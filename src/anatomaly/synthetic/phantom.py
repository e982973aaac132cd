"""The built-in benchmark: five synthetic tasks with patients, natural variation and lesions whose place is known.

Made for tests, demonstrations and comparisons that need no patient data; `docs/phantom.md` shows the tasks and what
trivial statistics reach on them.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomaly.errors import ConfigError, OutputError
from anatomaly.synthetic import anatomy, pathology
from anatomaly.synthetic.dicom_files import dicom_bytes
from anatomaly.synthetic.scene import Scene, neighbouring_slice
from anatomaly.synthetic.shapes import Float

Anatomy = Callable[[np.random.Generator, int], Scene]
Pathology = Callable[[Scene, np.random.Generator, float], tuple[Float, Float]]

#: Task name -> (anatomy function, pathology name -> pathology function).
TASKS: Mapping[str, tuple[Anatomy, Mapping[str, Pathology]]] = {
    "brain_mr": (
        anatomy.brain_mr,
        {
            "glioma": pathology.glioma,
            "metastases": pathology.metastases,
            "white_matter_patches": pathology.white_matter_patches,
            "mass_effect": pathology.mass_effect,
            "resection_cavity": pathology.resection_cavity,
        },
    ),
    "head_ct": (
        anatomy.head_ct,
        {
            "haemorrhage": pathology.haemorrhage,
            "subdural": pathology.subdural,
            "infarct": pathology.infarct,
            "calcified_mass": pathology.calcified_mass,
        },
    ),
    "chest_xray": (
        anatomy.chest_xray,
        {
            "consolidation": pathology.consolidation,
            "nodule": pathology.nodule,
            "effusion": pathology.effusion,
            "pneumothorax": pathology.pneumothorax,
        },
    ),
    "fundus": (
        anatomy.fundus,
        {
            "haemorrhages": pathology.retinal_haemorrhages,
            "exudates": pathology.exudates,
            "drusen": pathology.drusen,
            "atrophy": pathology.retinal_atrophy,
            "enlarged_cup": pathology.enlarged_cup,
        },
    ),
    "histology": (
        anatomy.histology,
        {
            "tumour_nest": pathology.tumour_nest,
            "necrosis": pathology.necrosis,
            "lymphocytes": pathology.lymphocytes,
            "mucin": pathology.mucin,
        },
    ),
}

COLUMNS = ("path", "label", "mask", "task", "split", "patient_id", "sha256", "frame")
MARKER = "phantom.json"  # tells a phantom benchmark, which may be written again, from any other folder

_MASK_OPACITY = 0.4
_VISIBLE_CHANGE = 0.05  # mean change inside the mask below which a lesion is placed again
_ATTEMPTS = 6


@dataclass(frozen=True, slots=True, eq=False)
class PhantomImage:
    """One drawn image.

    Attributes:
        pixels: (C, H, W) float32 in [0, 1]; C is 1 for brain_mr, head_ct and chest_xray, 3 for fundus and histology.
        mask: (H, W) bool, True on the lesion; all False on a normal image.
        pathology: Name of the pathology, None on a normal image.
    """

    pixels: NDArray[np.float32]
    mask: NDArray[np.bool_]
    pathology: str | None


def draw(task: str, *, seed: int, anomalous: bool = False, size: int = 128, slice_index: int = 0) -> PhantomImage:
    """Draw one image of one patient; the same arguments always give the same image.

    With `anomalous=True` the same seed gives the same patient, slice and noise plus a lesion, so the two images are a
    pair that differs in and just around the mask only.

    Args:
        task: One of `TASKS`.
        seed: The patient, >= 0.
        anomalous: Whether to add one pathology, chosen and graded at random by the seed.
        size: Height and width in pixels, >= 32.
        slice_index: Another image of the same patient: slightly moved anatomy, new noise, another place of the lesion.

    Returns:
        The image, its lesion mask and the name of the pathology.

    Raises:
        ConfigError: The task is unknown, the seed or slice negative, or the size below 32.

    Example:
        >>> normal, sick = draw("fundus", seed=7), draw("fundus", seed=7, anomalous=True)
        >>> normal.pixels.shape, bool(normal.mask.any()), bool(sick.mask.any())
        ((3, 128, 128), False, True)
    """
    _check_tasks([task])
    if min(seed, slice_index) < 0 or size < 32:
        raise ConfigError(
            f"phantom: got seed {seed}, slice_index {slice_index} and size {size}; expected seed and slice_index "
            "of at least 0 and a size of at least 32 pixels."
        )
    make_scene, pathologies = TASKS[task]
    scene = make_scene(_stream(task, seed, 0), size)
    if slice_index:
        scene = neighbouring_slice(scene, _stream(task, seed, 1, slice_index))
    tissue, mask, name = scene.tissue, np.zeros((size, size), dtype=np.bool_), None
    if anomalous:
        name = list(pathologies)[int(_stream(task, seed, 2).integers(len(pathologies)))]
        tissue, mask = _grow_lesion(scene, pathologies[name], _stream(task, seed, 3, slice_index))
    pixels = scene.expose(tissue, _stream(task, seed, 4, slice_index))
    return PhantomImage(np.ascontiguousarray(pixels, dtype=np.float32), mask, name)


def _stream(task: str, seed: int, *purpose: int) -> np.random.Generator:
    """An independent generator per task, patient and purpose, so that a lesion never shifts the patient's own draws."""
    return np.random.default_rng([zlib.crc32(task.encode()), seed, *purpose])


def _grow_lesion(scene: Scene, grow: Pathology, rng: np.random.Generator) -> tuple[Float, NDArray[np.bool_]]:
    """Place a lesion until it can be seen (it may fall on tissue of its own tone); keep the most visible try."""
    severity = float(rng.beta(1.6, 1.6))  # from subtle to severe
    smallest = scene.tissue.shape[-1] ** 2 // 800
    best, tissue, mask = -1.0, scene.tissue, np.zeros(scene.tissue.shape[1:], dtype=np.bool_)
    for _ in range(_ATTEMPTS):
        changed, opacity = grow(scene, rng, severity)
        found = opacity > _MASK_OPACITY
        area = int(found.sum())
        change = float(np.abs(changed - scene.tissue).mean(axis=0)[found].mean()) if area else 0.0
        visible = change * min(1.0, area / smallest)
        if visible > best:
            best, tissue, mask = visible, changed, found
        if best > _VISIBLE_CHANGE:
            break
    return tissue, mask


def _check_tasks(tasks: Sequence[str]) -> None:
    for task in tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"phantom: unknown task {task!r}, expected one of {', '.join(TASKS)}. Did you mean {near}?"
            )


def write_benchmark(
    out: Path,
    *,
    train: int = 100,
    test_normal: int = 40,
    test_anomalous: int = 40,
    size: int = 128,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    dicom: bool = False,
) -> Path:
    """Write the benchmark as PNG files and a manifest: OUT/<task>/<split>/<normal or pathology>/<name>.png.

    Patients contribute one or two images each; no patient is in two splits or both normal and anomalous.  Masks are
    OUT/<task>/masks/<name>.png (255 = lesion).  An earlier phantom benchmark in OUT is replaced.

    Args:
        out: Folder to write to; made if absent.
        train: Normal training images per task.
        test_normal: Normal test images per task.
        test_anomalous: Test images with a lesion per task.
        size: Height and width in pixels.
        seed: Another seed gives other patients; patient n of a task is `draw(task, seed=seed * 1_000_000 + n)`.
        tasks: Names out of `TASKS`, each at most once.
        dicom: Write the images (not the masks) as DICOM files, <name>.dcm, one series a patient.

    Returns:
        Path of OUT/manifest.csv; paths in it are relative to OUT.

    Raises:
        ConfigError: An unknown or repeated task, a negative count or seed, or a size below 32.
        OutputError: OUT holds something else than a phantom benchmark, or cannot be written.
        NotReadyError: DICOM files are asked for and pydicom is not installed.
    """
    _check_tasks(tasks)
    counts = {"train": train, "test_normal": test_normal, "test_anomalous": test_anomalous}
    if len(set(tasks)) < len(tasks) or min(*counts.values(), seed) < 0 or size < 32:
        raise ConfigError(
            f"phantom: got {counts}, seed {seed}, size {size} and tasks {list(tasks)}; expected counts and seed of at "
            "least 0, a size of at least 32 and every task once."
        )
    manifest = out / "manifest.csv"
    try:
        _clear(out)
        (out / MARKER).write_text(json.dumps({"seed": seed, "size": size, "tasks": list(tasks), **counts}, indent=1))
        rows = [row for task in tasks for row in _write_task(out, task, counts, size=size, seed=seed, dicom=dicom)]
        with manifest.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as err:
        raise OutputError(
            f"{out}: cannot write the phantom benchmark ({err.strerror or err}). Choose another folder."
        ) from err
    return manifest


def is_drawn(file: Path) -> bool:
    """Whether a file lies in a folder that `write_benchmark` wrote."""
    return any((folder / MARKER).is_file() for folder in file.absolute().parents)


def _clear(out: Path) -> None:
    """Make the folder, or empty an earlier benchmark of its images; refuse a folder of anything else."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file, expected a folder for the phantom benchmark. Choose another name.")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARKER).is_file():
        raise OutputError(
            f"{out}: is not empty and holds no {MARKER}, so it is not an earlier phantom benchmark; nothing was "
            "written. Choose an empty or new folder."
        )
    (out / "manifest.csv").unlink(missing_ok=True)
    for task in TASKS:
        for image in (out / task).rglob("*.*"):
            if image.suffix in (".png", ".dcm"):
                image.unlink()
        for folder in sorted((out / task).rglob("*"), reverse=True):  # children before parents
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _patients(task: str, counts: Mapping[str, int], seed: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield (group, patient number, slice index, patient seed) until every group has its number of images."""
    number = 0
    for group, count in counts.items():
        left = count
        while left > 0:
            patient_seed = seed * 1_000_000 + number
            slices = min(left, int(_stream(task, patient_seed, 5).integers(1, 3)))
            for slice_index in range(slices):
                yield group, number, slice_index, patient_seed
            left -= slices
            number += 1


def _write_task(
    out: Path, task: str, counts: Mapping[str, int], *, size: int, seed: int, dicom: bool
) -> Iterator[dict[str, str]]:
    """Draw and save the images of one task; yield their manifest rows."""
    for group, number, slice_index, patient_seed in _patients(task, counts, seed):
        anomalous = group == "test_anomalous"
        image = draw(task, seed=patient_seed, anomalous=anomalous, size=size, slice_index=slice_index)
        split, name = group.split("_")[0], f"p{number:04d}_{slice_index}.png"
        path = Path(task, split, image.pathology or "normal", name).with_suffix(".dcm" if dicom else ".png")
        mask = Path(task, "masks", name)
        patient = f"{task}-p{number:04d}"
        content = png_bytes(image.pixels)
        if dicom:
            place = (0.0, 0.0, 5.0 * slice_index)
            content = dicom_bytes(image.pixels, task=task, patient=patient, number=slice_index, position=place)
        digest = _write(out / path, content)
        if anomalous:
            _write(out / mask, png_bytes(image.mask[None].astype(np.float32)))
        yield {
            "path": path.as_posix(),
            "label": "anomalous" if anomalous else "normal",
            "mask": mask.as_posix() if anomalous else "",
            "task": task,
            "split": split,
            "patient_id": patient,
            "sha256": digest,
            "frame": "",
        }


def png_bytes(pixels: NDArray[np.float32]) -> bytes:
    """Encode an image as 8-bit PNG.

    Args:
        pixels: (C, H, W) in [0, 1], C in {1, 3}.

    Returns:
        The file's content.
    """
    from PIL import Image

    levels = np.rint(pixels * 255.0).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> str:
    """Save a file, making its folder; return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
