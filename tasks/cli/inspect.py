"""The commands that look before anything is trained: `inspect`, `doctor` and `configs`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .shared import ConfigName, Overrides, friendly, quiet_libraries


@friendly
def inspect(
    backbone: Annotated[
        str, typer.Argument(help="A name that load_backbone takes: timm/…, nano/vit.")
    ],
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download its weights.")] = False,
    weights: Annotated[str | None, typer.Option(help="A local file of weights.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An argument of the library's constructor: img_size=224. May be repeated.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the sites of an encoder, their shapes, and the cost of each method."""
    quiet_libraries()
    from ..jobs import inspection

    result = inspection.inspect(
        backbone, pretrained=pretrained, weights=weights, options=_options(option or [])
    )
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        inspection.print_inspection(result, Console())


def _options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} is not of the form KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options


@friendly
def doctor(config: ConfigName, overrides: Overrides = None) -> None:
    """Read all data of a config and list its problems, before any training.

    The verdict is fine, suspicious (exit code 0; training names it again) or unusable (exit code
    1: a row cannot be used, or nothing can be learned).
    """
    from ..config.file import read_config

    read = read_config(config, overrides or [])
    quiet_libraries()
    from ..data.doctor import print_report
    from ..jobs.evaluation import examine_data

    report = examine_data(read)
    print_report(report, Console())
    if report.verdict == "unusable":
        raise typer.Exit(1)


@friendly
def configs() -> None:
    """List the configs that ship with the package."""
    from ..config.file import KINDS, config_names

    table = Table("name", "what")
    for kind in KINDS:
        for name, summary in config_names(kind).items():
            table.add_row(name, summary)
        table.add_section()
    Console().print(table)
