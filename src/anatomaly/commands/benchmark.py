"""anatomaly benchmark ...: tables that compare methods and their parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anatomaly.commands.console import fail, instantiated
from anatomaly.commands.progress import progress
from anatomaly.errors import ConfigError
from anatomaly.files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jsonargparse import ArgumentParser, Namespace

    from anatomaly.archive.cluster import Tasks
    from anatomaly.benchmark.grid import Entry
    from anatomaly.benchmark.run import Failure


def grid_arguments(parser: ArgumentParser) -> None:
    """Options of `benchmark`."""
    from anatomaly.commands.settings import settings_arguments

    add = parser.add_argument
    add("--data", type=str, required=True, help="Folder or manifest: normals in train, both labels in test.")
    add("--out", type=str, required=True, help="Folder; finished cells in it are not run again.")
    add("--protocol", type=Literal["few_shot", "one_class"], default="few_shot", help="K supports, or all normals.")
    add(
        "--methods",
        type=dict[str, Any] | list[str],
        default=[],
        help="Names, or name: settings that differ from those below (also preset, peer, images, options).",
    )
    add("--peers", type=str, nargs="*", help="Add patchcore, padim, knn and, where the teacher fits, rd4ad; or some.")
    add("--teachers", type=list[str], default=[], help="Each with every method; default the one of --teacher.")
    add("--tasks", type=list[str], default=[], help="Tasks to judge; default all in the data.")
    add("--shots", type=list[int] | int, default=[2, 4, 8], help="Values of K.")
    add("--seeds", type=list[int] | int, default=[0, 1, 2], help="Of training and support draws.")
    add("--draws", type=int, default=5, help="Support draws per seed.")
    add("--supports", type=str, help="Fixed supports: the supports.json of another benchmark.")
    add("--reference", type=str, help="Method that the others are compared with; default nearest, else the first.")
    add("--jobs", type=int, default=1, help="Processes on this machine.")
    add("--engine", type=Literal["process", "ray"], default="process", help="ray: cells run on all machines.")
    add("--address", type=str | None, default=None, help="With ray: HOST:PORT of a cluster. Default: this machine.")
    add("--cell_cores", type=int, default=1, help="With ray: processors of a cell; a GPU is added where there are any.")
    settings_arguments(parser)


def run_grid(options: Namespace) -> int:
    """Run `benchmark`."""
    from dataclasses import replace

    from anatomaly.benchmark.grid import Grid
    from anatomaly.benchmark.leaderboard import read_cells
    from anatomaly.benchmark.run import run_grid
    from anatomaly.benchmark.tables import tables, write_leaderboard
    from anatomaly.data.manifest import load_manifest
    from anatomaly.presets import REFERENCE_PRESET

    entries = _entries(options)
    names = [entry.name for entry in entries]
    reference = options.reference or (REFERENCE_PRESET if REFERENCE_PRESET in names else names[0])
    if reference not in names:
        raise ConfigError(f"benchmark: reference {reference!r} is not among the methods, {', '.join(names)}.")
    grid = Grid(
        load_manifest(Path(options.data)),
        options.protocol,
        entries,
        [replace(options.teacher, name=name) for name in options.teachers or [options.teacher.name]],
        tasks=options.tasks,
        shots=[options.shots] if isinstance(options.shots, int) else options.shots,
        seeds=[options.seeds] if isinstance(options.seeds, int) else options.seeds,
        draws=options.draws,
        supports=Path(options.supports) if options.supports else None,
    )
    out = Path(options.out)
    with _cluster(options) as cluster, _steps() as step:
        failures = run_grid(grid, out, jobs=options.jobs, cluster=cluster, on_step=step)
    cells = read_cells(cell.folder(out) for cell in grid.cells())
    if cells:
        done = {cell.entry for cell in cells}
        note = f"Protocol {grid.protocol}."
        if grid.protocol == "few_shot":
            try:
                digest = str(read_json(out / "supports.json")["digest"])
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise ConfigError(f"{out / 'supports.json'}: is damaged. Delete it and run again.") from err
            note += f" The supports are those of supports.json, digest {digest[:16]}."
        rows, fought = write_leaderboard(cells, out, reference=reference if reference in done else None, note=note)
        for table in tables(rows, fought):
            table.print()
        print(f"{out}/leaderboard.html")
    return _ending(failures)


@contextmanager
def _cluster(options: Namespace) -> Iterator[Tasks | None]:
    """Yields where the cells run, or None for processes of this machine."""
    if options.engine == "process":
        if options.address is not None:
            raise ConfigError("benchmark: --address is for --engine ray. Give both or neither.")
        yield None
        return
    if options.jobs != 1 or options.cell_cores < 1:
        raise ConfigError("benchmark: --jobs is for one machine. With --engine ray give --cell_cores 1 or more.")
    import torch

    from anatomaly.archive.cluster import tasks

    use_gpus = options.training.device != "cpu"
    cores = torch.get_num_threads()
    with tasks(options.address, processors=cores, each=options.cell_cores, use_gpus=use_gpus) as found:
        yield found


@contextmanager
def _steps() -> Iterator[Callable[[Sequence[str], int, int], None]]:
    """Yields what `run_grid` calls after every step."""
    with progress("benchmark") as told:

        def step(running: Sequence[str], done: int, total: int) -> None:
            told.at(done, total, "cells", f"now {'; '.join(running)}" if running else "")

        yield step


def _ending(failures: Sequence[Failure]) -> int:
    """Say which cells failed and why; the exit code."""
    for reason in dict.fromkeys(failure.reason for failure in failures):
        failed = [failure.cell for failure in failures if failure.reason == reason]
        cells_failed = f"{len(failed)} cell{'s' * (len(failed) > 1)} failed"
        fail(f"{cells_failed}, all others are kept. First {failed[0]}: {reason} Run again to try again.")
    return 2 if failures else 0


def _entries(options: Namespace) -> list[Entry]:
    """The competitors that the settings name."""
    from anatomaly.benchmark.peers import PEERS, RESNETS, architecture

    methods = options.methods
    if not isinstance(methods, Mapping):
        if twice := {name for name in methods if methods.count(name) > 1}:
            raise ConfigError(f"benchmark: {', '.join(sorted(twice))} is named twice in methods. Name it once.")
        methods = dict.fromkeys(methods)
    if options.peers is not None:
        decodable = all(architecture(name) in RESNETS for name in options.teachers or [options.teacher.name])
        fitting = [name for name in PEERS if name != "rd4ad" or decodable]
        methods = {**methods, **dict.fromkeys(name for name in options.peers or fitting if name not in methods)}
    if not methods:
        raise ConfigError("benchmark: no methods. Name some: --methods '[nearest, d24fad]', or --peers.")
    return [_entry(name, changes, options.given) for name, changes in methods.items()]


def _entry(name: str, changes: object, given: Mapping[str, Any]) -> Entry:
    """One competitor: what goes with its method, then the common settings, then its preset's, then its own."""
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from anatomaly.benchmark.grid import Entry
    from anatomaly.benchmark.peers import PEERS
    from anatomaly.commands.settings import fit_config, moved, set_method_defaults, settings_arguments
    from anatomaly.methods import METHODS
    from anatomaly.presets import preset_file

    if not isinstance(changes or {}, Mapping):
        raise ConfigError(f"benchmark: methods.{name} is {changes!r}, expected settings, such as {{images: 64}}.")
    own: dict[str, Any] = dict(changes or {})  # type: ignore[call-overload]
    preset, peer = own.pop("preset", None), own.pop("peer", name if name in PEERS else None)
    images, choices = _typed(own.pop("images", 0)), _typed(own.pop("options", {}))
    if peer is not None and peer not in PEERS:
        raise ConfigError(f"benchmark: methods.{name}: unknown peer {peer!r}, expected one of {', '.join(PEERS)}.")
    if not isinstance(images, int) or images < 0 or not isinstance(choices, Mapping):
        raise ConfigError(f"benchmark: methods.{name}: expected images as a whole number and options as a mapping.")
    alone = "teacher" in own
    settings = dict(given)
    if preset is not None:
        settings = _merged(settings, yaml.safe_load(preset_file(preset).read_text(encoding="utf-8")))
    if name in METHODS:
        own = _merged({"method": {"name": name}}, own)
    elif peer is None and preset is None and "name" not in dict(own.get("method", {})):
        known = ", ".join([*METHODS, *PEERS])
        raise ConfigError(f"benchmark: methods.{name}: which method? Give method: {{name: ...}}; or call it {known}.")
    settings = _merged(settings, own)
    parser = ArgumentParser(exit_on_error=False)
    settings_arguments(parser)
    method = dict(settings.get("method", {}))
    set_method_defaults(parser, method.get("name"))
    others = set(METHODS) - {method.get("name")}  # their settings are those of other entries
    chosen = {key: value for key, value in method.items() if key not in others}
    try:
        options = moved(parser.parse_object({**settings, **({"method": chosen} if method else {})}))
        config = fit_config(instantiated(parser, options))
    except ArgumentError as err:
        raise ConfigError(f"benchmark: methods.{name}: {' '.join(str(err).split())}") from err
    teacher = config.teacher if alone else None
    return Entry(name, config, teacher=teacher, peer=peer, images=images, options=choices)


def _typed(value: Any) -> Any:
    """A value that no option has a type for, read as YAML would: the command line takes it as text."""
    import yaml

    if isinstance(value, Mapping):
        return {key: _typed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_typed(each) for each in value]
    return yaml.safe_load(value) if isinstance(value, str) else value


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """`one` with the settings of `two`, group by group."""
    both = dict(one)
    for key, value in two.items():
        group = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _merged(both[key], value) if group else value
    return both


def ablation_arguments(parser: ArgumentParser) -> None:
    """Options of `benchmark ablation`."""
    from anatomaly.benchmark.ablation import ablated_methods
    from anatomaly.commands.settings import settings_arguments

    parser.add_argument("whose", type=str, help=f"Whose ablation: {', '.join(ablated_methods())}.")
    parser.add_argument("--data", type=str, required=True, help="Folder or manifest: normals in train, a test split.")
    parser.add_argument("--out", type=str, required=True, help="Folder; finished cells in it are not run again.")
    parser.add_argument("--tasks", type=list[str], default=[], help="Tasks to judge; default all in the data.")
    parser.add_argument("--rows", type=list[str], default=[], help="Rows of the table; default all.")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="Of the training, one model each.")
    parser.add_argument("--shots", type=int, default=4, help="K of few-shot methods.")
    parser.add_argument("--draws", type=int, default=5, help="Support draws of few-shot methods.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes.")
    settings_arguments(parser)


def run_ablation(options: Namespace) -> int:
    """Run `benchmark ablation`."""
    from anatomaly.benchmark import ablation
    from anatomaly.commands.settings import fit_config
    from anatomaly.data.manifest import load_manifest

    with _steps() as step:
        results, failures = ablation.run_ablation(
            load_manifest(Path(options.data)),
            Path(options.out),
            fit_config(options),
            method=options.whose,
            rows=options.rows,
            tasks=options.tasks,
            seeds=options.seeds,
            shots=options.shots,
            draws=options.draws,
            jobs=options.jobs,
            on_step=step,
        )
    if results:
        seeds = max(result.seeds for result in results)
        over = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
        over += " (95 % interval over test images)"
        ablation.table_of(results, title=f"{options.whose}: image AUROC, {over}").print()
        print(f"{options.out}/ablation.md")
    return _ending(failures)
