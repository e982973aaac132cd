"""Fixed support lists: which K normal images every method gets, in a file that can be published beside the results.

A few-shot figure depends on the images that were drawn (docs/protocol.md), so two tables can only be compared if both
used the same ones.  The file names them by content: digest and frame decide, the path is there for people.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from anatomaly.errors import ConfigError, ManifestError
from anatomaly.files import read_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Sample

    #: Task -> seed -> draws of support images; a run with fewer shots takes the beginning of each draw.
    SupportLists = Mapping[str, Mapping[int, Sequence[Sequence[Sample]]]]

FORMAT = 1


def write_support_lists(lists: SupportLists, file: Path) -> str:
    """Write support lists.

    Args:
        lists: Rows with their digests (`Manifest.with_hashes`).
        file: The JSON file, replaced if it exists; of a path it holds the last two folders and the name.

    Returns:
        Hex digest of what the lists say, whatever the files are called: see `lists_digest`.

    Raises:
        OutputError: The file cannot be written.
        ValueError: A row has no digest.
    """
    facts = {
        task: {
            seed: [[{**_identity(row), "path": "/".join(row.path.parts[-3:])} for row in draw] for draw in draws]
            for seed, draws in seeds.items()
        }
        for task, seeds in lists.items()
    }
    content = {"format": FORMAT, "digest": lists_digest(lists), "supports": facts}
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
    return lists_digest(lists)


def read_support_lists(file: Path, manifest: Manifest) -> dict[str, dict[int, list[tuple[Sample, ...]]]]:
    """Read support lists and find their images in a data set.

    Args:
        file: A file made by `write_support_lists`; its tasks must be tasks of the manifest.
        manifest: With digests.

    Returns:
        Task -> seed -> draws of rows of the manifest.

    Raises:
        ConfigError: The file is not such a list, its digest does not fit its contents, a listed image is not among the
            task's images, is labelled anomalous, or is listed twice in one draw.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file. Give the supports.json of a benchmark.")
    try:
        content = read_json(file)
        entries = {
            task: {int(seed): [[_key(image) for image in draw] for draw in draws] for seed, draws in seeds.items()}
            for task, seeds in content["supports"].items()
        }
        wanted = content["digest"]
        if content["format"] != FORMAT:
            raise ConfigError(f"{file}: support lists of format {content['format']!r:.20}, expected {FORMAT}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(f"{file}: not a list of supports. Give the supports.json of a benchmark.") from err
    lists: dict[str, dict[int, list[tuple[Sample, ...]]]] = {}
    for task, seeds in entries.items():
        try:
            rows = {(row.sha256, row.frame or 0): row for row in manifest.select(task=task)}
        except ManifestError as err:
            raise ConfigError(f"{file}: lists supports of task {task!r}. {err}") from err
        lists[task] = {seed: [_found(draw, rows, file, task) for draw in draws] for seed, draws in seeds.items()}
    if lists_digest(lists) != wanted:
        raise ConfigError(f"{file}: its digest does not fit its lists; somebody edited it. Take the original file.")
    return lists


def lists_digest(lists: SupportLists) -> str:
    """Hex digest of which images stand where; independent of file names and folders.

    Raises:
        ValueError: A row has no digest.
    """
    facts = {
        task: {
            seed: [[list(_identity(row).values()) for row in draw] for draw in draws] for seed, draws in each.items()
        }
        for task, each in lists.items()
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _identity(row: Sample) -> dict[str, Any]:
    if row.sha256 is None:
        raise ValueError(f"support lists: {row.name} has no sha256. Call Manifest.with_hashes first.")
    return {"sha256": row.sha256, "frame": row.frame or 0}


def _key(image: Mapping[str, Any]) -> tuple[str, int]:
    return str(image["sha256"]), int(image["frame"])


def _found(
    draw: Sequence[tuple[str, int]], rows: Mapping[tuple[str | None, int], Sample], file: Path, task: str
) -> tuple[Sample, ...]:
    missing = [digest for digest, frame in draw if (digest, frame) not in rows]
    if missing:
        raise ConfigError(
            f"{file}: {len(missing)} supports of task {task!r} are not in the data, the first has digest "
            f"{missing[0][:12]}... Use the data the lists were made for."
        )
    found = tuple(rows[key] for key in draw)
    if len(set(draw)) < len(draw) or any(row.label == 1 for row in found):
        raise ConfigError(f"{file}: a draw of task {task!r} lists an image twice, or an anomalous one. Take it out.")
    return found
