"""From the original download of a public data set to one manifest; nothing is downloaded and nothing copied.

The data sets are listed in `catalog_table`, their layouts read by `catalog_layouts`.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import ceil
from pathlib import Path

from anatomaly.data import layouts
from anatomaly.data.catalog.download import Item, find_root
from anatomaly.data.catalog.table import CATALOG, DataSet
from anatomaly.data.manifest import COLUMNS, Manifest, write_csv
from anatomaly.errors import ConfigError, ManifestError, OutputError
from anatomaly.types import Sample

_TESTED_SHARE = 5  # one in five normal patients is tested where the owner gives no split
_SPLITS = ("train", "val", "test")
_SHOWN = 6  # entries of a folder that a message names
_WIDTH = 110

_Counts = Counter[str]  # reason -> images that are not in the manifest


@dataclass(frozen=True, slots=True)
class Prepared:
    """The manifest of a download and what is to be said about it.

    Attributes:
        manifest: Rows by task, split, label and name; in train only normal ones, no patient in two splits.
        notes: One line per group of images that are not in it, and one if the download is not as large as the original.
    """

    manifest: Manifest
    notes: tuple[str, ...]


def find_data_set(name: str) -> DataSet:
    """Find a data set by its name, ignoring case, `-` and `_`.

    Raises:
        ConfigError: No such data set.

    Example:
        >>> find_data_set("head_ct").what
        'head CT slices, haemorrhage'
    """
    known = {_plain(data_set.name): data_set for data_set in CATALOG}
    if _plain(name) not in known:
        near = get_close_matches(_plain(name), known, n=1)
        hint = f" Did you mean {known[near[0]].name}?" if near else ""
        raise ConfigError(f"no data set {name!r}, expected one of {', '.join(d.name for d in CATALOG)}.{hint}")
    return known[_plain(name)]


def describe(data_set: DataSet) -> str:
    """Say what a person should know before using a data set: several lines, the licence among the first."""
    lines = [f"{data_set.name}: {data_set.what} ({', '.join(data_set.papers)})"]
    for word in ("owner", "address", "licence", "images", "layout", "labels", "split", "caution"):
        lines += textwrap.wrap(
            getattr(data_set, word),
            _WIDTH,
            initial_indent=f"  {word:<8} ",
            subsequent_indent=" " * 11,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def prepare(data_set: DataSet, source: Path, *, allow_missing: bool = False) -> Prepared:
    """Turn the original download of a data set into manifest rows that point at its files.

    The split depends on the data set's name and the names of its images or patients, on nothing else: not on the order
    of the files, the operating system or the folder they lie in.  Missing images do not move the others, where a table
    lists them.

    Args:
        data_set: One of the catalogue.
        source: Folder of the unpacked download; the data may lie up to three folders deeper.
        allow_missing: Go on with fewer images than the original has, and leave out images and masks that the tables
            list and that are not there.

    Returns:
        At least one normal training row and one test row.

    Raises:
        ManifestError: Another layout than the original's, a table that is not the original's, missing images, or
            nothing to train on or to test.
    """
    source = Path(source)
    place = find_root(source, data_set.layouts) if source.is_dir() else None
    if place is None:
        raise ManifestError(_not_original(data_set, source))
    root, layout = place
    found = layout.read(root)
    if data_set.count is not None and found.images < data_set.count and not allow_missing:
        raise ManifestError(
            f"{root}: holds {found.images} images of {data_set.name}, the original {data_set.count}. "
            "Complete the download, or go on with --allow_missing; the split is another one then."
        )
    left_out: _Counts = Counter(dict(found.left_out))
    items = _draw_test(found.items, data_set, left_out)
    items = _keep_patients_apart(_without_anomalous_training(items, left_out), left_out)
    items = _existing(items, root, left_out, allow_missing=allow_missing)
    for split, what in (("train", "normal training image"), ("test", "test image")):
        if not any(item.split == split for item in items):
            raise ManifestError(f"{root}: holds no {what} of {data_set.name}, expected {data_set.images}.")
    if len({item.path for item in items}) < len(items):
        raise ManifestError(f"{root}: its table lists an image twice. Take the owner's table.")
    notes = [f"left out {count}: {reason}" for reason, count in left_out.items() if count]
    if data_set.count is not None and found.images != data_set.count:
        notes.insert(0, f"the original has {data_set.count} images, this one {found.images}: figures do not compare")
    rows = sorted(items, key=lambda item: (item.task, _SPLITS.index(item.split or "train"), item.label, item.key))
    return Prepared(Manifest(tuple(_row(item) for item in rows), source), tuple(notes))


def write_prepared(prepared: Prepared, out: Path) -> Path:
    """Write the manifest; never over a table that is not a manifest.

    Args:
        prepared: What `prepare` returned.
        out: A CSV file, or a folder that gets manifest.csv; made where it does not exist.

    Returns:
        The CSV file.

    Raises:
        OutputError: It cannot be written, or would replace a file of another kind.
    """
    file = out if out.suffix.lower() == ".csv" else out / "manifest.csv"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            with file.open("rb") as stream:
                head = stream.readline(1000)
            if head.strip() != ",".join(COLUMNS).encode():
                raise OutputError(f"{file}: exists and is no manifest of anatomaly. Choose another name.")
    except OSError as err:
        raise OutputError(f"{file}: cannot be written ({err.strerror}). Choose another folder.") from err
    write_csv(prepared.manifest, file)
    return file


def _draw_test(items: Iterable[Item], data_set: DataSet, left_out: _Counts) -> list[Item]:
    """Give a split to the images whose owner gave none; the unit is the patient, or the image where unknown."""
    decided: list[Item] = []
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.split is None:
            groups.setdefault(item.patient or item.key, []).append(item)
        else:
            decided.append(item)
    anomalous = {group for group, members in groups.items() if any(item.label for item in members)}
    normal = groups.keys() - anomalous
    tested_normal = _first(
        normal, data_set, min(ceil(len(normal) / _TESTED_SHARE), data_set.most_tested or len(normal))
    )
    tested = {*tested_normal, *_first(anomalous, data_set, data_set.most_tested or len(anomalous))}
    for group, members in groups.items():
        if group in tested and data_set.most_tested:
            of_label = {item.key: item for item in members if item.label == (group in anomalous)}
            (shown,) = _first(of_label, data_set, 1)
            decided.append(replace(of_label[shown], split="test"))
            left_out["further images of tested patients"] += len(members) - 1
            continue
        for item in members:
            if group in tested:
                decided.append(replace(item, split="test"))
            elif item.label == 0:
                decided.append(replace(item, split="train"))
            else:
                left_out["anomalous images of patients that were not drawn"] += 1
    return decided


def _first(names: Iterable[str], data_set: DataSet, count: int) -> list[str]:
    """The first names in an order that only the names decide."""

    def rank(name: str) -> tuple[str, str]:
        return hashlib.sha256(f"{data_set.name}\n{name}".encode(errors="surrogateescape")).hexdigest(), name

    return sorted(names, key=rank)[:count]


def _without_anomalous_training(items: Sequence[Item], left_out: _Counts) -> list[Item]:
    kept = [item for item in items if not (item.split == "train" and item.label == 1)]
    left_out["anomalous training images"] += len(items) - len(kept)
    return kept


def _keep_patients_apart(items: Sequence[Item], left_out: _Counts) -> list[Item]:
    """Leave a patient's images in the last of their splits only: what is tested stays tested."""
    last: dict[tuple[str, str], int] = {}
    for item in items:
        if item.patient is not None:
            key = (item.task, item.patient)
            last[key] = max(last.get(key, 0), _SPLITS.index(item.split or "train"))
    kept = [i for i in items if i.patient is None or i.split == _SPLITS[last[i.task, i.patient]]]
    left_out["training or validation images of patients in a later split"] += len(items) - len(kept)
    return kept


def _existing(items: Sequence[Item], root: Path, left_out: _Counts, *, allow_missing: bool) -> list[Item]:
    there = {file: file.is_file() for item in items for file in (item.path, item.mask) if file is not None}
    missing = sorted((file for file, exists in there.items() if not exists), key=str)
    if missing and not allow_missing:
        raise ManifestError(
            f"{root}: {len(missing)} of {len(there)} files are missing, the first is {missing[0]}. "
            "Complete the download, or leave them out with --allow_missing."
        )
    left_out["missing files"] += len(missing)
    return [
        item if item.mask is None or there[item.mask] else replace(item, mask=None)
        for item in items
        if there[item.path]
    ]


def _row(item: Item) -> Sample:
    return Sample(item.path, item.task, item.split or "train", item.label, mask=item.mask, patient_id=item.patient)


def _not_original(data_set: DataSet, source: Path) -> str:
    expected = f"expected the layout of {data_set.name} as its owner publishes it: {data_set.layout}"
    if not source.exists():
        return f"{source}: no such folder, {expected}."
    if not source.is_dir():
        return f"{source}: is a file, {expected}. Unpack the download and name its folder."
    entries = sorted(entry.name for entry in source.iterdir() if not entry.name.startswith("."))
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    found = ", ".join(entries[:_SHOWN]) + more if entries else "nothing"
    hint = f"Download it from {data_set.address}."
    if (source / "manifest.csv").is_file() or layouts.has_splits(source):
        hint = "It can be used as it is, without this command: see anatomaly data check."
    return f"{source}: {expected}; found {found}. {hint}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
