"""Judge an archive into a table: the stages as Ray Data runs them, and what goes on where a run was cut short."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from anatomaly.archive.cluster import connected, told_in_a_line
from anatomaly.archive.images import ImageList, write_images
from anatomaly.archive.report import Totals, write_table_report
from anatomaly.archive.shares import Plan, Shares, share_out
from anatomaly.archive.stages import JudgeBatches, ReadChunks, Reader
from anatomaly.archive.table import finished_chunks, write_chunks
from anatomaly.data.decoding import decoded_limit
from anatomaly.results.run_record import alone, begin, facts_of, finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from anatomaly.detector.detector import Detector

#: Folder of the list of images.
IMAGES = "images"

_TASKS = 1000  # at most, into which a run is cut for the readers
_BLOCK = 2**20  # bytes from which a batch goes on its way
_STORE = 2**28  # bytes of memory for batches on their way, at least
_ON_THEIR_WAY = 8  # batches for each process


def predict_to_table(
    detector: Detector,
    source: str,
    out: Path,
    plan: Plan,
    *,
    processors: int,
    task: str = "task",
    bank_images: Sequence[NDArray[np.float32]] = (),
    on_begin: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int], None] = lambda rows: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Totals:
    """Judge all images of a source against the detector's support, into OUT/table and OUT/report.html.

    A run that was cut short goes on when called again with the same model, support, images and options: chunks whose
    partition is there are not judged again.  A file that cannot be read is a row with its error.

    Args:
        detector: With its support set.
        source: As `images.write_images` takes it.
        out: Folder; on several machines one that all of them see.
        plan: How the work is shared out.
        processors: Of this machine.
        task: Name of the task where the source does not name it.
        bank_images: The support images, each (C, H, W) in [0, 1], for the report.
        on_begin: Called once with (rows of the list done before, rows in all).
        on_progress: Called with the number of rows of the list that became done.
        tell: Called with lines on what was left out.

    Raises:
        NotReadyError: The detector has no support; Ray or the cluster is not there, or broke down.
        ManifestError: The source names no images.
        ConfigError: The cluster is too small.
        OutputError: `out` is refused, or cannot be written; what is there is complete.
    """
    calibration, line = detector.find_calibration()
    if line:
        tell(line)
    facts = facts_of(detector, (), calibration=calibration, maps=plan.maps, overlays=False)
    with alone(out):
        images, went_on = _listed(source, out, facts, task=task, chunk=plan.chunk, tell=tell)
        facts |= {"images": images.digest}
        done = finished_chunks(out) if went_on else np.array([], np.int64)
        left = np.setdiff1d(np.arange(images.chunks), done)
        on_begin(images.rows - _rows(images, left), images.rows)
        if left.size:
            with _workplace(plan, processors, detector) as shares, told_in_a_line():
                for chunk in write_chunks(_judged(detector, images, left, out, plan, shares), out):
                    on_progress(_rows(images, np.array([chunk])))
        totals = write_table_report(detector, out, source=source, bank_images=bank_images, calibration=calibration)
        finish(out, facts)
    return totals


def _listed(
    source: str, out: Path, facts: dict[str, Any], *, task: str, chunk: int, tell: Callable[[str], None]
) -> tuple[ImageList, bool]:
    """The list of images, and whether the folder holds an unfinished run of the very same."""
    folder, part = out / IMAGES, out / f"{IMAGES}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        images = write_images(source, part, task=task, chunk=chunk, tell=tell)
        facts |= {"images": images.digest, "engine": "ray", "chunk": chunk}
        went_on = begin(out, facts)
        if not (went_on and folder.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return images._replace(folder=folder.absolute()), went_on


def _rows(images: ImageList, chunks: NDArray[np.int64]) -> int:
    """Rows of the list that some chunks hold."""
    return int(np.minimum(images.chunk, images.rows - chunks * images.chunk).sum())


@contextlib.contextmanager
def _workplace(plan: Plan, processors: int, detector: Detector) -> Iterator[Shares]:
    """Join the cluster, or start one on this machine, and share it out."""
    import torch

    if plan.address is not None:
        with connected(plan.address) as found:
            yield share_out(plan, int(found.get("CPU", 0)), int(found.get("GPU", 0)))
        return
    shares = share_out(plan, processors, torch.cuda.device_count())
    batch = plan.batch_size * math.prod((3, *detector.preprocessing.size)) * 4  # bytes
    store = max(_STORE, _ON_THEIR_WAY * batch * (shares.actors + shares.readers))
    with connected(processors=shares.processors, store=store):
        yield shares


def _judged(
    detector: Detector,
    images: ImageList,
    chunks: NDArray[np.int64],
    out: Path,
    plan: Plan,
    shares: Shares,
) -> Iterator[pa.Table]:
    """Rows of the table, as Ray Data hands them over."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK
    context.execution_options.preserve_order = False
    pool = ray.data.ActorPoolStrategy
    reader = Reader(detector.ready().preprocessing, plan.batch_size, Path.cwd())
    maps = (out / "maps").absolute() if plan.maps else None
    work = [pa.table({"chunk": some}) for some in np.array_split(chunks, min(len(chunks), _TASKS))]
    judged = (
        ray.data.from_arrow(work)
        .map_batches(
            ReadChunks,
            fn_constructor_args=(images, reader, decoded_limit()),
            batch_size=None,
            batch_format="pyarrow",
            compute=pool(size=shares.readers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
        )
        .map_batches(
            JudgeBatches,
            fn_constructor_args=(detector, plan.device, shares.threads, maps),
            batch_size=None,
            batch_format="pyarrow",
            compute=pool(size=shares.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=shares.threads,
            num_gpus=shares.gpus,
        )
    )
    yield from judged.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
