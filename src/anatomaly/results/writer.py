"""Write the verdicts of a run as they arrive.

A run leaves `scores.csv` and `scores.jsonl` (one row per image, unreadable ones included), `maps/<stem>.npy` (float32
on the source grid), `maps/<name>_map.nii.gz` for a NIfTI file and `overlays/<stem>.png`.  Every row is on disk before
the next image is looked at, and a failed write never leaves half a row.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anatomaly.errors import OutputError
from anatomaly.files import Appender, output_error, write_whole
from anatomaly.results.map_volumes import MapVolumes
from anatomaly.results.names import Stems
from anatomaly.results.pictures import checked_scale, encode_picture, overlay
from anatomaly.results.rows import COLUMNS, Stored, csv_cells, map_shape, prediction_of, row_of
from anatomaly.tables import csv_bytes
from anatomaly.types import Prediction

_OF_ONE_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # the file system takes other names


class ResultWriter:
    """The folder of one run, filled row by row: `with ResultWriter(out, scale=scale) as writer: writer.write(p)`.

    `scores.csv` has the columns of `COLUMNS` and one `weight_<k>` per support image (mean over the levels); its numbers
    have full precision and unknown values are empty.  `scores.jsonl` repeats the rows and adds what does not fit a flat
    table: digest of the image, pixel spacing, weights of every level, names of the support images, colour scale.

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
        stored: Sequence[Stored] | None = None,
    ) -> None:
        """Create the folder and both tables, or go on with them.

        Args:
            out: The folder; made if missing.  A folder that holds the scores of another run is refused.
            scale: (low, high) in map units, the colour scale of all overlays.
            support_names: K display names of the support images, in the order of `Prediction.support_weights`.
            maps: Write the maps as arrays, and those of a NIfTI file as one volume.
            overlays: Write the overlays as pictures.
            stored: What `rows.stored_rows` found of the same run; whatever else is in the tables is dropped.  None
                where there must be no tables yet.

        Raises:
            OutputError: The folder cannot be written to, or already holds scores.
            ValueError: Not low < high.
        """
        self.out = Path(out)
        self.rows = 0
        self._scale = checked_scale(scale)
        self._support_names = tuple(support_names)
        self._maps = maps
        self._overlays = overlays
        self._stems = Stems()
        self._volumes = MapVolumes(self.out)
        try:
            for folder in [self.out] + [self.out / "maps"] * maps + [self.out / "overlays"] * overlays:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise output_error(Path(err.filename), err) from err
        # JSONL first: it is the fuller record, should the machine die between the two.
        tables = [self.out / "scores.jsonl", self.out / "scores.csv"]
        columns = (*COLUMNS, *(f"weight_{k}" for k in range(len(self._support_names))))
        if stored is None:
            self._tables = Appender(tables)
            self._tables.append(b"", csv_bytes([columns]))
            return
        done = csv_bytes([columns, *(csv_cells(each.row, len(self._support_names)) for each in stored)])
        write_whole(tables[1], done)
        self._tables = Appender(tables, keep=(stored[-1].end if stored else 0, len(done)))
        for each in stored:
            self._take_up(each)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()

    def write(self, prediction: Prediction) -> Prediction:
        """Write the map, the overlay and then the row of one image; when this returns, all of it is on disk.

        Args:
            prediction: The verdict, or the error that takes its place.

        Returns:
            The prediction as its row says it; its `note` also says which of its files could not be made.

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
        files, notes = self._write_pictures(prediction)
        if notes:
            told = [prediction.note] if prediction.note is not None else []
            prediction = replace(prediction, note="; ".join([*told, *notes]))
        row = row_of(prediction, files, scale=self._scale, support_names=self._support_names)
        line = json.dumps(row, allow_nan=False) + "\n"
        self._tables.append(line.encode(), csv_bytes([csv_cells(row, len(self._support_names))]), kept=self._kept())
        self.rows += 1
        if files["map_volume"] is not None:
            self._volumes.settle(files["map_volume"])
        said = prediction_of(row, prediction.sample)
        return replace(said, image=prediction.image, anomaly_map=prediction.anomaly_map)

    def _take_up(self, stored: Stored) -> None:
        """Count a row that is on disk, as `write` would have."""
        sample, row = stored.prediction.sample, stored.row
        self._stems.new(sample)
        self.rows += 1
        if row["map_volume"] is not None:
            self._volumes.take_up(sample, row["map"], map_shape(self.out / row["map"]) or (), row["map_volume"])

    def finish(self) -> tuple[str, ...]:
        """Write the volumes of maps that miss slices; call it after the last row.

        Returns:
            Lines to tell about the volumes.

        Raises:
            OutputError: One cannot be written.
        """
        return self._volumes.finish()

    @property
    def across(self) -> Mapping[str, Sequence[Path]]:
        """As `MapVolumes.across`, after `finish`."""
        return self._volumes.across

    def _write_pictures(self, prediction: Prediction) -> tuple[dict[str, str | None], list[str]]:
        """Write map and overlay where there are any; returns their names by column, and what could not be made."""
        anomaly_map, image = prediction.anomaly_map, prediction.image
        stem = self._stems.new(prediction.sample)
        files: dict[str, str | None] = {"map": None, "overlay": None, "map_volume": None}
        notes = []
        if self._maps and anomaly_map is not None:
            try:
                self._write_file(name := f"maps/{stem}.npy", _npy_bytes(anomaly_map))
                files["map"] = name
                files["map_volume"] = self._volumes.add(prediction.sample, name, anomaly_map.shape)
            except Exception as err:  # one image's trouble must not cost the others
                notes.append(f"{'in no map volume' if files['map'] else 'no map'} ({_reason(err)})")
        if self._overlays and anomaly_map is not None and image is not None:
            try:
                picture = encode_picture(overlay(image, anomaly_map, self._scale), kind="PNG")
                self._write_file(name := f"overlays/{stem}.png", picture)
                files["overlay"] = name
            except Exception as err:
                notes.append(f"no overlay ({_reason(err)})")
        return files, notes

    def _write_file(self, name: str, content: bytes) -> None:
        write_whole(self.out / name, content, kept=self._kept())

    def _kept(self) -> str:
        return f"The {self.rows} rows written so far are complete."


def _npy_bytes(anomaly_map: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(anomaly_map, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def _reason(err: Exception) -> str:
    """Why a picture could not be made, in one line; an error that no later image would be spared is raised again."""
    if isinstance(err, OutputError) and getattr(err.__cause__, "errno", None) not in _OF_ONE_NAME:
        raise err
    return " ".join(f"{type(err).__name__}: {err}".split()).rstrip(".")
