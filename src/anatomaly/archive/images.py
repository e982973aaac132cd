"""The list of images of a run as a compact table on disk, cut into chunks that any process can read on its own.

The list may have any length: it goes from its source to disk piece by piece, and nobody ever holds all of it.  A chunk
is one row group of a Parquet file.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from anatomaly.archive.remote import is_remote, list_remote, open_remote
from anatomaly.data import words
from anatomaly.data.listing import describe, list_files, sort_naturally, stem
from anatomaly.data.manifest import is_plain_folder, is_table, load_manifest, row_of_csv, tell_misspelt
from anatomaly.data.spreadsheet import TABLE_SUFFIXES, read_rows
from anatomaly.errors import AnatomalyError, ManifestError
from anatomaly.files import output_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from anatomaly.types import Sample

#: One row a file, or an image of it: `whole` says that a file of several images is to be judged image by image.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("frame", pa.int32()),
        ("task", pa.string()),
        ("label", pa.int8()),
        ("patient_id", pa.string()),
        ("whole", pa.bool_()),
    ]
)

_CHUNKS_PER_FILE = 256
_PIECE = 2**16  # rows on their way
_ABSOLUTE = r"^(/|[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9+.-]*://)"


class ImageList(NamedTuple):
    """A list of images that `write_images` wrote.

    Attributes:
        folder: Where it lies.
        rows: How many files or images it names.
        chunk: Rows of a chunk; the last one may have fewer.
        digest: What it says, as a digest.
    """

    folder: Path
    rows: int
    chunk: int
    digest: str

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk)

    def read(self, number: int) -> list[dict[str, Any]]:
        """The rows of chunk `number`, from 0, by column.

        Raises:
            ManifestError: The list is not there, as on a machine that does not see the folder.
        """
        file = self.folder / f"{number // _CHUNKS_PER_FILE:06d}.parquet"
        try:
            with pq.ParquetFile(file) as stream:
                rows: list[dict[str, Any]] = stream.read_row_group(number % _CHUNKS_PER_FILE).to_pylist()
        except (OSError, pa.ArrowException) as err:
            raise ManifestError(
                f"{file}: cannot be read. On several machines --out must be a folder that all of them see."
            ) from err
        return rows


def write_images(
    source: str, folder: Path, *, task: str, chunk: int, tell: Callable[[str], None] = lambda line: None
) -> ImageList:
    """Write the list of images that a source names.

    Args:
        source: A table (Parquet; CSV and the like as `load_manifest` reads them), a folder, one image, or an address
            of a table or folder.
        folder: Where to; made if missing.
        task: Name of the task where the source does not name it.
        chunk: Rows of a chunk.
        tell: Called with a line on what was left out.

    Raises:
        ManifestError: The source is not there, names no image, or has no column `path`.
        OutputError: The list cannot be written.
    """
    digest, rows = hashlib.sha256(), 0
    writer = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(_chunks(_pieces(source, task, tell), chunk)):
            if number % _CHUNKS_PER_FILE == 0:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(folder / f"{number // _CHUNKS_PER_FILE:06d}.parquet", SCHEMA)
            assert writer is not None
            writer.write_batch(batch)
            digest.update(_plain(batch).serialize())
            rows += batch.num_rows
    except OSError as err:
        raise output_error(folder, err) from err
    finally:
        if writer is not None:
            writer.close()
    if not rows:
        raise ManifestError(f"{source}: holds no images.")
    return ImageList(folder, rows, chunk, digest.hexdigest())


def _chunks(pieces: Iterable[pa.Table], chunk: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `chunk`, the last one shorter."""
    waiting = SCHEMA.empty_table()
    for piece in pieces:
        waiting = pa.concat_tables([waiting, piece])
        whole = waiting.num_rows // chunk * chunk
        for start in range(0, whole, chunk):
            yield _one(waiting.slice(start, chunk))
        waiting = waiting.slice(whole)
    if waiting.num_rows:
        yield _one(waiting)


def _one(table: pa.Table) -> pa.RecordBatch:
    columns = [pa.concat_arrays(column.chunks) for column in table.columns]
    return pa.record_batch(columns, schema=SCHEMA)


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same as text without gaps, which lies in memory in one way only."""
    return pa.record_batch([pc.fill_null(column.cast(pa.string()), "\0") for column in batch.columns], SCHEMA.names)


def _pieces(source: str, task: str, tell: Callable[[str], None]) -> Iterator[pa.Table]:
    """The rows of a source, piece by piece."""
    suffix = Path(source.partition("::")[0]).suffix.lower()
    if suffix == ".parquet" or (is_remote(source) and suffix in TABLE_SUFFIXES):
        return _of_arrow(source, task)
    if is_remote(source):
        return _of_paths(_remote_images(source, tell), task)
    path = Path(source)
    if suffix in TABLE_SUFFIXES and path.is_file():
        return _of_rows(_csv_rows(path, task))
    if path.is_dir() and is_plain_folder(path):
        images, left_out = list_files(path)
        if left_out:
            tell(f"{source}: {describe(left_out)}")
        return _of_paths(map(str, images), task)
    if path.is_file() and not is_table(path):
        return _of_paths([source], task)
    manifest = load_manifest(path, task=task)
    if manifest.left_out:
        tell(f"{source}: {describe(manifest.left_out)}")
    return _of_rows((str(each.path), each) for each in manifest.samples)


def _of_paths(paths: Iterable[str], task: str) -> Iterator[pa.Table]:
    for some in _some(paths):
        yield _table(some, task=[task] * len(some), whole=[True] * len(some))


def _of_rows(rows: Iterable[tuple[str, Sample]]) -> Iterator[pa.Table]:
    for some in _some(rows):
        columns = {name: [getattr(row, name) for _, row in some] for name in ("frame", "task", "label", "patient_id")}
        yield _table([path for path, _ in some], **columns)


def _table(paths: list[str], **columns: list[Any]) -> pa.Table:
    nothing = [None] * len(paths)
    filled = {"path": paths, "whole": [False] * len(paths), **columns}
    return pa.table([pa.array(filled.get(field.name, nothing), field.type) for field in SCHEMA], schema=SCHEMA)


def _some(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Items in lists of at most `_PIECE`."""
    some = []
    for item in items:
        some.append(item)
        if len(some) == _PIECE:
            yield some
            some = []
    if some:
        yield some


def _csv_rows(path: Path, task: str) -> Iterator[tuple[str, Sample]]:
    told = False
    for number, cells in read_rows(path):
        if not told:
            tell_misspelt(cells, path)
            told = True
        row = row_of_csv(cells, path.parent, task, f"{path}: row {number}")
        yield cells["path"] if is_remote(cells["path"]) else str(row.path), row


def _remote_images(address: str, tell: Callable[[str], None]) -> list[str]:
    """Files below an address that are named as images; what files hold is not looked at from afar."""
    found = list_remote(address)
    images = [each for each in found if _named_as_image(each.partition("::")[0].rpartition("/")[2])]
    if len(images) < len(found):
        tell(f"{address}: {len(found) - len(images)} files left out: not named as an image.")
    return sort_naturally(images)


def _named_as_image(name: str) -> bool:
    return stem(name) != name and not name.startswith(".") and not stem(name).lower().endswith("_mask")


def _of_arrow(source: str, task: str) -> Iterator[pa.Table]:
    """Rows of a Parquet table, or of a CSV table elsewhere."""
    import pyarrow.dataset as ds

    remote = is_remote(source)
    files, path = open_remote(source) if remote else (None, source)
    kind = "parquet" if source.partition("::")[0].lower().endswith(".parquet") else "csv"
    try:
        table = ds.dataset(path, filesystem=files, format=kind)
        names = {name.lower(): name for name in table.schema.names}
        if "path" not in names:
            shown = ", ".join(table.schema.names[:20]) or "none"
            raise ManifestError(f"{source}: has no column path, got {shown}.")
        tell_misspelt(names, source)
        wanted = {name: pc.field(names[name]) for name in SCHEMA.names if name in names and name != "whole"}
        where = source.rpartition("/")[0] if remote else str(Path(source).parent)
        for batch in table.to_batches(columns=wanted, batch_size=_PIECE):
            yield _checked(batch, source, "" if where in ("", ".") else f"{where}/", task)
    except AnatomalyError:
        raise
    except FileNotFoundError as err:
        raise ManifestError(f"{source}: no such file or folder.") from err
    except (OSError, pa.ArrowException, ValueError) as err:
        raise ManifestError(f"{source}: cannot be read as a table ({' '.join(str(err).split())[:200]}).") from err


def _checked(batch: pa.RecordBatch, source: str, where: str, task: str) -> pa.Table:
    """The columns of the list; relative paths start at the folder of the table."""
    rows = batch.num_rows
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    path = columns["path"].cast(pa.string())
    if path.null_count or pc.any(pc.equal(path, "")).as_py():
        raise ManifestError(f"{source}: a path is empty.")
    if where:
        absolute = pc.match_substring_regex(path, _ABSOLUTE)
        path = pc.if_else(absolute, path, pc.binary_join_element_wise(where, path, ""))
    named = columns["task"].cast(pa.string()) if "task" in columns else pa.nulls(rows, pa.string())
    patient = columns["patient_id"].cast(pa.string()) if "patient_id" in columns else pa.nulls(rows, pa.string())
    made = {
        "path": path,
        "frame": _frames(columns.get("frame"), source),
        "task": pc.if_else(pc.equal(pc.fill_null(named, ""), ""), task, named),
        "label": _labels(columns.get("label"), source),
        "patient_id": pc.if_else(pc.equal(patient, ""), None, patient),
        "whole": pa.array([False] * rows),
    }
    arrays = [pa.nulls(rows, field.type) if made[field.name] is None else made[field.name] for field in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def _frames(column: pa.Array | None, source: str) -> pa.Array | None:
    if column is None:
        return None
    try:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        return column.cast(pa.int32())
    except pa.ArrowException as err:
        raise ManifestError(f"{source}: a frame is no whole number, expected 0, 1, 2, ... or nothing.") from err


def _labels(column: pa.Array | None, source: str) -> pa.Array | None:
    """0, 1 or nothing, from numbers or words."""
    if column is None:
        return None
    coded = column.cast(pa.string()).dictionary_encode()
    means = [
        None if not word.strip() else words.label_of(re.sub(r"\.0$", "", word), source)
        for word in coded.dictionary.to_pylist()
    ]
    return pa.array(means, pa.int8()).take(coded.indices)
