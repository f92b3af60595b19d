"""The commands about the small shipped encoders: `zoo list` and `zoo verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmadapters.zoo import NANO

VERDICT = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "[yellow]not checked[/]"}

app = typer.Typer(
    no_args_is_help=True, help="The small pretrained encoders that ship with the package."
)


@app.command("list")
def list_encoders() -> None:
    """List name, libraries, size and card of every shipped encoder."""
    table = Table("name", "libraries", "MB", "what", "card")
    table.columns[-1].overflow = "fold"
    for name, row in NANO.items():
        size = sum(file.stat().st_size for file in row.directory.glob("*.safetensors")) / 1e6
        card = row.directory / "README.md"
        table.add_row(name, ", ".join(row.libraries), f"{size:.1f}", row.summary, str(card))
    Console().print(table)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="The encoders to check; all by default.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder of the data sets that some figures need.")
    ] = None,
) -> None:
    """Measure the headline figures of the cards again; exits with 1 if one does not hold.

    A figure is "not checked" if its data or its speech synthesizer is missing; that is not a pass.
    If no figure could be checked, the exit code is 2.
    """
    from ..zoo.verify import verify as recompute

    if unknown := sorted(set(names or ()) - set(NANO)):
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(NANO)}")
    figures = recompute(names or None, data=data)
    table = Table("figure", "card", "now", "tolerance", "", "note")
    for figure in figures:
        now = "—" if figure.measured is None else f"{figure.measured:.4f}"
        claimed, tolerance = f"{figure.expected:.4f}", f"{figure.tolerance:.4f}"
        verdict = VERDICT[figure.holds]
        table.add_row(figure.name, claimed, now, tolerance, verdict, figure.note)
    Console().print(table)
    verdicts = [figure.holds for figure in figures]
    if False in verdicts:
        raise typer.Exit(1)
    if True not in verdicts:
        raise typer.Exit(2)
