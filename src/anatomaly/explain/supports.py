"""Which support images did a verdict rest on?  Every support's weight, and what the score would be without it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from anatomaly.data.transforms import restore_map
from anatomaly.errors import ConfigError
from anatomaly.explain.figure import Panel, compose, draw
from anatomaly.explain.measures import mean_of
from anatomaly.explain.table import RowTable, batches, facts_of, stem_of, title_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from anatomaly.data.transforms import Prepared
    from anatomaly.detector.detector import Detector
    from anatomaly.types import Sample, SupportBank

_SUPPORTS_PER_ROW = 5


def explain_supports(
    detector: Detector,
    samples: Iterable[Sample],
    out: Path,
    *,
    pictures: Sequence[NDArray[np.float32]],
    batch_size: int = 16,
    on_progress: Callable[[object], None] = lambda sample: None,
) -> list[dict[str, Any]]:
    """Say which support images a verdict rested on; write `supports.csv`, K rows per query, and a figure per query.

    Left out means compared with the other K - 1 supports of the embedded bank: no image is encoded again.

    Args:
        detector: With its support set.
        samples: The queries; an unreadable one becomes a row with a reason.
        out: Folder; one that holds a `supports.csv` is refused.
        pictures: The K support images, each (C, H, W) in [0, 1].
        batch_size: Queries per forward pass; changes no number.
        on_progress: Called with every query that is done.

    Returns:
        The rows of the table: of each query, its supports by falling mean weight.

    Raises:
        ConfigError: The method has no support images, or the model was made so that they count nothing.
        NotReadyError: The detector has no support yet.
        OutputError: Something cannot be written; the rows so far are complete.
    """
    check_supports(detector)
    bank = detector.ready()
    levels = _weighted_levels(detector, bank)
    done: list[dict[str, Any]] = []
    number = 0
    with RowTable(out / "supports.csv", support_columns(levels)) as table:
        for batch in batches(samples, bank.preprocessing, batch_size):
            readable = [item.prepared for item in batch if item.prepared is not None]
            verdicts = iter(_verdicts(detector, bank, readable) if readable else [])
            for item in batch:
                number += 1
                rows = [{**facts_of(item.sample), "status": "error", "error": item.error}]
                if item.prepared is not None:
                    heat, score, weights, left_out = next(verdicts)
                    rows = _support_rows(item.sample, bank, score, weights, left_out)
                    heat = restore_map(heat, item.prepared.image.size, bank.preprocessing)
                    sheet = _support_figure(item.sample, item.prepared, heat, rows, bank.map_range, pictures)
                    figure = table.figure(stem_of(item.sample, number), sheet)
                    rows = [row | {"figure": figure} for row in rows]
                table.append(rows)
                done += rows
                on_progress(item.sample)
    return done


def check_supports(detector: Detector) -> None:
    """Refuse a method that compares with no support images, with a `ConfigError`."""
    if not detector.method.needs_support:
        raise ConfigError(
            f"explain supports: {detector.facts.name} has no supports, it learned what is normal in "
            "training. Use anatomaly explain teachers."
        )


def _weighted_levels(detector: Detector, bank: SupportBank) -> int:
    """In how many levels the method says what each support counted: known from its answer to an empty image alone."""
    blank = np.zeros((3, *bank.preprocessing.size), np.float32)
    weights = detector.compare(detector.encode([blank]), bank).weights
    if weights is None:
        raise ConfigError(
            f"explain supports: this model of {detector.facts.name} does not say what each support counted. Choose "
            "another model."
        )
    return weights.shape[1]


def support_columns(levels: int) -> tuple[str, ...]:
    """Head of `supports.csv` for a method that weighs its supports in so many levels."""
    weights = tuple(f"weight_level_{level + 1}" for level in range(levels))
    facts = ("path", "frame", "task", "label", "score", "support", "support_index")
    return (*facts, *weights, "mean_weight", "score_without", "change", "figure", "status", "error")


def without(bank: SupportBank, index: int) -> SupportBank:
    """The same bank with one support image left out."""
    kept = [k for k in range(bank.shots) if k != index]
    return replace(
        bank,
        tensors={name: tensor[kept] for name, tensor in bank.tensors.items()},
        names=tuple(bank.names[k] for k in kept),
        sha256=tuple(bank.sha256[k] for k in kept),
    )


def _verdicts(
    detector: Detector, bank: SupportBank, readable: Sequence[Prepared]
) -> Iterator[tuple[NDArray[np.float32], float, NDArray[np.float32], NDArray[np.float32]]]:
    """Map (H, W), score, weights (levels, K) and the K scores without each support, image by image."""
    encoded = detector.encode([prepared.input for prepared in readable])
    scored = detector.compare(encoded, bank)
    assert scored.weights is not None  # `_weighted_levels` has seen some
    scores = np.full((bank.shots, len(readable)), math.nan, np.float32)
    for k in range(bank.shots if bank.shots > 1 else 0):
        scores[k] = detector.compare(encoded, without(bank, k)).scores.cpu().numpy()
    weights = scored.weights.float().cpu().numpy()
    return zip(scored.maps.cpu().numpy(), scored.scores.tolist(), weights, scores.T, strict=True)


def _support_rows(
    sample: Sample, bank: SupportBank, score: float, weights: NDArray[np.float32], left_out: NDArray[np.float32]
) -> list[dict[str, Any]]:
    mean = weights.mean(axis=0, dtype=np.float64)
    rows = []
    for k in np.argsort(-mean, kind="stable").tolist():
        by_level = {f"weight_level_{level + 1}": float(weight) for level, weight in enumerate(weights[:, k])}
        row = {**facts_of(sample), "score": score, "support": bank.names[k], "support_index": k, **by_level}
        row |= {"mean_weight": float(mean[k]), "score_without": float(left_out[k])}
        rows.append(row | {"change": float(left_out[k]) - score, "status": "ok"})
    return rows


def _support_figure(
    sample: Sample,
    prepared: Prepared,
    heat: NDArray[np.float32],
    rows: Sequence[Mapping[str, Any]],
    scale: tuple[float, float],
    pictures: Sequence[NDArray[np.float32]],
) -> bytes:
    spacing = prepared.image.spacing
    words = (f"score {rows[0]['score']:#.4g}", f"colours from {scale[0]:.3g} to {scale[1]:.3g}")
    seen = [
        Panel(draw(prepared.display, spacing=spacing), title_of(sample)),
        Panel(draw(prepared.display, spacing=spacing, heat=heat, scale=scale), words),
    ]
    supports = [
        Panel(
            draw(pictures[row["support_index"]], spacing=None),
            (row["support"], f"weight {row['mean_weight']:.1%}", _change(row["change"])),
        )
        for row in rows
    ]
    per_row = range(0, len(supports), _SUPPORTS_PER_ROW)
    return compose([seen, *(supports[start : start + _SUPPORTS_PER_ROW] for start in per_row)])


def _change(change: float) -> str:
    return "" if math.isnan(change) else f"leaving it out: score {change:+.3g}"


def summarise_supports(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float, int, float]]:
    """Per support, by falling mean weight: name, queries, mean weight, queries where it led, mean change without it."""
    by_support: dict[int, list[Mapping[str, Any]]] = {}
    leaders: dict[tuple[str, int | None], int] = {}
    for row in rows:
        if row["status"] == "ok":
            by_support.setdefault(row["support_index"], []).append(row)
            leaders.setdefault((row["path"], row["frame"]), row["support_index"])
    led = list(leaders.values())
    found = [
        (own[0]["support"], len(own), mean_of(own, "mean_weight"), led.count(k), mean_of(own, "change"))
        for k, own in by_support.items()
    ]
    return sorted(found, key=lambda row: -row[2])
