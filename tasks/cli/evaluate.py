"""The commands that apply a saved adapter: `evaluate`, `report` and `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..reports.console import bar, print_scores
from .shared import Overrides, friendly, quiet_libraries

Directory = Annotated[Path, typer.Argument(help="A run directory or an adapter directory.")]


@friendly
def evaluate(
    directory: Directory,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(help="Another data source: a folder, a file or a name on the hub."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure a saved adapter on a split of its own data or of other data."""
    quiet_libraries()
    from mmadapters.files import write_text

    from ..jobs.evaluation import evaluate_directory

    changes = [*(overrides or []), *([f"data.source={json.dumps(data)}"] if data else [])]
    with bar(f"evaluating {split}", 1) as progress:
        result = evaluate_directory(directory, split, overrides=changes, progress=progress)
    print_scores(Console(), result.scores, split)
    if result.problems:
        Console(stderr=True).print(f"{len(result.problems)} rows could not be used")
    if out is not None:
        write_text(out, json.dumps(result.figures, indent=2, ensure_ascii=False) + "\n")


@friendly
def report(
    directory: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    overrides: Overrides = None,
) -> None:
    """Make the report of a finished run again: its splits are evaluated, nothing is trained.

    Changes concern the report alone: evaluation.pictures=24.
    """
    quiet_libraries()
    from ..jobs.reporting import report_again

    page = report_again(directory, overrides or [])
    Console().print(f"Report: {page}", soft_wrap=True)


@friendly
def predict(
    directory: Directory,
    inputs: Annotated[
        list[str], typer.Argument(help="Files, folders, or other inputs that the task takes.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A folder for masks, pictures and predictions.jsonl.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change the saved job: backbone.weights=FILE", metavar="KEY=VALUE"
        ),
    ] = None,
) -> None:
    """Apply a saved adapter to files; prints a line of JSON for each input.

    Inputs that cannot be used are named at the end, with exit code 1.
    """
    quiet_libraries()
    from ..artifact import open_directory
    from ..jobs.prediction import predict as results

    opened = open_directory(directory, overrides=change or [])
    for result in results(opened, inputs, out=out):
        typer.echo(json.dumps(result, ensure_ascii=False))
