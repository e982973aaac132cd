"""anatomaly data ...: look at data sets, make the built-in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def check_arguments(parser: ArgumentParser) -> None:
    """Options of `data check`."""
    parser.add_argument("data", type=str, help="Folder or manifest (CSV, meta.json).")
    parser.add_argument("--near", type=bool, default=True, help="Also look for near-duplicates across splits.")
    parser.add_argument("--csv", type=str, help="Write the manifest with hashes to this CSV file.")


def run_check(options: Namespace) -> int:
    """Run `data check`."""
    from anatomaly.data.check import check_manifest, format_report
    from anatomaly.data.manifest import load_manifest, write_csv

    manifest = load_manifest(Path(options.data))
    report = check_manifest(manifest, near=options.near)
    print(format_report(report))
    if options.csv:
        write_csv(manifest.with_hashes(), Path(options.csv))
    return 0 if report.ok else 1


def phantom_arguments(parser: ArgumentParser) -> None:
    """Options of `data phantom`."""
    parser.add_argument("--out", type=str, required=True, help="Folder to write to.")
    parser.add_argument("--train", type=int, default=100, help="Normal training images per task.")
    parser.add_argument("--test_normal", type=int, default=40, help="Normal test images per task.")
    parser.add_argument("--test_anomalous", type=int, default=40, help="Test images with a lesion per task.")
    parser.add_argument("--size", type=int, default=128, help="Height and width in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed gives other patients.")


def run_phantom(options: Namespace) -> int:
    """Run `data phantom`."""
    from anatomaly.data.phantom import write_benchmark

    manifest = write_benchmark(
        Path(options.out),
        train=options.train,
        test_normal=options.test_normal,
        test_anomalous=options.test_anomalous,
        size=options.size,
        seed=options.seed,
    )
    print(manifest)
    return 0
