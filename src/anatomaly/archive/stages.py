"""The two stages that Ray Data runs in processes of their own: read images, judge images.

What passes between them is a batch: the inputs of up to `batch_size` images as they lie in memory, grey ones as one
channel, and what else is known of each in JSON.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from anatomaly.archive.remote import fetch, is_remote
from anatomaly.archive.table import table_of
from anatomaly.data.decoding import limit_decoded
from anatomaly.data.layouts import samples_of
from anatomaly.data.loading import Loaded, load_batches, read_ahead
from anatomaly.data.transforms import Prepared
from anatomaly.errors import ReadError
from anatomaly.files import write_whole
from anatomaly.results.folder import with_finite_score
from anatomaly.results.rows import row_of
from anatomaly.types import Image, Origin, Sample

if TYPE_CHECKING:
    from anatomaly.archive.images import ImageList
    from anatomaly.detector.detector import Detector
    from anatomaly.types import Prediction, Preprocessing

_FACTS = ("frame", "task", "label", "patient_id")  # of a sample
_OF_IMAGE = [each.name for each in fields(Image) if each.name not in ("pixels", "path")]


class Item(NamedTuple):
    """An image of a chunk.

    Attributes:
        sample: What is read; its path may be that of a copy.
        path: What it is called.
        number: Of its row in the list of images.
        error: Why there is nothing to read, or None.
    """

    sample: Sample
    path: str
    number: int
    error: str | None = None

    def named(self, loaded: Loaded) -> Loaded:
        """What became of it, under the name it is called by."""
        told = loaded.error and loaded.error.replace(str(self.sample.path), self.path)
        return loaded._replace(sample=replace(self.sample, path=Path(self.path)), error=self.error or told)


class Reader:
    """Rows of the list of images in, prepared images out: fetch, decode, prepare.

    Args:
        preprocessing: Of the support bank.
        batch_size: Images of a batch.
        root: Where relative paths start.
    """

    def __init__(self, preprocessing: Preprocessing, batch_size: int, root: Path) -> None:
        self.preprocessing, self.batch_size, self.root = preprocessing, batch_size, root

    def load(self, rows: Sequence[Mapping[str, Any]], first: int = 0) -> Iterator[list[tuple[Item, Loaded]]]:
        """Prepare rows of the list, in order; what cannot be read has its error and ends nothing.

        Args:
            rows: As `ImageList.read` gives them.
            first: Number of the first one.
        """
        items: deque[Item] = deque()

        def samples(copies: Path) -> Iterator[Sample]:
            numbered = enumerate(rows, first)
            for found in read_ahead(
                numbered, lambda each: self._items(*each, copies), rows=self.batch_size, size=lambda found: 0
            ):
                items.extend(found)
                yield from (each.sample for each in found)

        there: set[Path] = set()
        with tempfile.TemporaryDirectory(prefix="anatomaly-") as copies:
            for batch in load_batches(samples(Path(copies)), self.preprocessing, batch_size=self.batch_size):
                told = [(item := items.popleft(), item.named(each)) for each in batch]
                yield told
                there |= {item.sample.path for item, _ in told if is_remote(item.path)}
                for copy in there - {told[-1][0].sample.path}:  # of the last one there may be more images to come
                    copy.unlink(missing_ok=True)
                there &= {told[-1][0].sample.path}

    def _items(self, number: int, row: Mapping[str, Any], copies: Path) -> list[Item]:
        """The images of a row of the list: of a file that counts as a whole all there are."""
        path, error = row["path"], None
        place = self.root / path
        if is_remote(path):
            try:
                place = fetch(path, copies, number)
            except ReadError as err:
                place, error = copies / str(number), str(err)
        facts = {name: row[name] for name in _FACTS}
        frames: list[int | None] = [facts.pop("frame")]
        if row["whole"] and error is None:
            frames = [each.frame for each in samples_of(place, task="")]
        return [Item(Sample(place, frame=frame, **facts), path, number, error) for frame in frames]


class ReadChunks:
    """The first stage: chunk numbers in, batches out.

    Args:
        images: The list.
        reader: How its rows are read.
        max_decoded_gib: As `decoding.limit_decoded`.
    """

    def __init__(self, images: ImageList, reader: Reader, max_decoded_gib: float) -> None:
        self.images, self.reader = images, reader
        limit_decoded(max_decoded_gib)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Read the chunks that a block of column `chunk` names."""
        for chunk in block["chunk"].to_pylist():
            place, waiting = 0, list[tuple[Item, Loaded]]()
            for batch in self.reader.load(self.images.read(chunk), chunk * self.images.chunk):
                if waiting:  # one behind, so that the last one can say that it is the last
                    yield _packed(waiting, chunk, place, -1)
                place, waiting = place + len(waiting), batch
            yield _packed(waiting, chunk, place, place + len(waiting))


class JudgeBatches:
    """The second stage: batches in, rows of the table out.

    Args:
        detector: With its support.  It is made anew on this process's device.
        device: "auto", "cpu" or "cuda".
        threads: Of torch.
        maps: Folder for maps, or None.
    """

    def __init__(self, detector: Detector, device: str, threads: int, maps: Path | None) -> None:
        import torch

        torch.set_num_threads(threads)
        self.detector, self.maps = _moved(detector, device), maps

    def __call__(self, batches: pa.Table) -> pa.Table:
        """Judge the batches of a block."""
        return pa.concat_tables([self._judged(**batch) for batch in batches.to_pylist()])

    def _judged(self, chunk: int, place: int, total: int, facts: str, shape: Sequence[int], inputs: bytes) -> pa.Table:
        since, bank = time.perf_counter(), self.detector.ready()
        stack = np.frombuffer(inputs, np.float32).reshape(shape)
        known = json.loads(facts)
        arrays = iter(np.broadcast_to(each, (3, *each.shape[1:])) for each in stack)
        loaded = [_unpacked(each, None if each["image"] is None else next(arrays)) for each in known]
        rows = []
        for number, prediction in enumerate(self.detector.judge(loaded, since=since), place):
            written = self._write_map(prediction, f"{chunk:06d}/{number:06d}.npy")
            prediction = with_finite_score(prediction)
            row = row_of(prediction, written, scale=bank.map_range, support_names=bank.names)
            rows.append({**row, "path": known[number - place]["path"], "item": known[number - place]["number"]})
        return table_of(rows, bank.shots, self.detector.model_hash, chunk=chunk, place=place, total=total)

    def _write_map(self, prediction: Prediction, name: str) -> dict[str, str | None]:
        files: dict[str, str | None] = {"map": None, "overlay": None, "map_volume": None}
        if self.maps is not None and prediction.anomaly_map is not None:
            content = io.BytesIO()
            np.save(content, np.ascontiguousarray(prediction.anomaly_map, np.float32), allow_pickle=False)
            write_whole(self.maps / name, content.getvalue())
            files["map"] = f"{self.maps.name}/{name}"
        return files


def _moved(detector: Detector, device: str) -> Detector:
    """The same detector with its bank, on a device of this process."""
    from anatomaly.detector.detector import Detector

    moved = Detector(
        detector.method,
        preprocessing=detector.preprocessing,
        scoring=detector.scoring,
        facts=detector.facts,
        task_intensity=detector.task_intensity,
        device=device,
        precision=detector.precision,
        calibrations=detector.calibrations,
    )
    moved.bank = moved.accept(detector.ready())
    return moved


def _packed(batch: Sequence[tuple[Item, Loaded]], chunk: int, place: int, total: int) -> pa.Table:
    """A batch on its way: `total` is the number of images of the chunk with its last batch, else -1."""
    inputs = [loaded.prepared.input for _, loaded in batch if loaded.prepared is not None]
    if all((each[0] == each[1]).all() and (each[0] == each[2]).all() for each in inputs):
        inputs = [each[:1] for each in inputs]
    stack = np.stack(inputs) if inputs else np.zeros((0, 1, 1, 1), np.float32)
    return pa.table(
        {
            "chunk": [chunk],
            "place": [place],
            "total": [total],
            "facts": [json.dumps([_facts(item, loaded) for item, loaded in batch])],
            "shape": [list(stack.shape)],
            "inputs": pa.array([stack.tobytes()], pa.large_binary()),
        }
    )


def _facts(item: Item, loaded: Loaded) -> dict[str, Any]:
    facts = {name: getattr(item.sample, name) for name in _FACTS}
    facts |= {"path": item.path, "number": item.number, "error": loaded.error, "image": None}
    if loaded.prepared is not None:
        image = loaded.prepared.image
        facts["image"] = {name: getattr(image, name) for name in _OF_IMAGE} | {"shape": image.pixels.shape}
    return facts


def _unpacked(facts: Mapping[str, Any], pixels: np.ndarray[Any, Any] | None) -> Loaded:
    sample = Sample(Path(facts["path"]), **{name: facts[name] for name in _FACTS})
    if pixels is None:
        return Loaded(sample, None, facts["error"])
    told = dict(facts["image"])
    nothing = np.broadcast_to(np.float32("nan"), told.pop("shape"))
    pairs = {name: told[name] and tuple(told[name]) for name in ("value_range", "spacing")}
    origin = told["origin"] and Origin(*told["origin"])
    image = Image(**{**told, **pairs, "origin": origin, "pixels": nothing, "path": sample.path})
    return Loaded(sample, Prepared(pixels, nothing, image))
