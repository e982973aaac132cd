"""One of the processes of a training; `processes` starts and watches it."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from anatomaly.data.decoding import limit_decoded
from anatomaly.data.manifest import Manifest
from anatomaly.errors import AnatomalyError
from anatomaly.methods import build_method
from anatomaly.presets import configured
from anatomaly.training.fit import teachers_of
from anatomaly.training.loaders import Preparation
from anatomaly.training.parts import Ranks
from anatomaly.training.processes import end_with_parent
from anatomaly.training.student import train_student
from anatomaly.types import Intensity, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping

#: One process waits for another as long as this: the first one validates alone.  One that has died ends all at once.
_PATIENCE = timedelta(days=1)


def serve() -> None:
    """Train as the line on standard input says, and end with this process's parent."""
    tell = _Teller(FileIO(os.dup(1), "w"))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    line = sys.stdin.readline()
    if not line:  # the parent has gone already
        os._exit(1)
    task = json.loads(line)
    end_with_parent()
    code = 1
    try:
        best = _train(task, tell)
        if task["rank"] == 0:
            tell("best", best)
        code = 0
    except AnatomalyError as err:
        tell(type(err).__name__, str(err))
    except BaseException:
        tell("defect", traceback.format_exc())
    os._exit(code)  # nothing is left to be done, and ending a group politely takes all of its members


class _Teller:
    """Writes what the parent shall know, a line each."""

    def __init__(self, pipe: FileIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def __call__(self, kind: str, what: Any) -> None:
        """Tell, or end where nobody listens any more."""
        line = json.dumps([kind, what]).encode() + b"\n"
        with self._lock:
            while line:
                line = line[self._pipe.write(line) :]


class _Log(logging.Handler):
    """Hands what is logged to the parent."""

    def __init__(self, tell: _Teller) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell("log", [record.name, record.levelno, record.getMessage()])


def _train(task: Mapping[str, Any], tell: _Teller) -> dict[str, Any]:
    ranks, device = Ranks(task["rank"], task["size"]), task["device"]
    limit_decoded(task["decoded"])
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks.size))
    if device == "cuda":
        torch.cuda.set_device(ranks.rank)  # "cuda" is this one from now on
    if ranks.rank == 0:  # what one says all would say
        logging.getLogger("anatomaly").addHandler(_Log(tell))
        logging.getLogger("anatomaly").setLevel(logging.INFO)
    given = task["config"]
    config = configured(given | {"task_intensity": _rules(given["task_intensity"])})
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.TCPStore("127.0.0.1", task["port"], is_master=False),  # type: ignore[attr-defined]
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=_PATIENCE,
    )
    method = build_method(config.method.name, teachers_of(config), config.method.settings, seed=config.training.seed)
    method.to(device)
    for teacher in method.teachers.values():
        teacher.to(device)
    train, held_out = (_manifest(task[name], task["source"]) for name in ("train", "held_out"))
    prepare = Preparation(config.preprocessing, _rules(task["rules"]), device)

    def on_progress(done: int, total: int, unit: str) -> None:
        if ranks.rank == 0:
            tell("progress", [done, total, unit])

    best = train_student(method, train, held_out, prepare, Path(task["folder"]), config, on_progress, ranks)
    dist.barrier()  # nobody leaves while another one still needs it
    return best


def _rules(found: Mapping[str, Any]) -> dict[str, Intensity]:
    return {task: Intensity(**rule) for task, rule in found.items()}


def _manifest(rows: list[dict[str, Any]], source: str) -> Manifest:
    return Manifest(tuple(_sample(row) for row in rows), Path(source))


def _sample(row: dict[str, Any]) -> Sample:
    mask = None if row["mask"] is None else Path(row["mask"])
    return Sample(**{**row, "path": Path(row["path"]), "mask": mask})
