"""The commands that train: `train`, `continual`, `compare`, `multitask` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..reports.console import bar, plain, print_facts, print_scores
from .shared import (
    IS_FIRST,
    ConfigName,
    Overrides,
    Overwrite,
    Quiet,
    Resume,
    friendly,
    quiet_libraries,
)


@friendly
def train(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or the name of a config that ships with the package."),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    show_help: Annotated[
        bool,
        typer.Option("--help", help="Show this text; after a config or a task, list its keys."),
    ] = False,
) -> None:
    """Adapt an encoder to a task: train, evaluate on the test split, save, report.

    `mmadapters train segmentation --help` lists the keys of a task's config and their defaults.
    `mmadapters configs` lists the configs that ship with the package.
    """
    if config is None:
        typer.echo(context.get_help())
        return
    if show_help:
        _list_keys(config)
        return
    from ..config.file import read_config

    read = read_config(config, overrides or [])
    quiet_libraries()
    from ..jobs import run as runs
    from ..jobs.folder import REPORT

    with runs.processes(read):
        done = runs.train(read, resume=resume, overwrite=overwrite, quiet=quiet)
    if IS_FIRST:
        console = Console()
        if done.before is not None:
            print_scores(console, done.before, "before training")
        for split, scores in done.scores.items():
            print_scores(console, scores, split)
        print_facts(console, done.facts)
        if not done.unreported:
            console.print(f"Report: {done.folder / REPORT}", soft_wrap=True)
    _end_badly_without_report(done.unreported)


def _end_badly_without_report(reason: str) -> None:
    """Ends a command with exit code 1 if a report could not be made; the reason is printed already.

    Raises:
        typer.Exit: there is a reason.
    """
    if reason:
        raise typer.Exit(1)


def _list_keys(config: str) -> None:
    from ..config.file import read_config
    from ..config.keys import describe_keys
    from ..config.tasks import TASKS

    task = config if config in TASKS else read_config(config).task
    table = Table("key", "type", "default", "what", title=f"Keys of a {task} config")
    table.columns[0].no_wrap = True
    for key in describe_keys(task):
        table.add_row(
            *(plain(cell) for cell in (key.path, key.type, key.default_text, key.description))
        )
    Console().print(table)


@friendly
def continual(
    config: ConfigName,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Learn several jobs one after the other on one encoder, and measure how much is forgotten."""
    from ..jobs.continual.config import read_continual, read_jobs

    read = read_continual(config, overrides or [])
    jobs = read_jobs(read)
    quiet_libraries()
    from ..jobs import run as runs
    from ..jobs.continual import run as learning
    from ..jobs.continual.report import show

    def tell(text: str) -> None:
        if IS_FIRST and not quiet:
            Console(stderr=True).print(plain(text))

    with runs.processes(jobs[0]):
        done = learning.learn(read, overwrite=overwrite, quiet=quiet, tell=tell)
    if IS_FIRST:
        show(done, Console())
    _end_badly_without_report(done.unreported)


@friendly
def compare(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the trainings that are already finished.")
    ] = False,
    overwrite: Overwrite = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="Train only this method; a later call collects the results. May be repeated.",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods with plain bottlenecks of equal size: metric, step time, memory."""
    from ..jobs.comparison.config import read_comparison, read_contenders

    read = read_comparison(config, overrides or [])
    read_contenders(read)
    quiet_libraries()
    from ..jobs.comparison import report as reports
    from ..jobs.comparison import run as comparison

    with bar("comparing", 1) as progress:

        def tell(what: str, done: int, of: int) -> None:
            progress(done, of)
            if not quiet:
                Console(stderr=True).print(
                    f"{min(done + 1, of)}/{of} {plain(what)}", highlight=False
                )

        done = comparison.compare(
            read, resume=resume, overwrite=overwrite, only=only or (), tell=tell
        )
    if done is None:
        Console().print("Trained. `mmadapters compare … --resume` collects all finished trainings.")
    elif markdown:
        typer.echo(reports.markdown(done))
    else:
        reports.show(done, Console())


@friendly
def multitask(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train several tasks together on one encoder, with adapters that share all, half or none of
    their parameters."""
    from ..jobs.multitask.config import read_multitask, read_tasks

    read = read_multitask(config, overrides or [])
    jobs = read_tasks(read)
    quiet_libraries()
    from ..jobs import run as runs
    from ..jobs.multitask import run as joint
    from ..jobs.multitask.report import show

    with runs.processes(jobs[0]):
        done = joint.learn(read, resume=resume, overwrite=overwrite, quiet=quiet)
    if IS_FIRST:
        show(done, Console())
    _end_badly_without_report(done.unreported)


@friendly
def demo(
    out: Annotated[
        Path, typer.Option(help="The folder where the runs and their reports are saved.")
    ] = Path("out/demo"),
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Run only this task; may be repeated.")
    ] = None,
) -> None:
    """Train every task on shipped data and the nano encoders: head alone against adapters."""
    quiet_libraries()
    from ..jobs import demo as demos

    demos.show(demos.run(out, list(tasks or demos.TASKS)), Console(), out)
