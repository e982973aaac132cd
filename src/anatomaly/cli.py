"""The command line: thin commands; torch and the rest are imported inside each, so that --help answers at once."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anatomaly import __version__
from anatomaly.errors import AnatomalyError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jsonargparse import ArgumentParser, Namespace

_CANNOT_WRITE = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        0; 1 if `data check` found errors; 2 for input that cannot be used, told in one line; 130 if interrupted; 141 if
        the reader of a pipe went away.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("lightning", "timm", "urllib3", "numba"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        code = _overview(words) if name is None else COMMANDS[name].run(_parse(name, words[len(name.split()) :]))
        sys.stdout.flush()
        return code
    except AnatomalyError as err:
        return _fail(str(err))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends
        return 141
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:
            return _fail(f"{str(err.filename)[:40]}...: the name is too long for a file.")
        if err.errno not in _CANNOT_WRITE:
            raise
        return _fail(f"{err.filename or 'output'}: cannot be written ({err.strerror}). Choose another folder.")
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(err)):
            raise
        return _fail("not enough memory. Lower --batch_size, --preprocessing.size or --training.cache_gib.")
    except KeyboardInterrupt:
        return _fail("interrupted; what was written so far is complete.", code=130)


def _overview(words: Sequence[str]) -> int:
    """Answer --help, --version, a group such as `data`, and anything that is no command."""
    first = words[0] if words else "--help"
    if first == "--version":
        print(f"anatomaly {__version__}")
        return 0
    group = [name for name in COMMANDS if name.split()[0] == first]
    if not group and first not in ("-h", "--help"):
        return _fail(f"unknown command {first!r}, expected one of {', '.join(COMMANDS)}.{_near(first, COMMANDS)}")
    if group and not {"-h", "--help"}.intersection(words) and len(words) > 1:
        return _fail(f"unknown command {' '.join(words[:2])!r}, expected one of {', '.join(group)}.")
    print("usage: anatomaly COMMAND [options]    (anatomaly COMMAND --help lists the options)\n")
    print("Finds what is not normal in medical images after seeing only normal ones. Not for clinical use.\n")
    for name in group or COMMANDS:
        print(f"  {name:<15} {COMMANDS[name].help}")
    return 0


def _parse(name: str, words: Sequence[str]) -> Namespace:
    """Read a command's options from flags and YAML, with one line for whatever is wrong."""
    from jsonargparse import ArgumentError, ArgumentParser

    command = COMMANDS[name]
    parser = ArgumentParser(prog=f"anatomaly {name}", description=command.help, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with these settings; flags after it win.")
    command.arguments(parser)
    try:
        options: Namespace = parser.instantiate(parser.parse_args(list(words)))
        return options
    except ArgumentError as err:
        message = _plain(str(err))
        unknown = re.search(r"does not accept option '([^']+)'|[Uu]nrecognized arguments?: --([^\s=]+)", message)
        hint = _near(unknown[1] or unknown[2], parser.get_defaults().keys()) if unknown else ""
        raise ConfigError(f"{name}: {message}.{hint} See anatomaly {name} --help.") from err
    except (TypeError, UnicodeDecodeError) as err:  # jsonargparse lets these two through
        raise ConfigError(
            f"{name}: the settings are not UTF-8 YAML with a mapping per group, such as 'training: {{epochs: 5}}'. "
            f"See anatomaly {name} --help."
        ) from err


def _plain(message: str) -> str:
    """Put what jsonargparse says in the words of a command line, without Python's types."""
    message = " ".join(message.split()).rstrip(".")
    for pattern, words in (
        (
            r"Does not validate against any of the Union subtypes.*? Errors: - (.*?) - .*Given value: (.*)",
            r"\1. Got \2",
        ),
        (r"Expected a dot import path string: .*?\. Got", "Expected braces, such as '{rule: range, low: 0}'. Got"),
        (r"Problem with given class_path '[^']+': ", ""),
        (r"(\. Got value: \S+)\. Got NestedArg.*", r"\1"),
        (r'Parser key "([^"]+)": Expected', r"--\1: expected"),
        (r'Parser key "([^"]+)"', r"--\1"),
        (r"a <class '(?:list|tuple)'>", "a list in brackets"),
        (r"a <class 'int'>", "a whole number"),
        (r"a <class 'float'>", "a number"),
        (r"a <class 'bool'>", "true or false"),
        (r"a typing.Literal\[(.*?)\]", r"one of \1"),
        (r"\. Got value: ", ", got "),
        (r"\. Got ", ", got "),
    ):
        message = re.sub(pattern, words, message)
    return message


def _near(word: str, known: Any) -> str:
    from difflib import get_close_matches

    names = {key.split(".")[-1] if "." not in word else key: key for key in known}
    found = get_close_matches(word, list(names), n=1)
    return f" Did you mean {names[found[0]]}?" if found else ""


def _fail(message: str, *, code: int = 2) -> int:
    print(f"anatomaly: {' '.join(message.split())}", file=sys.stderr)
    return code


# --- data ---------------------------------------------------------------------------------------------------------


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", type=str, help="Folder or manifest (CSV, meta.json).")
    parser.add_argument("--near", type=bool, default=True, help="Also look for near-duplicates across splits.")
    parser.add_argument("--csv", type=str, help="Write the manifest with hashes to this CSV file.")


def _check(options: Namespace) -> int:
    from anatomaly.data.check import check_manifest, format_report
    from anatomaly.data.manifest import load_manifest, write_csv

    manifest = load_manifest(Path(options.data))
    report = check_manifest(manifest, near=options.near)
    print(format_report(report))
    if options.csv:
        write_csv(manifest.with_hashes(), Path(options.csv))
    return 0 if report.ok else 1


def _phantom_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, required=True, help="Folder to write to.")
    parser.add_argument("--train", type=int, default=100, help="Normal training images per task.")
    parser.add_argument("--test_normal", type=int, default=40, help="Normal test images per task.")
    parser.add_argument("--test_anomalous", type=int, default=40, help="Test images with a lesion per task.")
    parser.add_argument("--size", type=int, default=128, help="Height and width in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed gives other patients.")


def _phantom(options: Namespace) -> int:
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


# --- fit, import ----------------------------------------------------------------------------------------------------


def _fit_arguments(parser: ArgumentParser) -> None:
    from anatomaly.config import FitConfig

    parser.add_argument("--data", type=str, required=True, help="Folder or manifest with normal training images.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model; an unfinished run in it resumes.")
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Train on these tasks only.")
    parser.add_class_arguments(FitConfig)


def _fit(options: Namespace) -> int:
    from dataclasses import fields

    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import load_manifest

    config = FitConfig(**{field.name: options[field.name] for field in fields(FitConfig)})
    manifest = load_manifest(Path(options.data))

    from anatomaly.training import fit  # takes seconds to load, so it comes after what may be wrong

    fit(manifest if options.tasks is None else manifest.select(task=options.tasks), options.out, config)
    print(f"model: {options.out}")
    return 0


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", type=str, help="Checkpoint with the keys decoder and weight.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the model.")
    parser.add_argument("--teacher.weights", type=str, default="auto", help="WideResNet-50-2: auto, or a file.")


def _import(options: Namespace) -> int:
    from anatomaly.inference import import_checkpoint

    import_checkpoint(Path(options.file), teacher_weights=options.teacher.weights).save(options.out)
    print(f"model: {options.out}")
    return 0


# --- predict, evaluate, demo ------------------------------------------------------------------------------------------


def _model_arguments(parser: ArgumentParser) -> None:
    from typing import Literal

    parser.add_argument("--model", type=str, required=True, help="Folder made by fit or import.")
    parser.add_argument("--teacher.weights", type=str | None, help="Take the teacher's weights from this file.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="Where to compute.")
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="bf16 is faster.")
    parser.add_argument("--batch_size", type=int, default=16, help="Images per forward pass; changes no score.")


def _load(options: Namespace) -> Any:
    from anatomaly.inference import Detector

    if options.batch_size < 1:
        raise ConfigError(f"batch_size: got {options.batch_size}, expected at least 1.")
    return Detector.load(
        options.model,
        device=options.device,
        precision=options.precision,
        teacher_weights=options.teacher.weights,
    )


def _predict_arguments(parser: ArgumentParser) -> None:
    from anatomaly.types import Intensity

    _model_arguments(parser)
    parser.add_argument("--images", type=str, required=True, help="File, folder or manifest of images to judge.")
    parser.add_argument("--support", type=str, help="Folder or manifest of K normal images of the same kind.")
    parser.add_argument("--shots", type=int | None, default=None, help="Take only so many of the support images.")
    parser.add_argument("--bank", type=str, help="Saved support bank, instead of --support.")
    parser.add_argument("--save_bank", type=str, help="Save the support bank to this file.")
    parser.add_argument("--task", type=str, default="task", help="Name of the kind of image.")
    parser.add_argument("--intensity", type=Intensity | None, default=None, help="Rule where it differs from fit's.")
    parser.add_argument("--out", type=str, required=True, help="Folder for tables, maps, overlays and report.")
    parser.add_argument("--maps", type=bool, default=True, help="Write maps as float32 arrays and volumes.")
    parser.add_argument("--overlays", type=bool, default=True, help="Write overlays as PNG.")


def _predict(options: Namespace) -> int:
    from anatomaly.config import check_intensity
    from anatomaly.data.layouts import samples_of
    from anatomaly.data.manifest import load_manifest
    from anatomaly.data.transforms import load
    from anatomaly.output import predict_to_folder

    if (options.support is None) == (options.bank is None):
        raise ConfigError("predict: give either --support (normal images) or --bank (a saved bank).")
    if options.bank is not None and (options.shots is not None or options.intensity is not None):
        raise ConfigError("predict: --bank has its own shots and intensity rule. Leave out --shots and --intensity.")
    if options.intensity is not None:
        check_intensity(options.intensity, "intensity")
    images = Path(options.images)
    single = images.is_file() and images.suffix.lower() not in (".csv", ".json")
    samples = samples_of(images, task=options.task) if single else load_manifest(images, task=options.task).samples
    detector = _load(options)
    pictures = []
    if options.bank is not None:
        detector.load_support(options.bank)
    else:
        supports = _support_rows(Path(options.support), options.task, options.shots)
        detector.set_support(supports, task=options.task, intensity=options.intensity)
        pictures = [load(row, detector.ready().preprocessing).display for row in supports]
    if options.save_bank is not None:
        detector.save_support(options.save_bank)
    with _progress(len(samples)) as advance:
        summary = predict_to_folder(
            detector,
            samples,
            Path(options.out),
            batch_size=options.batch_size,
            task=options.task,
            bank_images=pictures,
            maps=options.maps,
            overlays=options.overlays,
            on_progress=advance,
        )
    scored = len(summary.predictions) - summary.failed
    print(f"{scored} images scored, {summary.failed} could not be read. Report: {summary.report}")
    if not scored:
        return _fail("no image could be scored; scores.csv says why for each.")
    return 0


def _support_rows(source: Path, task: str, shots: int | None) -> Any:
    """Normal rows of a folder or table: those of split train where it has any, never one that is labelled anomalous."""
    from anatomaly.data.manifest import load_manifest

    rows = [row for row in load_manifest(source, task=task) if row.label != 1]
    rows = [row for row in rows if row.split == "train"] or rows
    if shots is not None and not 1 <= shots <= len(rows):
        raise ConfigError(f"support: {source} has {len(rows)} normal images, {shots} shots asked. Change --shots.")
    return rows[:shots]


def _progress(total: int) -> Any:
    """A progress bar on a terminal, silence elsewhere; yields the function to call after every image."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("images", total=total)
            yield lambda _: progress.advance(task)

    return bar()


def _evaluate_arguments(parser: ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--data", type=str, required=True, help="Folder or manifest: normals in train, a test split.")
    parser.add_argument("--tasks", type=list[str] | None, default=None, help="Tasks to test; default all in the data.")
    parser.add_argument("--shots", type=list[int], default=[2, 4, 8], help="Values of K.")
    parser.add_argument("--draws", type=int, default=5, help="Support draws per K.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws.")
    parser.add_argument("--out", type=str, help="Folder for evaluation.json, draws.csv and scores.csv.")


def _evaluate(options: Namespace) -> int:
    from anatomaly.data.manifest import load_manifest
    from anatomaly.evaluation import evaluate, write_evaluations

    manifest = load_manifest(Path(options.data))
    detector = _load(options)
    results = []
    for task in options.tasks or manifest.tasks:
        results += evaluate(
            detector,
            manifest,
            task=task,
            shots=options.shots,
            draws=options.draws,
            seed=options.seed,
            batch_size=options.batch_size,
        )
    _print_table(f"{options.model}: {options.draws} support draws", [("", result) for result in results])
    if options.out is not None:
        write_evaluations(results, Path(options.out))
    return 0


def _print_table(title: str, results: Sequence[tuple[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from anatomaly.evaluation import table_of

    columns, rows, note = table_of(results)
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="Folder for data, model and report.")
    parser.add_argument("--seed", type=int, default=0, help="Of the images, the training and the draws.")


def _demo(options: Namespace) -> int:
    from anatomaly.demo import demo

    report, results = demo(Path(options.out), seed=options.seed)
    _print_table("A task nobody trained on", results)
    print(f"Report: {report}")
    return 0


class Command(NamedTuple):
    """One verb: its help line, its options, and what it does with them (returning the exit code)."""

    help: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


COMMANDS = {
    "demo": Command("Train on built-in images of four kinds, test on a fifth, write a report.", _demo_arguments, _demo),
    "data check": Command("Count, read and compare the images of a data set.", _check_arguments, _check),
    "data phantom": Command("Write the built-in benchmark: five tasks with lesions.", _phantom_arguments, _phantom),
    "fit": Command("Train a model on normal images of several tasks.", _fit_arguments, _fit),
    "predict": Command("Judge images against K normal ones and write a report.", _predict_arguments, _predict),
    "evaluate": Command(
        "Measure a model on labelled images over several support draws.", _evaluate_arguments, _evaluate
    ),
    "import d24fad": Command("Turn an official D24FAD checkpoint into a model.", _import_arguments, _import),
}


if __name__ == "__main__":
    raise SystemExit(main())
