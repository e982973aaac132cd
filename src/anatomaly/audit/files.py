"""Maps and scores of any tool for an audit: a table, a folder of `.npy` maps, and the manifest they are matched to."""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np

from anatomaly.audit.collect import Collector, draws_to_keep, shuffled_draws
from anatomaly.audit.measure import Runs, require_labels
from anatomaly.audit.published import ACROSS, RunScores, file_order
from anatomaly.data.words import label_of
from anatomaly.errors import ConfigError, ManifestError, ReadError
from anatomaly.evaluation.cells import SCORES
from anatomaly.evaluation.protocols import samples_to_test
from anatomaly.results.rows import COLUMNS
from anatomaly.types import Scoring

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Sample

_OURS = set(COLUMNS) - {"map_volume", "axis", "position"}  # which older tables lack
_ADVICE = "See 'anatomaly audit' in docs/protocol.md."


@dataclass(frozen=True)
class _Row:
    """A usable row of the table: where it was, its image's words, and what the tool says of it."""

    where: str
    cells: Mapping[str, str]
    score: float | None
    map: Path | None
    epoch: int
    draw: int


def is_table(source: Path) -> bool:
    """Whether a path is a table of scores, or a folder that holds one and no model."""
    if source.is_dir():
        return not (source / "config.json").is_file() and any(source.glob("*.csv"))
    return source.suffix.lower() == ".csv"


def run_files(
    source: Path,
    manifest: Manifest,
    *,
    task: str,
    shots: int | None = None,
    blur: float | None = None,
    pooling: Literal["max", "mean"] = "max",
    size: tuple[int, int] | None = None,
    seed: int = 0,
    on_image: Callable[[object], None] = lambda image: None,
) -> Runs:
    """Read a tool's maps and scores of a task's test split for an audit.

    Args:
        source: The table, or a folder with `scores.csv`, `test_scores.csv` or a single CSV file.  Columns: `path`
            (matched to the manifest by the longest common end) or `map`; `score` and/or `map` (a `.npy` file beside the
            table or in `maps`); `label` where the manifest has none; optionally `frame`, `task`, `shots`, `draw`,
            `epoch`.
        manifest: The data set.
        task: The task.
        shots: K, where the table holds several.
        blur: In-plane blur that the maps still need; None means 4, and 0 for the maps of `anatomaly predict`.
        pooling: From a map to a score.
        size: Resample all maps to this (height, width).
        seed: Of the shuffled loader.
        on_image: Called with every map that is done.

    Raises:
        ConfigError: No test rows, or an option does not fit.
        ManifestError: The table is unusable, a row fits no image or several, an image has no row, or a label is
            missing or contradicts the manifest.
        ReadError: A map is missing, damaged, not finite or of another size than the first.
    """
    table = _find_table(source)
    columns, lines = _read(table)
    tests = samples_to_test(manifest, task)
    rows = _rows(table, columns, lines, task, shots)
    if shots is None and len(known := {row.cells.get("shots", "") for row in rows} - {""}) == 1:
        shots = _whole(known.pop(), f"{table}: shots")
    if blur is None:
        blur = 0.0 if set(columns) >= _OURS else 4.0
    if blur < 0 or not math.isfinite(blur):
        raise ConfigError(f"audit: blur is {blur}, expected at least 0.")
    runs, labels, reasons = _match(table, manifest, tests, rows)
    kept = [row for row in tests if row not in reasons]
    require_labels([labels[row] for row in kept], task)
    order = file_order(kept, [int(labels[row] == 1) for row in kept])
    samples = tuple(kept[i] for i in order)
    numbers = np.array([labels[row] for row in samples], np.int64)
    by_run = {key: [found[row] for row in samples] for key, found in runs.items()}
    last = [key for key in by_run if key[0] == max(epoch for epoch, _ in by_run)]  # the draws of the last epoch
    mapped = [row.map is not None for found in by_run.values() for row in found]
    if any(mapped) and not all(mapped):
        raise ManifestError(f"{table}: {mapped.count(False)} of {len(mapped)} rows have no map, expected all or none.")
    given: NDArray[np.float64] | None = None
    shuffled: tuple[float, ...] = ()
    if any(mapped):
        scoring = Scoring(blur=blur, pooling=pooling)
        scores, shuffled = _score_maps(by_run, last, numbers, scoring=scoring, size=size, seed=seed, on_image=on_image)
        if all(row.score is not None for key in last for row in by_run[key]):
            given = np.array([[row.score for row in by_run[key]] for key in last], np.float64)
    else:
        values = {key: np.array([row.score for row in found], np.float64) for key, found in by_run.items()}
        scores = {key: RunScores(one, one, None) for key, one in values.items()}
    epochs = {epoch: tuple(scores[key] for key in by_run if key[0] == epoch) for epoch, _ in by_run}
    return Runs(
        source=str(source),
        method="files",
        task=task,
        shots=shots,
        samples=samples,
        labels=numbers,
        unreadable=tuple((row, reasons[row]) for row in tests if row in reasons),
        draws=tuple(scores[key] for key in last),
        shuffled=shuffled,
        epochs=epochs if len(epochs) > 1 else {},
        given=given,
        notes=_notes(any(mapped), blur, size, len(epochs)),
    )


def _score_maps(
    by_run: Mapping[tuple[int, int], Sequence[_Row]],
    last: Sequence[tuple[int, int]],
    labels: NDArray[np.int64],
    *,
    scoring: Scoring,
    size: tuple[int, int] | None,
    seed: int,
    on_image: Callable[[object], None],
) -> tuple[dict[tuple[int, int], RunScores], tuple[float, ...]]:
    """Scores by (epoch, draw), and the AUROC of a shuffled loader for the draws of the last epoch."""
    height, width = shape = _load(by_run[last[0]][0], size).shape
    kept = last[: draws_to_keep(len(last), len(labels), (height, width))]
    scores, collectors = {}, []
    with tempfile.TemporaryDirectory(prefix="anatomaly-") as folder:
        for key, found in by_run.items():
            file = Path(folder) / f"draw_{key[1]}" if key in kept else None
            collector = Collector(sound=scoring, released=scoring, file=file)
            for row in found:
                collector.add(_load(row, size, shape)[None])
                on_image(row)
            scores[key] = collector.finish()
            if file is not None:
                collectors.append(collector)
        return scores, shuffled_draws(collectors, labels, seed=seed)


def _notes(mapped: bool, blur: float, size: tuple[int, int] | None, epochs: int) -> tuple[str, ...]:
    notes = []
    if not mapped:
        notes.append(
            f"These are scores without maps: the blur across the batch (`{ACROSS}`) needs the maps and is left out."
        )
    elif blur == 0:
        notes.append(f"The maps are taken as blurred already: `{ACROSS}` blurs along the batch only.")
    else:
        notes.append(f"The maps are taken as unblurred; every protocol blurs them in the plane with sigma {blur:g}.")
    if size is not None:
        notes.append(f"The maps were resampled to {size[0]} x {size[1]}.")
    if epochs < 2:
        notes.append(
            "What choosing the epoch by test labels adds cannot be told: the table has no column `epoch` with several "
            "epochs."
        )
    return tuple(notes)


def _find_table(source: Path) -> Path:
    if source.is_dir():
        known = [source / name for name in ("scores.csv", SCORES) if (source / name).is_file()]
        found = known or sorted(source.glob("*.csv"))
        if len(found) != 1:
            which = "tables of scores" if known else "CSV files"
            raise ManifestError(
                f"{source}: holds {len(found)} {which}, expected scores.csv, {SCORES} or a single one. {_ADVICE}"
            )
        return found[0]
    return source


def _read(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names in lower case, and the rows."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        lines = list(reader)
    except (OSError, ValueError, csv.Error) as err:
        raise ManifestError(f"{table}: cannot be read as a table ({err}). {_ADVICE}") from err
    for number, line in enumerate(lines, start=1):
        if None in line or None in line.values():
            raise ManifestError(f"{table}: row {number} has more or fewer cells than the header.")
    if not {"path", "map"} & set(columns):
        raise ManifestError(
            f"{table}: has no column path or map, got {', '.join(columns) or 'an empty file'}. {_ADVICE}"
        )
    return columns, [{name: cell.strip() for name, cell in line.items()} for line in lines]


def _rows(
    table: Path, columns: Sequence[str], lines: Sequence[Mapping[str, str]], task: str, shots: int | None
) -> list[_Row]:
    """The rows of the task and of one K, failed ones without score and map."""
    known = {cells["shots"] for cells in lines if cells.get("shots")}
    if len(known) > 1 and str(shots) not in known:
        raise ConfigError(f"{table}: holds shots {', '.join(sorted(known))}, got {shots}. Choose one with --shots.")
    folders = [folder for folder in (table.parent / "maps", table.parent) if folder.is_dir()]
    rows = []
    for number, cells in enumerate(lines, start=1):
        where = f"{table}: row {number}"
        other_shots = len(known) > 1 and cells["shots"] != str(shots)
        if cells.get("task", task) not in (task, "") or other_shots:
            continue
        failed = cells.get("status", "ok") == "error"
        score = None if failed or not cells.get("score") else _number(cells["score"], f"{where}: score")
        rows.append(
            _Row(
                where=where,
                cells=cells,
                score=score,
                map=None if failed else _map_file(cells, folders, where, asked="map" in columns),
                epoch=_whole(cells.get("epoch", ""), f"{where}: epoch"),
                draw=_whole(cells.get("draw", ""), f"{where}: draw"),
            )
        )
    if not rows:
        raise ManifestError(f"{table}: has no rows of task {task!r}. {_ADVICE}")
    return rows


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ManifestError(f"{where} is {cell!r}, expected a finite number. Leave it empty where the tool failed.")
    return value


def _whole(cell: str, where: str) -> int:
    try:
        return int(float(cell)) if cell else 0
    except (ValueError, OverflowError) as err:
        raise ManifestError(f"{where} is {cell!r}, expected a whole number.") from err


def _map_file(cells: Mapping[str, str], folders: Sequence[Path], where: str, *, asked: bool) -> Path | None:
    """The map a row names, or the one with its image's name where the table has no column for it."""
    named = cells.get("map", "").replace("\\", "/")
    if not named and (asked or not cells.get("path")):
        return None
    name = named or f"{_stem(cells['path'])}.npy"
    found = next((folder / name for folder in reversed(folders) if (folder / name).is_file()), None)
    found = found or next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None and named:
        raise ReadError(f"{where}: the map {named} does not exist, expected it beside the table or in its folder maps.")
    return found


def _stem(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name.rsplit(".", 1)[0]


def _load(row: _Row, size: tuple[int, int] | None, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
    """One map, (H, W) float32, finite."""
    assert row.map is not None
    try:
        found = np.load(row.map, allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise ReadError(
            f"{row.map}: is not a .npy array of numbers. Save it with numpy.save, without objects."
        ) from err
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.squeeze().ndim != 2:
        got = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise ReadError(f"{row.map}: got {got}, expected a (height, width) array of numbers.")
    plane = np.ascontiguousarray(found.squeeze(), np.float32)
    if not np.isfinite(plane).all():
        raise ReadError(
            f"{row.map}: holds NaN or infinite values, expected finite ones. Mend the map or leave its row out."
        )
    if size is not None:
        from PIL import Image

        resized = Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        plane = np.asarray(resized, np.float32)
    if shape is not None and plane.shape != shape:
        raise ReadError(
            f"{row.map}: is {plane.shape[0]} x {plane.shape[1]}, the first map {shape[0]} x {shape[1]}; the blur "
            "across a batch needs one size. Export the maps before they are resized, or give --size '[128,128]'."
        )
    return plane


def _match(
    table: Path, manifest: Manifest, tests: Sequence[Sample], rows: Sequence[_Row]
) -> tuple[dict[tuple[int, int], dict[Sample, _Row]], dict[Sample, int | None], dict[Sample, str]]:
    """Rows by (epoch, draw) and image, the images' labels, and why some have no score."""
    ends: defaultdict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for image in manifest:  # all rows: a training image's row must not be taken for a test image of the same name
        parts = image.path.absolute().parts
        for length in range(1, len(parts) + 1):
            ends[parts[-length:]].append(image)
    stems: defaultdict[str, list[Sample]] = defaultdict(list)
    for image in tests:
        stems[_stem(image.path.name)].append(image)
    wanted = set(tests)
    runs: defaultdict[tuple[int, int], dict[Sample, _Row]] = defaultdict(dict)
    labels: dict[Sample, int | None] = {image: image.label for image in tests}
    reasons: dict[Sample, str] = {}
    for row in rows:
        sample = _sample_of(row, ends, stems)
        if sample is None or sample not in wanted:
            continue
        run = runs[row.epoch, row.draw]
        if sample in run:
            raise ManifestError(f"{row.where}: {sample.name} has two rows in one draw, expected one. {_ADVICE}")
        run[sample] = row
        if row.score is None and row.map is None:
            reasons[sample] = row.cells.get("error") or "the tool gave no score"
        if row.cells.get("label"):
            label = label_of(row.cells["label"], row.where)
            if labels[sample] not in (None, label):
                raise ManifestError(
                    f"{row.where}: {sample.name} has label {label}, the manifest says {labels[sample]}."
                )
            labels[sample] = label
    if not runs:
        raise ManifestError(f"{table}: no row fits a test image of the manifest. {_ADVICE}")
    for image in tests:
        lacking = [key for key, run in runs.items() if image not in run]
        if 0 < len(lacking) < len(runs):
            epoch, draw = lacking[0]
            raise ManifestError(f"{table}: {image.name} has no row in epoch {epoch}, draw {draw}, but in others.")
        if lacking:
            reasons[image] = "the table has no row for it"
    return dict(sorted(runs.items())), labels, reasons


def _sample_of(
    row: _Row, ends: Mapping[tuple[str, ...], Sequence[Sample]], stems: Mapping[str, Sequence[Sample]]
) -> Sample | None:
    """The manifest row that a table's row is about; None if it is of no known image."""
    frame = _whole(row.cells["frame"], f"{row.where}: frame") if row.cells.get("frame") else None
    path = row.cells.get("path", "").replace("\\", "/")
    parts = PurePosixPath(path).parts
    found: Sequence[Sample] = ()
    for length in range(len(parts), 0, -1):
        if found := [sample for sample in ends.get(parts[-length:], ()) if sample.frame == frame]:
            break
    if not path:
        found = stems.get(_stem(row.cells["map"]), ())
    if len(found) > 1:
        raise ManifestError(
            f"{row.where}: {path or row.cells['map']} fits {len(found)} images of the manifest, expected one. Give "
            "more of the path."
        )
    return found[0] if found else None
