"""anatomaly benchmark ...: tables that compare methods and their parts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def ablation_arguments(parser: ArgumentParser) -> None:
    """Options of `benchmark ablation`."""
    from anatomaly.config import FitConfig

    parser.add_argument("paper", type=Literal["pdd", "d24fad"], help="Whose ablation.")
    parser.add_argument("--data", type=str, required=True, help="Folder or manifest: normals in train, a test split.")
    parser.add_argument("--out", type=str, required=True, help="Folder; finished cells in it are not redone.")
    parser.add_argument("--tasks", type=list[str], default=[], help="Tasks to judge; default all in the data.")
    parser.add_argument("--rows", type=list[str], default=[], help="Rows of the table; default all.")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="Of the training, one model each.")
    parser.add_argument("--shots", type=int, default=4, help="K of few-shot rows.")
    parser.add_argument("--draws", type=int, default=5, help="Support draws of few-shot rows.")
    parser.add_argument("--preset", type=str, help="d24fad-paper, d24fad-release, pdd-paper or pdd-release.")
    parser.add_class_arguments(FitConfig)


def run_ablation(options: Namespace) -> int:
    """Run `benchmark ablation`."""
    from rich.console import Console
    from rich.table import Table

    from anatomaly import ablation
    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import load_manifest

    results = ablation.run_ablation(
        load_manifest(Path(options.data)),
        Path(options.out),
        FitConfig(**{field.name: options[field.name] for field in fields(FitConfig)}),
        method=options.paper,
        rows=options.rows,
        tasks=options.tasks,
        seeds=options.seeds,
        shots=options.shots,
        draws=options.draws,
        on_cell=print,
    )
    columns, cells = ablation.table_of(results)
    over = f"mean ± sd over {len(options.seeds)} seeds (95 % interval over test images)"
    table = Table(title=f"{options.paper}: image AUROC, {over}", title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    print(f"{options.out}/ablation.md")
    return 0
