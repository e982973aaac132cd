"""Where do two frozen teachers look?  Class-activation maps side by side, with numbers.

This is the analysis that motivates PDD (arXiv 2603.07142): the maps of its two backbones differ, and on medical images
they are diffuse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from anatomaly.backbones.teacher import misfit
from anatomaly.data.readers import read_mask_of
from anatomaly.data.transforms import mask_to_input, restore_map
from anatomaly.errors import AnatomalyError, ConfigError, ManifestError
from anatomaly.evaluation.metrics import auroc
from anatomaly.explain.figure import Panel, compose, draw
from anatomaly.explain.measures import agreement, area, entropy, lift, mean_of, top_share
from anatomaly.explain.table import RowTable, batches, facts_of, stem_of, title_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.data.loading import Loaded
    from anatomaly.data.transforms import Prepared
    from anatomaly.explain.classifiers import ClassActivation, Classifier
    from anatomaly.types import Preprocessing, Sample

#: Who is who in the table, in the order of the teachers given.
ROLES = ("teacher", "global_teacher")
MEASURES = ("entropy", "area", "top5_share", "agreement", "lift", "pixel_auroc")
COLUMNS = (
    "path", "frame", "task", "label", "role", "teacher", "method", *MEASURES, "class", "probability",
    "figure", "status", "error",
)  # fmt: skip


def _stack(readable: Sequence[Prepared], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack([prepared.input for prepared in readable])).to(device)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """One teacher's map of one image, at the network's input size, and what it was classified as."""

    heat: NDArray[np.float32]
    label: int | None
    probability: float | None


def explain_teachers(
    pair: tuple[Classifier, Classifier],
    samples: Iterable[Sample],
    out: Path,
    *,
    preprocessing: Preprocessing,
    batch_size: int = 8,
    on_progress: Callable[[object], None] = lambda sample: None,
) -> list[dict[str, Any]]:
    """Compare where two frozen teachers look; write `explain.csv`, two rows per image, and a figure per image.

    All measures are taken at the network's input size, so that teachers of any stride can be compared.

    Args:
        pair: Two teachers with their heads, on the same device.
        samples: Manifest rows; an unreadable image becomes rows with a reason.
        out: Folder; one that holds an `explain.csv` is refused.
        preprocessing: Of the images, of a size that both teachers take.
        batch_size: Images per forward pass; changes no number.
        on_progress: Called with every row that is done.

    Returns:
        The rows of the table.

    Raises:
        ConfigError: The size does not fit a teacher.
        OutputError: Something cannot be written; the rows so far are complete.
    """
    check_size(pair, preprocessing.size)
    device = pair[0].teacher.mean.device
    done: list[dict[str, Any]] = []
    number = 0
    with RowTable(out / "explain.csv", COLUMNS) as table:
        for batch in batches(samples, preprocessing, batch_size):
            readable = [item.prepared for item in batch if item.prepared is not None]
            views = iter(_views(pair, _stack(readable, device), preprocessing.size) if readable else [])
            for item in batch:
                number += 1
                rows = _failed(pair, item) if item.prepared is None else []
                if item.prepared is not None:
                    rows = _teacher_rows(pair, item, item.prepared, next(views), preprocessing, table, number)
                table.append(rows)
                done += rows
                on_progress(item.sample)
    return done


def check_size(pair: Sequence[Classifier], size: tuple[int, int]) -> None:
    """Refuse an input size that a teacher cannot work at.

    Raises:
        ConfigError: A teacher does not take it, or sees a single cell of it.
    """
    teachers = [each.teacher for each in pair]
    least = 2 * max(teacher.strides[-1] for teacher in teachers)
    expected = misfit(teachers, size)
    if expected or min(size) < least:
        expected = " and ".join([*([expected] if expected else []), f"no side below {least}"])
        names = " and ".join(dict.fromkeys(teacher.name for teacher in teachers))
        raise ConfigError(f"size: got {size[0]} {size[1]}, expected {expected} for {names}. Change --size.")


def _views(
    pair: tuple[Classifier, Classifier], images: torch.Tensor, size: tuple[int, int]
) -> list[tuple[_View, _View]]:
    """Both teachers' views of every image of a batch (B, 3, H, W)."""
    one, other = (_enlarged(each.look(images), size) for each in pair)
    return list(zip(one, other, strict=True))


def _enlarged(seen: ClassActivation, size: tuple[int, int]) -> list[_View]:
    maps = F.interpolate(seen.maps[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
    missing: list[None] = [None] * len(maps)
    return [_View(*each) for each in zip(maps, seen.classes or missing, seen.probabilities or missing, strict=True)]


def _failed(pair: Sequence[Classifier], item: Loaded) -> list[dict[str, Any]]:
    reason = {"status": "error", "error": item.error}
    return [
        {**facts_of(item.sample), "role": role, "teacher": each.teacher.name, "method": each.kind, **reason}
        for role, each in zip(ROLES, pair, strict=True)
    ]


def _teacher_rows(
    pair: tuple[Classifier, Classifier],
    item: Loaded,
    prepared: Prepared,
    views: tuple[_View, _View],
    preprocessing: Preprocessing,
    table: RowTable,
    number: int,
) -> list[dict[str, Any]]:
    """Measure and draw one image."""
    mask, status, error = None, "ok", None
    try:
        mask = _mask(item.sample, prepared)
    except AnatomalyError as err:  # the image itself can be explained
        status, error = "mask error", str(err)
    lesion = None if mask is None else mask_to_input(mask, preprocessing)
    agree = agreement(views[0].heat, views[1].heat)
    title = (*title_of(item.sample), "" if math.isnan(agree) else f"agreement {agree:.2f}")
    panels = [Panel(draw(prepared.display, spacing=prepared.image.spacing, mask=mask), title)]
    rows = []
    for role, each, view in zip(ROLES, pair, views, strict=True):
        measures = _measure(view.heat, lesion) | {"agreement": agree}
        rows.append(
            {**facts_of(item.sample), "role": role, "teacher": each.teacher.name, "method": each.kind, **measures}
            | {"class": view.label, "probability": view.probability, "status": status, "error": error}
        )
        heat = restore_map(view.heat / (view.heat.max() or 1.0), prepared.image.size, preprocessing)
        caption = (each.teacher.name, each.kind + _top_class(view), _in_words(measures))
        panels.append(Panel(draw(prepared.display, spacing=prepared.image.spacing, heat=heat, mask=mask), caption))
    name = table.figure(stem_of(item.sample, number), compose([panels]))
    return [row | {"figure": name} for row in rows]


def _measure(heat: NDArray[np.float32], lesion: NDArray[np.bool_] | None) -> dict[str, float]:
    """All of `MEASURES` that concern one map; NaN for what needs a lesion where there is none."""
    measures = {"entropy": entropy(heat), "area": area(heat), "top5_share": top_share(heat)}
    if lesion is None or not lesion.any() or lesion.all():
        return measures | {"lift": math.nan, "pixel_auroc": math.nan}
    return measures | {"lift": lift(heat, lesion), "pixel_auroc": auroc(heat.ravel(), lesion.ravel())}


def _mask(sample: Sample, prepared: Prepared) -> NDArray[np.bool_] | None:
    mask = read_mask_of(sample)
    if mask is not None and mask.shape != prepared.image.size:
        raise ManifestError(
            f"{sample.mask}: the mask has {mask.shape} pixels, its image {prepared.image.size}; expected the same. "
            "Export it again, or remove it from the table."
        )
    return mask


def _top_class(view: _View) -> str:
    return "" if view.label is None else f", class {view.label} ({view.probability:.0%})"


def _in_words(measures: Mapping[str, float]) -> str:
    words = f"entropy {measures['entropy']:.2f}, area {measures['area']:.0%}"
    return words if math.isnan(measures["lift"]) else f"{words}, lift {measures['lift']:.1f}"


def summarise_teachers(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, int, dict[str, float]]]:
    """Means over the images, per teacher, of all images and of each known label.

    Args:
        rows: What `explain_teachers` returned.

    Returns:
        (teacher, method, "all", "normal" or "anomalous", number of images, mean of every measure): a mean leaves out
        images without the measure and is NaN where none has it.
    """
    found = []
    for role in ROLES:
        own = [row for row in rows if row["role"] == role and row["status"] != "error"]
        groups = {"all": own} | {word: [r for r in own if r["label"] == word] for word in ("normal", "anomalous")}
        found += [
            (group[0]["teacher"], group[0]["method"], word, len(group), {key: mean_of(group, key) for key in MEASURES})
            for word, group in groups.items()
            if group
        ]
    return found
