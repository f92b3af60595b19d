"""The command line `mmadapters`. Nothing heavy is imported before a command needs it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmadapters.zoo import NANO

app = typer.Typer(name="mmadapters", no_args_is_help=True, help="Adapters for frozen encoders.")
zoo = typer.Typer(no_args_is_help=True, help="The small pretrained encoders that ship with it.")
app.add_typer(zoo, name="zoo")

VERDICT = {True: "[green]holds[/]", False: "[red]does not hold[/]", None: "[yellow]not checked[/]"}


@app.callback()
def main() -> None:
    """Adapters for frozen encoders."""  # a callback keeps `zoo` a sub-command while it is alone


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the trained adapters are saved.")] = Path(
        "out/demo"
    ),
) -> None:
    """Adapt a shipped encoder to drawn scenes: head only, bottleneck adapters, LoRA."""
    from rich.progress import Progress

    from mmadapters.tasks import demo as first_run

    console = Console()
    with Progress(console=console) as bars:
        tasks = {way: bars.add_task(way, total=1.0) for way in first_run.WAYS}
        results = first_run.run(out, lambda way, share: bars.update(tasks[way], completed=share))
    table = Table(
        *("nano/vit with", "accuracy", "trained", "% of encoder", "adapter file", "seconds"),
        title=first_run.TITLE,
    )
    for result in results:
        size = f"{result.kilobytes:.0f} kB" if result.kilobytes else "-"
        table.add_row(
            result.name,
            f"{100 * result.accuracy:.1f} ± {100 * result.margin:.1f} %",
            f"{result.trained:,}",
            f"{result.share:.2f}",
            size,
            f"{result.seconds:.0f}",
        )
    console.print(table)
    console.print(f"The adapters are in {out}: two small files each.")


@zoo.command("list")
def list_encoders() -> None:
    """Name, libraries, size and card of every shipped encoder."""
    table = Table("name", "libraries", "MB", "what", "card")
    table.columns[-1].overflow = "fold"
    for name, row in NANO.items():
        size = sum(file.stat().st_size for file in row.directory.glob("*.safetensors")) / 1e6
        card = row.directory / "README.md"
        table.add_row(name, ", ".join(row.libraries), f"{size:.1f}", row.summary, str(card))
    Console().print(table)


@zoo.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Encoders; all by default.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data sets that some figures need.")
    ] = None,
) -> None:
    """Measure the cards' headline figures again; exit with 1 if one does not hold.

    A figure whose data or speech synthesiser is not there is "not checked", which is no pass; if
    nothing at all could be checked, the exit code is 2.
    """
    from mmadapters.zoo.verify import verify as recompute

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
