"""anatomaly predict --engine ray: archives, judged by many processes or machines into one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anatomaly.commands.console import ended_by_signal, fail, say
from anatomaly.commands.progress import progress
from anatomaly.commands.ready import ready_detector
from anatomaly.errors import ConfigError, ManifestError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_OF_ARCHIVES = ("actors", "readers", "address", "chunk")


def archive_arguments(parser: ArgumentParser) -> None:
    """Options of `predict` that say where it runs."""
    from typing import Literal

    add = parser.add_argument
    add("--engine", type=Literal["process", "ray"], default="process", help="ray: many processes or machines, a table.")
    add("--actors", type=int | None, default=None, help="With ray: processes that judge. Default by GPUs and cores.")
    add("--readers", type=int | None, default=None, help="With ray: processes that read. Default by --actors.")
    add("--address", type=str | None, default=None, help="With ray: HOST:PORT of a cluster. Default: this machine.")
    add("--chunk", type=int | None, default=None, help="With ray: images of a file of the table. Default 256.")


def check_engine(options: Namespace) -> None:
    """Refuse options that the chosen engine does not know, before anything is loaded.

    Raises:
        ConfigError: There are such options.
        NotReadyError: The engine is not installed.
    """
    if options.engine == "process":
        if given := [name for name in _OF_ARCHIVES if options[name] is not None]:
            raise ConfigError(f"predict: --{given[0]} is for --engine ray. Give both or neither.")
        return
    from anatomaly.archive.cluster import require_ray

    unknown = ("overlays", "dicom", "alpha", "fdr", "dependent", "axis")
    if given := [name for name in unknown if options[name] not in (None, False)]:
        raise ConfigError(
            f"predict: --engine ray has no --{given[0]}. Leave it out; p-values are a column of the table, and what is "
            "striking there can be judged again without --engine."
        )
    if len(options.images) > 1:
        raise ConfigError(f"predict: --engine ray takes one table or folder as --images, got {len(options.images)}.")
    if "://" not in options.images[0] and not Path(options.images[0]).exists():
        raise ManifestError(f"{options.images[0]}: no such file or folder.")
    if "://" in options.out:
        raise ConfigError(f"predict: --out is {options.out}, expected a folder of this machine or a shared one.")
    require_ray()


def run_archive(options: Namespace) -> int:
    """Run `predict --engine ray`."""
    from anatomaly.archive.shares import Plan

    own = {name: options[name] for name in _OF_ARCHIVES if options[name] is not None}
    plan = Plan(**own, batch_size=options.batch_size, device=options.device, maps=bool(options.maps))
    import torch  # takes seconds to load

    from anatomaly.archive.run import predict_to_table

    detector, pictures = ready_detector(options, "predict")
    with progress("predict") as advance:

        def begin(done: int, total: int) -> None:
            if done:
                say(f"{options.out}: continues an unfinished run: {done:,} of {total:,} are done.")
            advance.begin(total, done=done)

        try:
            with ended_by_signal():
                totals = predict_to_table(
                    detector,
                    options.images[0],
                    Path(options.out),
                    plan,
                    processors=torch.get_num_threads(),
                    task=options.task,
                    bank_images=pictures,
                    on_begin=begin,
                    on_progress=lambda rows: advance.at(advance.done + rows, advance.total),
                    tell=say,
                )
        except KeyboardInterrupt:
            told = f"{options.out}: interrupted; what is there is complete. Run the same command again to go on."
            return fail(told, code=130)
    for note, images in totals.notes.most_common():
        print(f"{images} of {totals.images} images: {note}.")
    print(f"{totals.scored} images scored, {totals.failed} could not be read. Report: {totals.report}")
    if totals.above is not None and totals.scored:
        normal = detector.ready().normal_scores
        print(
            f"Among themselves the {len(normal)} support images score {min(normal):.4g} to {max(normal):.4g}; "
            f"{totals.above} of {totals.scored} images score higher. A rough yardstick: anatomaly calibrate gives "
            "p-values."
        )
    if not totals.scored:
        return fail("no image could be scored; the column error of the table says why for each.")
    return 0
