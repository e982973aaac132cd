"""The command line: thin commands; torch and the rest are imported inside each, so that --help answers at once."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from anatomaly._version import __version__
from anatomaly.commands import (
    audit,
    benchmark,
    calibrate,
    data,
    demo,
    evaluate,
    explain,
    export,
    fit,
    predict,
    release,
    serve,
    support,
)
from anatomaly.commands.console import fail, instantiated, never_fail_to_print
from anatomaly.commands.processors import limit_threads
from anatomaly.errors import AnatomalyError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

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
    never_fail_to_print()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("lightning", "timm", "urllib3", "numba", "onnx_ir", "onnxscript"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        limit_threads()
        code = _overview(words) if name is None else COMMANDS[name].run(_parse(name, words[len(name.split()) :]))
        print(end="", flush=True)  # there may be no standard output at all
        return code
    except AnatomalyError as err:
        return fail(str(err))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends
        return 141
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:
            return fail(f"{str(err.filename)[:40]}...: the name is too long for a file.")
        if err.errno not in _CANNOT_WRITE:
            raise
        return fail(f"{err.filename or 'output'}: cannot be written ({err.strerror}). Choose another folder.")
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(err)):
            raise
        return fail("not enough memory. Lower --batch_size, --preprocessing.size or --training.cache_gib.")
    except KeyboardInterrupt:
        return fail("interrupted; what was written so far is complete.", code=130)


def _overview(words: Sequence[str]) -> int:
    """Answer --help, --version, a group such as `data`, and anything that is no command."""
    first = words[0] if words else "--help"
    if first == "--version":
        print(f"anatomaly {__version__}")
        return 0
    group = [name for name in COMMANDS if name.split()[0] == first]
    if not group and first not in ("-h", "--help"):
        return fail(f"unknown command {first!r}, expected one of {', '.join(COMMANDS)}.{_near(first, COMMANDS)}")
    if group and not {"-h", "--help"}.intersection(words) and len(words) > 1:
        return fail(f"unknown command {' '.join(words[:2])!r}, expected one of {', '.join(group)}.")
    print("usage: anatomaly COMMAND [options]    (anatomaly COMMAND --help lists the options)\n")
    print("Finds what is not normal in medical images after seeing only normal ones. Not for clinical use.\n")
    for name in group or COMMANDS:
        print(f"  {name:<18} {COMMANDS[name].help}")
    return 0


def _parse(name: str, words: Sequence[str]) -> Namespace:
    """Read a command's options from flags and YAML, with one line for whatever is wrong."""
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser, set_loader

    from anatomaly.data.decoding import MAX_DECODED_GIB, limit_decoded

    command = COMMANDS[name]
    parser = ArgumentParser(prog=f"anatomaly {name}", description=command.help, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with these settings; flags after it win.")
    command.arguments(parser)
    lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    set_loader("yaml", partial(_load_yaml, lists=lists), (yaml.YAMLError,))
    if command.reads_images:
        parser.add_argument(
            "--max_decoded_gib",
            type=float,
            default=MAX_DECODED_GIB,
            help="Refuse files that take more memory, decoded.",
        )
    try:
        if command.layered:
            from anatomaly.commands.settings import parse_layered

            options = instantiated(parser, parse_layered(parser, words))
        else:
            options = instantiated(parser, parser.parse_args(words))
        if preset := options.get("preset"):  # from a file, where what it should give way to cannot be told
            raise ConfigError(f"{name}: a preset cannot be named in a file. Give it as a flag: --preset {preset}.")
        if command.reads_images:
            limit_decoded(options.max_decoded_gib)
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


def _load_yaml(text: str, *, lists: Container[str] = ()) -> Any:
    """Read YAML with all words and numbers as text, for jsonargparse to read as the type of the setting.

    A task may be called `no` or `2024`, which YAML would take for false and a number.  Settings in `lists` may hold one
    word, as they may on the command line.
    """
    import yaml

    null, merge, plain = (f"tag:yaml.org,2002:{name}" for name in ("null", "merge", "str"))

    class Words(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 as in PyYAML
            first: [(tag, pattern) for tag, pattern in resolvers if tag in (null, merge)]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            for key, _ in node.value:
                key.tag = plain if key.tag == null else key.tag
            return super().construct_mapping(node, deep)

        def construct_sequence(self, node: Any, deep: bool = False) -> list[Any]:
            for item in node.value:
                item.tag = plain if item.tag == null else item.tag
            return super().construct_sequence(node, deep)

    try:
        value = yaml.load(text, Words)
    except RecursionError as err:
        raise yaml.YAMLError("nested too deep") from err
    if not isinstance(value, dict):
        return value
    if value and all(each is None for each in value.values()):
        return text  # a name such as `brain:` or `{a, b}`
    return {key: [each] if key in lists and isinstance(each, str) else each for key, each in value.items()}


#: What jsonargparse says, and how we say it; tests hold each to the installed version, or to what 4.46 said.
_REWORDED = (
    (r"Does not validate .*? intensity: got .*?(expected .*?) (?:- Exp|Given v).*value: (.*)", r"got \2, \1"),
    (
        r"Does not validate against any of the Union subtypes.*? Errors: "
        r"- (?:Expected a <class 'NoneType'> - )?(.*?) (?:- |Given value type).*Given value: (.*)",
        r"\1. Got \2",
    ),
    (
        r"Option '([^']+)' is required but not provided or its value is None",
        r"the following arguments are required: \1",
    ),
    (r"Problem with given class_path '[^']+': ", ""),
    (r"(\. Got value: \S+)\. Got (?:NestedArg|\{).*", r"\1"),
    (r'Parser key "([^"]+)": Expected', r"--\1: expected"),
    (r'Parser key "([^"]+)"', r"--\1"),
    (r"(?:a )?<class '(?:list|tuple)'>", "a list in brackets"),
    (r"a <class 'dict'>", "settings in braces"),
    (r"a <class 'int'>", "a whole number"),
    (r"a <class 'float'>", "a number"),
    (r"a <class 'bool'>", "true or false"),
    (r"a typing.Literal\[(.*?)\]", r"one of \1"),
    (r"\. Got value: ", ", got "),
    (r"\. Got ", ", got "),
)


def _plain(message: str) -> str:
    """Put what jsonargparse says in the words of a command line, without Python's types."""
    message = " ".join(message.split()).rstrip(".")
    for pattern, words in _REWORDED:
        message = re.sub(pattern, words, message)
    return message


def _near(word: str, known: Any) -> str:
    from difflib import get_close_matches

    names = {key.split(".")[-1] if "." not in word else key: key for key in known}
    found = get_close_matches(word, list(names), n=1)
    return f" Did you mean {names[found[0]]}?" if found else ""


class Command(NamedTuple):
    """One verb: its help line, its options, and what it does with them (returning the exit code).

    `layered` ones take the settings of `fit`, whose defaults follow the method (`commands.settings`); those that read
    images take `--max_decoded_gib`.
    """

    help: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    layered: bool = False
    reads_images: bool = True


COMMANDS = {
    "demo": Command(
        "Judge built-in images with eight normal ones, compare methods on them, write a report.",
        demo.demo_arguments,
        demo.run_demo,
        reads_images=False,
    ),
    "data check": Command("Count, read and compare the images of a data set.", data.check_arguments, data.run_check),
    "data phantom": Command(
        "Write the built-in benchmark: five tasks with lesions.",
        data.phantom_arguments,
        data.run_phantom,
        reads_images=False,
    ),
    "data list": Command(
        "List the public data sets of the papers.", data.list_arguments, data.run_list, reads_images=False
    ),
    "data prepare": Command("Turn a public download into a manifest.", data.prepare_arguments, data.run_prepare),
    "fit": Command("Train a model on normal images of several tasks.", fit.fit_arguments, fit.run_fit, layered=True),
    "predict": Command(
        "Judge images against K normal ones and write a report.", predict.predict_arguments, predict.run_predict
    ),
    "support check": Command(
        "Say which of K normal images does not belong with the others.", support.check_arguments, support.run_check
    ),
    "calibrate": Command(
        "Turn scores into p-values, from images known to be normal.",
        calibrate.calibrate_arguments,
        calibrate.run_calibrate,
    ),
    "evaluate": Command(
        "Measure a model on labelled images over several support draws.",
        evaluate.evaluate_arguments,
        evaluate.run_evaluate,
    ),
    "benchmark": Command(
        "Compare methods on the same images: a grid, resumable, to a leaderboard.",
        benchmark.grid_arguments,
        benchmark.run_grid,
        layered=True,
    ),
    "benchmark ablation": Command(
        "Train and judge a method's parts one by one, resumable.",
        benchmark.ablation_arguments,
        benchmark.run_ablation,
        layered=True,
    ),
    "audit": Command(
        "Show the same maps under the sound and the published evaluations.", audit.audit_arguments, audit.run_audit
    ),
    "explain teachers": Command(
        "Compare where two frozen teachers look, in maps and numbers.",
        explain.teachers_arguments,
        explain.run_teachers,
    ),
    "explain supports": Command(
        "Say which support images a verdict rests on.", explain.supports_arguments, explain.run_supports
    ),
    "serve": Command(
        "Judge images over HTTP: an API, a page, a PACS.",
        serve.serve_arguments,
        serve.run_serve,
    ),
    "export": Command(
        "Write a model or a teacher as ONNX, compared with itself in torch.",
        export.export_arguments,
        export.run_export,
    ),
    **{
        f"import {name}": Command(
            f"Turn an official {name} checkpoint into a model.",
            partial(release.release_arguments, name=name),
            partial(release.run_release, name=name),
            reads_images=False,
        )
        for name in release.released()
    },
}


if __name__ == "__main__":
    raise SystemExit(main())
