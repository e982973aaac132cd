"""The table of a run: one Parquet file a chunk, whole or absent, with the columns of `scores.csv` and a few more.

Batches of a chunk arrive in any order and from any process; a chunk is written when all its rows are there.  Which
files are there says what is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from anatomaly.files import write_whole
from anatomaly.results.rows import COLUMNS, csv_cells

#: Folder of the partitions.
TABLE = "table"

_TYPES = {
    "frame": pa.int32(),
    "label": pa.int8(),
    **dict.fromkeys(("score", "seconds", "p_value"), pa.float64()),
}
_PLACE = ("chunk", "place", "total")  # on their way only
_END = b"PAR1"


def schema_of(supports: int) -> pa.Schema:
    """Columns of the table: `item` (row of the list of images), those of `scores.csv`, digests of image and model.

    Args:
        supports: Number of support images, each with its column of weights.
    """
    fields = [("item", pa.int64()), *((name, _TYPES.get(name, pa.string())) for name in COLUMNS)]
    fields += [(f"weight_{k}", pa.float64()) for k in range(supports)]
    return pa.schema([*fields, ("sha256", pa.string()), ("model", pa.string())])


def table_of(
    rows: Sequence[Mapping[str, Any]], supports: int, model: str, *, chunk: int, place: int, total: int
) -> pa.Table:
    """Rows of a batch as columns, with their place.

    Args:
        rows: As `results.rows.row_of` makes them, with `item`.
        supports: Number of support images.
        model: Digest of the model.
        chunk: The batch is part of it.
        place: Of its first row in the chunk.
        total: Rows of the chunk where this is its last batch, else -1.
    """
    schema = schema_of(supports)
    cells = [[row["item"], *csv_cells(row, supports), row["sha256"], model] for row in rows]
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*cells, strict=True), schema, strict=True)]
    count = len(rows)
    numbers = (np.full(count, chunk), np.arange(place, place + count), np.full(count, total))
    return pa.table([*map(pa.array, numbers), *arrays], names=[*_PLACE, *schema.names])


def finished_chunks(out: Path) -> NDArray[np.int64]:
    """Numbers of the chunks whose file is there as a whole, ascending."""
    found = [re.fullmatch(r"part-(\d{6,})\.parquet", file.name) for file in (out / TABLE).glob("part-*.parquet")]
    whole = [int(match[1]) for match in found if match and _is_whole(out / TABLE / match[0])]
    return np.array(sorted(whole), np.int64)


def write_chunks(blocks: Iterable[pa.Table], out: Path) -> Iterator[int]:
    """Write the chunks that blocks of rows make up, each as soon as it is complete.

    Args:
        blocks: Tables from `table_of`, cut and ordered as it may be.
        out: Folder of the run.

    Yields:
        The number of each chunk that was written.

    Raises:
        OutputError: One cannot be written; those written before stay.
    """
    waiting: dict[int, list[pa.Table]] = {}
    for block in blocks:
        for number in np.unique(block["chunk"].to_numpy()).tolist():
            waiting.setdefault(number, []).append(block.filter(pa.compute.equal(block["chunk"], number)))
            rows = sum(part.num_rows for part in waiting[number])
            if rows == max(pa.compute.max(part["total"]).as_py() for part in waiting[number]):
                table = pa.concat_tables(waiting.pop(number)).sort_by("place").drop_columns(_PLACE)
                content = pa.BufferOutputStream()
                pq.write_table(table, content)
                write_whole(out / TABLE / f"part-{number:06d}.parquet", content.getvalue().to_pybytes())
                yield number


def _is_whole(file: Path) -> bool:
    """Whether a Parquet file has its end: a machine without power may lose what it had written."""
    try:
        with file.open("rb") as stream:
            stream.seek(-len(_END), 2)
            return stream.read() == _END
    except OSError:
        return False
