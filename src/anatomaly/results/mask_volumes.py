"""The marked pixels of every NIfTI file of a run as one volume of 0 and 1 on the file's own voxels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anatomaly.data.volumes import write_volume
from anatomaly.errors import AnatomalyError
from anatomaly.results.marking import Marking, marked, rows_with_maps


def write_mask_volumes(out: Path, marking: Marking) -> tuple[str, ...]:
    """Write `maps/NAME_mask.nii.gz` beside every `maps/NAME_map.nii.gz` of a finished run.

    Shape, axis order, affine and units are those of the source; slices that were not judged are 0.

    Args:
        out: The folder of the run, with its `scores.jsonl`.
        marking: Which pixels are marked.

    Returns:
        Lines to tell about volumes that could not be written; they cost nothing else.
    """
    volumes: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows_with_maps(out):
        if row["map_volume"] is not None and row["axis"] is None:
            volumes[row["map_volume"]][int(row["frame"] or 0)] = row
    told = []
    for name, rows in volumes.items():
        mask = name.removesuffix("_map.nii.gz")
        mask = f"{mask}_mask.nii.gz" if mask != name else name.replace("_map_", "_mask_")
        source = Path(next(iter(rows.values()))["path"])
        try:
            write_volume(_Masks(out, rows, marking), source, out / mask, dtype=np.uint8)
        except (AnatomalyError, OSError, ValueError) as err:
            reason = str(err) if isinstance(err, AnatomalyError) else type(err).__name__
            told.append(f"{mask} could not be made: {' '.join(reason.split())}")
    return tuple(told)


class _Masks(Mapping[int, NDArray[np.bool_]]):
    """Marked pixels by slice, each made when it is asked for."""

    def __init__(self, out: Path, rows: Mapping[int, dict[str, Any]], marking: Marking) -> None:
        self._out, self._rows, self._marking = out, rows, marking

    def __getitem__(self, index: int) -> NDArray[np.bool_]:
        row = self._rows[index]
        anomaly_map = np.load(self._out / row["map"], allow_pickle=False)
        return marked(anomaly_map, score=row["score"], p_value=row["p_value"], marking=self._marking)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
