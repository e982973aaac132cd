"""What mkdocs adds to the pages in docs/: every command's help, the public functions, and the pages of the root."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: Pages of the root that the site shows beside those of docs/.
OF_THE_ROOT = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
#: Modules of the Python reference besides the public names of `anatomaly`: title, module, names.
MORE = (
    ("Scores and comparisons", "anatomaly.evaluation.metrics", ("auroc", "image_metrics", "bootstrap")),
    ("", "anatomaly.evaluation.comparison", ("compare_auroc", "holm")),
    ("", "anatomaly.evaluation.protocols", ("draw_supports", "leave_one_task_out")),
    ("The phantom", "anatomaly.synthetic.phantom", ("draw", "write_benchmark")),
    ("Peers", "anatomaly.benchmark.peers", ("build_peer",)),
    ("Errors", "anatomaly.errors", ()),
)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {name: (ROOT / name).read_text("utf-8") for name in OF_THE_ROOT}
    pages |= {"commands.md": commands(), "python.md": python()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links between docs/ and the root lead to the site's own pages."""
    if page.file.src_uri in OF_THE_ROOT:
        markdown = re.sub(r"\]\(README\.md", "](index.md", markdown)
        return re.sub(r"\]\(docs/", "](", markdown)
    if page.file.src_uri == "index.md":
        generated = "- [Commands](commands.md): every option.\n- [Python](python.md): every public function."
        markdown = re.sub(r"\n`make docs` adds .*", generated, markdown)
    return re.sub(r"\]\(\.\./((?:\.\./)*)([A-Z]+\.md)", r"](\1\2", markdown)


def commands() -> str:
    """Every command with its own `--help`, or with all its settings where that shows a few."""
    from anatomaly.cli import COMMANDS, main

    os.environ["COLUMNS"] = "80"
    text = "# Commands\n\nFor people who use the command line. This page is what `--help` says.\n"
    for name, command in COMMANDS.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*name.split(), "--help_all" if command.layered else "--help"])
        help_text = "".join(sign for sign in out.getvalue().strip() if sign.isprintable() or sign == "\n")
        if not help_text:
            raise RuntimeError(f"anatomaly {name} says nothing about its options.")
        text += f"\n## anatomaly {name}\n\n```text\n{help_text}\n```\n"
    return text


def python() -> str:
    """The public names of `anatomaly` by the module they live in, and some modules more."""
    from anatomaly import _PUBLIC

    text = "# Python\n\nFor people who call anatomaly from Python. `from anatomaly import NAME` gives the first part.\n"
    for name in sorted(_PUBLIC, key=str.lower):
        text += f"\n::: {_PUBLIC[name]}.{name}\n"
    for title, module, names in MORE:
        text += f"\n## {title}\n" if title else ""
        for name in names or ("",):
            text += f"\n::: {module}{'.' if name else ''}{name}\n    options:\n      heading_level: 3\n"
            text += "" if name else "      show_root_heading: false\n      show_root_toc_entry: false\n"
            text += "      show_root_full_path: true\n"
    return text
