"""anatomaly data ...: look at data sets, list and prepare public ones, make the built-in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.intensity import intensity_argument
from anatomaly.commands.progress import progress

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def check_arguments(parser: ArgumentParser) -> None:
    """Options of `data check`."""
    parser.add_argument("data", type=str, help="Folder or manifest (CSV, meta.json).")
    parser.add_argument("--near", type=bool, default=True, help="Also look for near-duplicates across splits.")
    intensity_argument(parser, "Rule that fit and predict will have")
    parser.add_argument("--csv", type=str, help="Write the manifest with hashes to this CSV file.")


def run_check(options: Namespace) -> int:
    """Run `data check`."""
    from anatomaly.config import check_intensity
    from anatomaly.data.check import check_manifest
    from anatomaly.data.findings import format_report
    from anatomaly.data.manifest import load_manifest, write_csv

    if options.intensity is not None:
        check_intensity(options.intensity, "intensity")
    manifest = load_manifest(Path(options.data))
    with progress("data check", len(manifest)) as advance:
        report = check_manifest(manifest, near=options.near, intensity=options.intensity, on_progress=advance)
    if options.csv:
        write_csv(manifest.with_hashes(), Path(options.csv))
    print(format_report(report))
    return 0 if report.ok else 1


def list_arguments(parser: ArgumentParser) -> None:
    """Options of `data list`."""
    parser.add_argument("name", type=str, nargs="?", help="One data set, in full.")


def run_list(options: Namespace) -> int:
    """Run `data list`."""
    from anatomaly.data.catalog.prepare import describe, find_data_set
    from anatomaly.data.catalog.table import CATALOG

    if options.name:
        print(describe(find_data_set(options.name)))
        return 0
    for one in CATALOG:
        about = (f"{one.what} ({', '.join(one.papers)})", one.images, f"licence: {one.licence}", one.address)
        print(f"{one.name:<12} " + f"\n{'':<12} ".join(about))
    print("anatomaly data list NAME says more; docs/datasets.md says what was verified.")
    return 0


def prepare_arguments(parser: ArgumentParser) -> None:
    """Options of `data prepare`."""
    parser.add_argument("name", type=str, help="Name of the data set, see anatomaly data list.")
    parser.add_argument("--source", type=str, required=True, help="Folder of the unpacked original download.")
    parser.add_argument("--out", type=str, required=True, help="CSV file, or folder that gets manifest.csv.")
    parser.add_argument("--allow_missing", action="store_true", help="Go on without files that are not there.")


def run_prepare(options: Namespace) -> int:
    """Run `data prepare`: first whose data it is, then the manifest."""
    from collections import Counter

    from anatomaly.data.catalog.prepare import describe, find_data_set, prepare, write_prepared

    data_set = find_data_set(options.name)
    print(describe(data_set) + "\n", flush=True)
    prepared = prepare(data_set, Path(options.source), allow_missing=options.allow_missing)
    file = write_prepared(prepared, Path(options.out))
    words = {0: "normal", 1: "anomalous", None: "unknown"}
    for (task, split, label), count in Counter((s.task, s.split, s.label) for s in prepared.manifest).items():
        print(f"{task:<12} {split:<6} {words[label]:<10} {count:>7}")
    for note in prepared.notes:
        print(f"note: {note}")
    print(file)
    return 0


def phantom_arguments(parser: ArgumentParser) -> None:
    """Options of `data phantom`."""
    from typing import Literal

    parser.add_argument("--out", type=str, required=True, help="Folder to write to.")
    parser.add_argument("--train", type=int, default=100, help="Normal training images per task.")
    parser.add_argument("--test_normal", type=int, default=40, help="Normal test images per task.")
    parser.add_argument("--test_anomalous", type=int, default=40, help="Test images with a lesion per task.")
    parser.add_argument("--size", type=int, default=128, help="Height and width in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed gives other patients.")
    parser.add_argument("--format", type=Literal["png", "dicom"], default="png", help="Of the images.")


def run_phantom(options: Namespace) -> int:
    """Run `data phantom`."""
    from anatomaly.synthetic.phantom import write_benchmark

    manifest = write_benchmark(
        Path(options.out),
        train=options.train,
        test_normal=options.test_normal,
        test_anomalous=options.test_anomalous,
        size=options.size,
        seed=options.seed,
        dicom=options.format == "dicom",
    )
    print(manifest)
    return 0
