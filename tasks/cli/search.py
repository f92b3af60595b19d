"""The commands of image search: `index` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..reports.console import bar, plain
from .shared import friendly, quiet_libraries


@friendly
def index(
    directory: Annotated[Path, typer.Argument(help="A retrieval run or adapter directory.")],
    inputs: Annotated[list[str], typer.Argument(help="Image files, and folders of them.")],
    out: Annotated[Path, typer.Option(help="The folder of the new index.")] = Path("index"),
) -> None:
    """Build a FAISS index of pictures, which `search` searches by text or picture."""
    quiet_libraries()
    from ..artifact import open_directory
    from ..retrieval.index import build_index

    opened = open_directory(directory)
    with bar("encoding", 1) as progress:
        count = build_index(opened.task, opened.model, inputs, out, progress=progress)
    Console().print(f"{count} pictures in {out}", soft_wrap=True)


@friendly
def search(
    directory: Annotated[
        Path, typer.Argument(help="The run or adapter directory that the index was built with.")
    ],
    index: Annotated[Path, typer.Argument(help="A folder that `mmadapters index` wrote.")],
    query: Annotated[str, typer.Argument(help="Words, or the path of a picture.")],
    count: Annotated[int, typer.Option("-k", min=1, help="The number of results.")] = 5,
) -> None:
    """Search an index by words or by a picture."""
    quiet_libraries()
    from ..artifact import open_directory
    from ..retrieval.index import search_index

    opened = open_directory(directory)
    table = Table("similarity", "found", title=plain(query))
    for hit in search_index(opened.task, opened.model, index, query, count=count):
        table.add_row(f"{hit['similarity']:.3f}", plain(hit[hit["kind"]]))
    Console().print(table)
