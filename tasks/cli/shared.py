"""Errors, options and small helpers that all commands share."""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from mmadapters.errors import first_line

from ..config.errors import RenamedKeyWarning
from ..core.errors import AlreadyFinished
from ..reports.console import plain

DEBUG = "MMADAPTERS_DEBUG"
# Whether this process prints: torchrun and accelerate launch number their processes in RANK.
IS_FIRST = int(os.environ.get("RANK", "0")) == 0

ConfigName = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a config that ships with the package.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config: trainer.epochs=3"),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue from the last checkpoint in the run directory."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run in the run directory.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command so that a user's mistake is printed as one sentence and ends it with exit
    code 1. With MMADAPTERS_DEBUG=1 the traceback is shown instead."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _warnings_in_one_line():
                command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):  # Typer prints them
            raise
        except AlreadyFinished as error:
            if IS_FIRST:
                Console(stderr=True).print(plain(str(error)), highlight=False)
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            text = plain(_sentence(error))
            Console(stderr=True).print(f"[red]error:[/] {text}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return run


def _sentence(error: Exception) -> str:
    """Returns a sentence for a user about any error.

    Errors that our own code and the libraries raise about a user's input say what to do. All others
    are mistakes of ours: their traceback is written to a file, to be reported.
    """
    from safetensors import SafetensorError

    said = str(error)
    if said.startswith("Caught ") and " in DataLoader worker process" in said:
        # torch puts the traceback of the worker before the message.
        said = said.rstrip().splitlines()[-1].partition(": ")[2] or said
    if "No space left on device" in said or getattr(error, "errno", None) == errno.ENOSPC:
        where = getattr(error, "filename", None) or first_line(error)
        return f"the disk is full ({where}): make room and start again; what was whole before stays"
    if isinstance(error, MemoryError):
        return "there is not enough memory: take a smaller batch, or shorter or smaller inputs"
    known = (ValueError, OSError, RuntimeError, ImportError, SafetensorError)
    mistakes = (RecursionError, NotImplementedError, UnicodeError)
    if isinstance(error, known) and not isinstance(error, mistakes) and said:
        return said
    report = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="mmadapters-error-", suffix=".txt", delete=False
        ) as file:
            file.write(report)
        where = f"its traceback is in {file.name}"
    except OSError:
        where = f"{DEBUG}=1 shows its traceback"
    return (
        f"something that should not happen did ({type(error).__name__}: {first_line(error)}); "
        f"{where}: please report it with that"
    )


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints warnings about a user's config without the place in our code that issues them."""
    show = warnings.showwarning

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, RenamedKeyWarning):
            show(message, category, filename, lineno, file, line)
        elif IS_FIRST:
            text = f"[yellow]warning:[/] {plain(message)}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = show


def quiet_libraries() -> None:
    """Hides warnings that are meant for the authors of training scripts, and the progress bars of
    libraries, which would break into ours."""
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
