"""Write the verdicts of a run as they arrive.

A run leaves `scores.csv` and `scores.jsonl` (one row per image, unreadable ones included), `maps/<stem>.npy` (float32
on the source grid) and `overlays/<stem>.png`.  Every row is on disk before the next image is looked at, and a failed
write never leaves half a row.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.files import Appender, output_error, write_whole
from anatomaly.results.pictures import checked_scale, encode_picture, overlay
from anatomaly.tables import csv_bytes
from anatomaly.types import Prediction, Sample

#: Columns of `scores.csv` that every run has; `weight_0` ... `weight_<K-1>` follow where there is a support bank.
COLUMNS = ("path", "frame", "task", "label", "score", "status", "error", "seconds", "map", "overlay", "p_value", "note")


class ResultWriter:
    """The folder of one run, filled row by row: `with ResultWriter(out, scale=scale) as writer: writer.write(p)`.

    `scores.csv` has the columns of `COLUMNS` and one `weight_<k>` per support image (mean over the levels); its numbers
    have full precision and unknown values are empty.  `scores.jsonl` repeats the rows and adds what does not fit a flat
    table: pixel spacing, weights of every level, names of the support images, colour scale.

    Attributes:
        out: The folder.
        rows: Number of rows written so far.
    """

    def __init__(
        self,
        out: Path,
        *,
        scale: tuple[float, float],
        support_names: Sequence[str] = (),
        maps: bool = True,
        overlays: bool = True,
    ) -> None:
        """Create the folder and both tables.

        Args:
            out: The folder; made if missing.  A folder that holds the scores of another run is refused.
            scale: (low, high) in map units, the colour scale of all overlays.
            support_names: K display names of the support images, in the order of `Prediction.support_weights`.
            maps: Write the maps as arrays.
            overlays: Write the overlays as pictures.

        Raises:
            OutputError: The folder cannot be written to, or already holds scores.
            ValueError: Not low < high.
        """
        self.out = Path(out)
        self.rows = 0
        self._scale = checked_scale(scale)
        self._support_names = tuple(support_names)
        self._columns = (*COLUMNS, *(f"weight_{k}" for k in range(len(self._support_names))))
        self._maps = maps
        self._overlays = overlays
        self._stems: set[str] = set()
        try:
            for folder in [self.out] + [self.out / "maps"] * maps + [self.out / "overlays"] * overlays:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise output_error(Path(err.filename), err) from err
        # JSONL first: it is the fuller record, should the machine die between the two.
        self._tables = Appender([self.out / "scores.jsonl", self.out / "scores.csv"])
        self._tables.append(b"", csv_bytes([self._columns]))

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()

    def write(self, prediction: Prediction) -> None:
        """Write the map, the overlay and then the row of one image; when this returns, all of it is on disk.

        Args:
            prediction: The verdict, or the error that takes its place.

        Raises:
            OutputError: A file cannot be written.  Rows written before stay as they are.
            ValueError: The number of weights is not the number of support names.
        """
        weights = prediction.support_weights
        if self._support_names and weights is not None and weights.shape[1] != len(self._support_names):
            raise ValueError(
                f"ResultWriter.write: {prediction.sample.name} has weights of shape {weights.shape}, "
                f"expected (levels, {len(self._support_names)})."
            )
        row = _row(prediction)
        row["map"], row["overlay"] = self._write_pictures(prediction)
        mean = [None] * len(self._support_names) if weights is None else weights.mean(axis=0, dtype=np.float64).tolist()
        flat = row | {f"weight_{k}": value for k, value in enumerate(mean)}
        full = row | {
            "score": prediction.score if math.isfinite(prediction.score) else None,  # JSON has no NaN
            "spacing": prediction.spacing and [float(length) for length in prediction.spacing],
            "scale": self._scale,
            "support": self._support_names,
            "support_weights": None if weights is None else _json_numbers(weights),
        }
        lines = ((json.dumps(full) + "\n").encode(), csv_bytes([[flat[column] for column in self._columns]]))
        self._tables.append(*lines, kept=self._kept())
        self.rows += 1

    def _write_pictures(self, prediction: Prediction) -> tuple[str | None, str | None]:
        """Write map and overlay where there are any; returns their paths relative to the folder."""
        anomaly_map, image = prediction.anomaly_map, prediction.image
        stem = self._new_stem(prediction.sample)
        map_name = overlay_name = None
        if self._maps and anomaly_map is not None:
            map_name = f"maps/{stem}.npy"
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(anomaly_map, dtype=np.float32), allow_pickle=False)
            self._write_file(map_name, buffer.getvalue())
        if self._overlays and anomaly_map is not None and image is not None:
            overlay_name = f"overlays/{stem}.png"
            self._write_file(overlay_name, encode_picture(overlay(image, anomaly_map, self._scale), kind="PNG"))
        return map_name, overlay_name

    def _write_file(self, name: str, content: bytes) -> None:
        write_whole(self.out / name, content, kept=self._kept())

    def _new_stem(self, sample: Sample) -> str:
        """A file name no other image of the run has, also where the file system ignores case."""
        plain = _plain_name(re.sub(r"(\.nii\.gz|\.[A-Za-z]\w{0,4})$", "", sample.path.name))
        plain += "" if sample.frame is None else f"_{sample.frame:04d}"
        digest = hashlib.sha256(f"{sample.path}#{sample.frame}".encode(errors="surrogateescape")).hexdigest()[:8]
        candidates = itertools.chain(
            (plain, f"{_plain_name(sample.path.parent.name)}_{plain}", f"{plain}-{digest}"),
            (f"{plain}-{digest}-{n}" for n in itertools.count(2)),
        )
        stem = next(each for each in candidates if each.casefold() not in self._stems)
        self._stems.add(stem.casefold())
        return stem

    def _kept(self) -> str:
        return f"The {self.rows} rows written so far are complete."


def _row(prediction: Prediction) -> dict[str, Any]:
    sample = prediction.sample
    failed = prediction.error is not None
    return {
        "path": str(sample.path),
        "frame": sample.frame,
        "task": sample.task,
        "label": sample.label,
        "score": None if failed else float(prediction.score),
        "p_value": None if prediction.p_value is None else float(prediction.p_value),
        "status": "error" if failed else "ok",
        "error": " ".join(prediction.error.split()) if prediction.error is not None else None,
        "note": prediction.note,
        "seconds": float(prediction.seconds),
    }


def _json_numbers(values: NDArray[Any]) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in values.tolist()]


def _plain_name(name: str) -> str:
    """`name` without characters that need quoting, at most 100 bytes, never empty or hidden."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip(".")
    return plain.encode()[:100].decode(errors="ignore") or "image"
