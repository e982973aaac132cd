"""Options of a command that judges volumes, and what they make of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anatomaly.commands.console import say
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.data.cuts import Volume
    from anatomaly.types import Sample

_PICTURES = 24  # supports that the report shows


def volume_arguments(parser: ArgumentParser) -> None:
    """What makes volumes of files."""
    from typing import Literal

    parser.add_argument(
        "--axis",
        type=Literal["axial", "coronal", "sagittal", "all"] | None,
        default=None,
        help="Take NIfTI files and DICOM series as volumes, cut into such slices. Without: every image for itself.",
    )
    parser.add_argument(
        "--slices", type=int | None, default=None, help="Take only so many of a volume along each axis, evenly spread."
    )
    parser.add_argument(
        "--support_match",
        type=Literal["none", "position"],
        default="none",
        help="position: compare a slice with those at nearby places of the support volumes only. Needs --axis.",
    )


def check_volume_options(options: Namespace, verb: str) -> None:
    """Refuse options of `volume_arguments` that make no sense together, before anything is read.

    Raises:
        ConfigError: They do not.
    """
    position = options.support_match == "position"
    if options.axis is None and (position or options.slices is not None):
        given = "support_match position" if position else "slices"
        raise ConfigError(f"{verb}: --{given} is about volumes. Give --axis axial, coronal, sagittal or all as well.")
    if options.slices is not None and options.slices < 1:
        raise ConfigError(f"{verb}: slices is {options.slices}, expected at least 1.")
    if position and options.bank is not None:
        raise ConfigError(f"{verb}: --bank says itself how slices are matched. Leave out --support_match.")
    if options.axis is not None and (options.get("alpha") is not None or options.get("fdr") is not None):
        raise ConfigError(f"{verb}: there is no calibration of volumes yet. Leave out --alpha and --fdr, or --axis.")


def slices_of(rows: Iterable[Sample], options: Namespace) -> list[Sample]:
    """Rows to judge: as they are, or with `--axis` the slices of the volumes they belong to; tells what is lost."""
    if options.axis is None:
        return list(rows)
    volumes = _volumes(rows, options)
    for volume in (each for each in volumes if each.error is not None):
        say(volume.error or "")
    return [sample for volume in volumes for sample in volume.samples]


def support_slices(rows: Iterable[Sample], options: Namespace) -> list[Sample]:
    """Likewise of the normal volumes of a support; `--shots` are volumes.

    Raises:
        ConfigError: A volume cannot be cut, none is normal, or there are fewer than `--shots`.
    """
    volumes = _volumes(rows, options)
    if broken := [each.error for each in volumes if each.error is not None]:
        raise ConfigError(f"support: {broken[0]}")
    volumes = [each for each in volumes if each.samples[0].label != 1]
    volumes = [each for each in volumes if each.samples[0].split == "train"] or volumes
    shots = options.shots
    if not volumes or (shots is not None and not 1 <= shots <= len(volumes)):
        asked = "at least 1" if shots is None else f"{shots} (--shots)"
        raise ConfigError(f"support: got {len(volumes)} normal volumes, expected {asked}. Add normal volumes.")
    return [sample for volume in volumes[:shots] for sample in volume.samples]


def check_bank(options: Namespace, detector: Any) -> None:
    """Refuse a saved bank whose supports are no such slices.

    Raises:
        ConfigError: It holds slices of other axes, or images of no volumes.
    """
    from anatomaly.data.cuts import axes_of

    held = {axis for axis, _ in detector.ready().places}
    wanted = set(axes_of(options.axis or ""))
    if detector.method.needs_support and held != wanted:
        has = f"{' and '.join(sorted(held))} slices of volumes" if held else "images of no volumes"
        fits = "all" if len(held) > 1 else next(iter(held), None)
        give = f"Give --axis {fits}" if fits else "Leave out --axis"
        raise ConfigError(
            f"{options.bank}: holds {has}, --axis is {options.axis or 'missing'}. {give}, or another bank."
        )


def shown(supports: Sequence[Sample], options: Namespace) -> Sequence[Sample]:
    """Of supports that are slices, the first ones: the report cannot show hundreds."""
    return supports if options.axis is None else supports[:_PICTURES]


def near(options: Namespace) -> float | None:
    """What `SupportBank.near` is to be."""
    from anatomaly.detector.places import NEAR

    return NEAR if options.support_match == "position" else None


def _volumes(rows: Iterable[Sample], options: Namespace) -> list[Volume]:
    from anatomaly.data.cuts import axes_of, volumes_of

    return volumes_of(rows, axes_of(options.axis), slices=options.slices)
