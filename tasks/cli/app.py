"""The command line `mmadapters`: every command in the order in which `--help` lists them.

No module of a command imports torch or another large library before the command runs.
"""

from __future__ import annotations

import typer

from . import bench, evaluate, inspect, search, train, zoo

app = typer.Typer(
    name="mmadapters",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adapters for frozen encoders: train, evaluate, predict.",
)
# `train` prints its help itself: that of a task or config lists the keys of a config.
app.command(add_help_option=False, context_settings={"allow_interspersed_args": True})(train.train)
app.command()(inspect.configs)
app.command()(train.continual)
app.command()(train.compare)
app.command()(bench.bench)
app.command()(train.multitask)
app.command()(evaluate.evaluate)
app.command()(evaluate.report)
app.command()(evaluate.predict)
app.command()(inspect.inspect)
app.command()(inspect.doctor)
app.command()(train.demo)
app.command()(search.index)
app.command()(search.search)
app.add_typer(zoo.app, name="zoo")
