"""What the run in a folder is, so that one that was cut short goes on and no two of them are mixed.

`run.json` is written before anything else and marked as finished after everything else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly._version import __version__
from anatomaly.errors import OutputError
from anatomaly.files import output_error, read_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anatomaly.detector.detector import Detector
    from anatomaly.types import Calibration, Sample

RUN = "run.json"

_FORMAT = 1
_ADVICE = "Choose another output folder, or remove this one."
#: What is compared, and how a difference is told.
_OTHER = {
    "model": "another model",
    "supports": "other support images",
    "images": "other images, or these have changed",
    "task": "another task",
    "preprocessing": "another size or intensity rule",
    "scoring": "another scoring",
    "precision": "another precision",
    "calibration": "another calibration",
    "maps": "another choice of maps",
    "overlays": "another choice of overlays",
    "engine": "another engine",
    "chunk": "another size of chunks",
    "version": "another version of anatomaly",
}


def facts_of(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    calibration: Calibration | None,
    maps: bool,
    overlays: bool,
) -> dict[str, Any]:
    """Everything that the rows and pictures of a run depend on.

    Device and batch size are no part of it: they change scores by less than 1e-5.

    Args:
        detector: With its support set.
        samples: The images to judge, in order.
        calibration: Where the p-values come from.
        maps: Whether maps are written.
        overlays: Whether overlays are written.
    """
    bank = detector.ready()
    placed = (bank.places, bank.near) if bank.places else ()
    found = {
        "model": detector.model_hash,
        "supports": _digest((bank.sha256, bank.names, bank.precision, *placed)),
        "images": _images(samples),
        "task": bank.task,
        "preprocessing": asdict(bank.preprocessing),
        "scoring": asdict(detector.scoring),
        "precision": detector.precision,
        "calibration": calibration and _digest(calibration),
        "maps": maps,
        "overlays": overlays,
        "version": __version__,
    }
    same: dict[str, Any] = json.loads(json.dumps(found))  # as it will be read back
    return same


def refuse_finished(out: Path) -> None:
    """Refuse a folder that no run may be written to, before anything is loaded.

    Raises:
        OutputError: It holds the results of a finished run, or of one that nothing is known about.
    """
    _unfinished(out)


def begin(out: Path, facts: Mapping[str, Any]) -> bool:
    """Write down what the run is.

    Args:
        out: The folder; made if missing.
        facts: From `facts_of`.

    Returns:
        Whether the folder holds an unfinished run of the very same, to go on with.

    Raises:
        OutputError: As `refuse_finished`; or it holds an unfinished run of something else, or cannot be written to.
    """
    found = _unfinished(out)
    left = [] if found is None else [each for kind in ("maps", "overlays", "table") for each in (out / kind).glob("*")]
    whole = [file for file in left if file.suffix != ".part"]
    if found not in (None, facts) and (whole or _size(out / "scores.jsonl")):
        other = [words for name, words in _OTHER.items() if found.get(name) != facts.get(name)]
        raise OutputError(
            f"{out}: holds an unfinished run with {', '.join(other)}. Give the same as before to go on with it. Else "
            "choose another output folder, or remove this one."
        )
    for file in set(left).difference(whole):  # cut off while they were written
        file.unlink(missing_ok=True)
    if found != facts:
        _write(out, facts, finished=False)
    return found == facts


def finish(out: Path, facts: Mapping[str, Any]) -> None:
    """Mark the run as finished.

    Raises:
        OutputError: The folder cannot be written to.
    """
    _write(out, facts, finished=True)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder as long as this one works in it; it is free when the process has gone.

    Args:
        out: The folder; made if missing.

    Raises:
        OutputError: Another process works in it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise output_error(Path(err.filename), err) from err
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:  # some network file systems have no locks either
            if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(
                    f"{out}: another run writes to it now. Wait, or choose another output folder."
                ) from err
        yield
    finally:
        os.close(folder)


def _unfinished(out: Path) -> dict[str, Any] | None:
    """The facts of the unfinished run in a folder; None where there is no run."""
    try:
        record = read_json(out / RUN)
        if (record["format"], record["command"]) != (_FORMAT, "predict"):
            raise ValueError("of something else")
        facts, finished = dict(record["facts"]), bool(record["finished"])
    except (FileNotFoundError, NotADirectoryError):
        if tables := [file for file in (out / "scores.csv", out / "scores.jsonl") if file.exists()]:
            raise OutputError(f"{tables[0]}: already exists. {_ADVICE}") from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise OutputError(f"{out / RUN}: is no record of a run that can be gone on with. {_ADVICE}") from err
    if finished:
        raise OutputError(f"{out}: already exists and holds a finished run. {_ADVICE}")
    return facts


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write(out: Path, facts: Mapping[str, Any], *, finished: bool) -> None:
    record = {"format": _FORMAT, "command": "predict", "finished": finished, "facts": facts}
    write_whole(out / RUN, json.dumps(record, indent=1) + "\n")


def _images(samples: Sequence[Sample]) -> str:
    """Digest of the rows, with size and time of change of their files."""
    known = {path: _state(path) for sample in samples for path in _files(sample)}
    return _digest(
        [
            (str(s.path), s.frame and int(s.frame), s.task, s.label, s.patient_id, known[s.path])
            + (() if s.cut is None else (s.cut.axis, s.cut.position, *(known[path] for path in s.cut.series)))
            for s in samples
        ]
    )


def _files(sample: Sample) -> tuple[Path, ...]:
    return (sample.path, *(() if sample.cut is None else sample.cut.series))


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode(errors="surrogatepass")).hexdigest()
