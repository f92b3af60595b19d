"""The run directory: the names of its files, and how a run begins, goes on and ends in it.

config.yaml     the resolved config
metrics.json    figures with intervals, sizes, times, seed and environment
adapter/        everything that `predict` needs
report.html     curves, tables, pictures; opens offline
tensorboard/    events
checkpoints/    only during the run: `--resume` starts from the last one

Nothing is written before the data, the encoder and the adapter of a run are there. A run that
replaces an earlier one is written to `.NAME.new` beside it and takes its place when it is finished.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from mmadapters.files import exchange, write_text

from ..config.renamed import NewNames
from ..config.schema import Section
from ..core.errors import AlreadyFinished
from ..training.checkpoint import CHECKPOINTS, last_checkpoint
from .lock import locked

CONFIG, METRICS, REPORT = "config.yaml", "metrics.json", "report.html"

# Keys that training does not read. They may change when a run is resumed.
FREE = (
    *("evaluation.bootstrap", "evaluation.groups", "evaluation.pictures", "evaluation.before"),
    *("evaluation.adapter_drop", "trainer.eval_batch_size", "trainer.workers"),
    *("trainer.log_every", "trainer.tensorboard", "trainer.wandb"),
    *("trainer.cache_folder", "trainer.cache_budget", "top"),
)


class RunState(Enum):
    """How far the run in a directory has come."""

    ABSENT = "no run"
    BEGUN = "a run that has kept nothing yet"
    UNFINISHED = "an unfinished run"
    FINISHED = "a finished run"


@dataclass(frozen=True)
class RunFolder:
    """The directory of a run that is being written.

    Attributes:
        path: the run directory.
        place: the directory that is written to until the run is finished. It is `path`, or
            `.NAME.new` beside it if an earlier run is replaced.
        checkpoint: the checkpoint from which the run goes on, or None if it begins.
        config: the config of the run.
        goes_on: whether a run that was interrupted is continued.
    """

    path: Path
    place: Path
    checkpoint: Path | None
    config: Section
    goes_on: bool

    def inside(self, output: str) -> Path:
        """Returns the present place of a directory within the run directory."""
        return self.place / Path(output).relative_to(self.path)

    def write(self) -> None:
        """Makes the directory and writes its config; the first process calls it.

        A run that begins removes what an earlier start has left in the place.
        """
        if not self.goes_on and self.place.exists():
            shutil.rmtree(self.place)
        make_folder(self.place, self.config)

    def finish(self) -> None:
        """Puts the finished run in its place and removes the one that it replaces."""
        if self.place == self.path:
            return
        if self.path.exists():
            exchange(self.place, self.path)
            shutil.rmtree(self.place, ignore_errors=True)
        else:
            self.place.rename(self.path)


@contextlib.contextmanager
def run_folder(
    path: Path,
    config: Section,
    *,
    resume: bool,
    overwrite: bool,
    first: bool = True,
    result: str = METRICS,
    again: bool = False,
) -> Iterator[RunFolder]:
    """Decides where a run is written, and keeps other runs out of it inside the block.

    Args:
        path: the run directory.
        resume: go on with the run that is there.
        overwrite: replace the run that is there.
        first: whether this process writes. The others of its group hold no lock.
        result: the name of the file that a finished run has.
        again: whether a finished run may be resumed, to write its results anew.

    Raises:
        AlreadyFinished: the run that is to be resumed is finished.
        ValueError: the folder holds a run and neither `resume` nor `overwrite` is given, or it was
            begun with another config; or it holds other files; or another process writes to it.
    """
    with locked(path) if first else contextlib.nullcontext():
        folder = _decide(
            path, config, resume=resume, overwrite=overwrite, result=result, again=again
        )
        try:
            yield folder
        except BaseException:
            if first and folder.place != path and not _holds_work(folder.place):
                shutil.rmtree(folder.place, ignore_errors=True)
            raise


def _decide(
    path: Path, config: Section, *, resume: bool, overwrite: bool, result: str, again: bool
) -> RunFolder:
    beside = path.with_name(f".{path.name}.new")
    there, next_one = state_of(path, result), state_of(beside, result)
    if next_one is RunState.FINISHED and there is RunState.ABSENT:
        beside.rename(path)  # the process ended between the two renames of an exchange
        there, next_one = RunState.FINISHED, RunState.ABSENT
    if overwrite:
        kept = there in (RunState.UNFINISHED, RunState.FINISHED)
        return RunFolder(path, beside if kept else path, None, config, goes_on=False)
    if resume:
        place, state = path, there
        if next_one is RunState.UNFINISHED:
            place, state = beside, next_one
        if state in (RunState.UNFINISHED, RunState.FINISHED):
            _check_config(place, config)
            if state is RunState.FINISHED and not again:
                raise AlreadyFinished(
                    f"{path} holds a finished run: nothing is left to do; --overwrite trains it "
                    "anew"
                )
            return RunFolder(path, place, last_checkpoint(place), config, goes_on=True)
    elif there is RunState.FINISHED:
        raise ValueError(
            f"{path} holds a run already: choose another output=…, or pass --overwrite to replace "
            "it when the new one is finished (--resume goes on only with an unfinished one)"
        )
    elif there is RunState.UNFINISHED:
        raise ValueError(
            f"{path} holds an unfinished run: pass --resume to go on with it, --overwrite to begin "
            "anew, or choose another output=…"
        )
    return RunFolder(path, path, None, config, goes_on=False)


def state_of(folder: Path, result: str = METRICS) -> RunState:
    """Returns how far the run in a folder has come.

    Args:
        result: the name of the file that a finished run has.

    Raises:
        ValueError: the folder holds other files than a run, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file and no folder; choose another output=…")
    if not folder.exists() or all(_is_leftover(path) for path in folder.iterdir()):
        return RunState.ABSENT
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds other files than a run; choose another output=…")
    if (folder / result).is_file() and last_checkpoint(folder) is None:
        return RunState.FINISHED
    return RunState.UNFINISHED if _holds_work(folder) else RunState.BEGUN


def _is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a killed process has left of writing another."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _holds_work(folder: Path) -> bool:
    """Whether a run has kept more than its config, events and incomplete checkpoints."""
    if not folder.exists():
        return False
    if last_checkpoint(folder) is not None:
        return True
    empty = (CHECKPOINTS, "tensorboard")
    for path in folder.iterdir():
        if _is_leftover(path):
            continue
        if path.is_dir():
            if path.name not in empty and _holds_work(path):
                return True
        elif path.name != CONFIG:
            return True
    return False


def _check_config(folder: Path, config: Section) -> None:
    written = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    before = NewNames().of(written, lambda path: str(folder / CONFIG))
    changed = differences(before, config.to_save())
    # A file of an earlier version holds the values of environment variables.
    values = differences(before, config.model_dump(mode="json"))
    changed = [key for key in changed if key in values]
    # Several jobs have such keys in the overrides of each.
    if fixed := [key for key in changed if (key.partition(".overrides.")[2] or key) not in FREE]:
        raise ValueError(
            f"{folder} was begun with another config ({', '.join(fixed[:3])}): resume it with the "
            "same one, or choose another output"
        )


def make_folder(folder: Path, config: Section) -> None:
    """Makes the directory of a run, if it is not there, and writes its config."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        folder / CONFIG, yaml.safe_dump(config.to_save(), sort_keys=False, allow_unicode=True)
    )


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns the dotted keys whose values differ between two nested mappings.

    Lists of equal length are compared by place, if they hold mappings.
    """
    both = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    if both and all(isinstance(part, dict) for part in [*before, *now]):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        parts = [
            differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
            for key in keys
        ]
        return [key for part in parts for key in part]
    return [] if before == now else [path]
