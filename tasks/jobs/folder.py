"""The run directory: the names of its files, and how a run begins or resumes in it.

config.yaml     the resolved config
metrics.json    figures with intervals, sizes, times, seed and environment
adapter/        everything that `predict` needs
report.html     curves, tables, pictures; opens offline
tensorboard/    events
checkpoints/    only during the run: `--resume` starts from the last one
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from mmadapters.files import write_text

from .. import artifact
from ..config.renamed import NewNames
from ..config.schema import Section
from ..training.checkpoint import CHECKPOINTS, last_checkpoint

CONFIG, METRICS, REPORT = "config.yaml", "metrics.json", "report.html"


def check_folder(folder: Path, config: Section, *, resume: bool, overwrite: bool) -> Path | None:
    """Checks that a run may be written to a folder.

    Args:
        resume: go on with the run that is there.
        overwrite: replace the run that is there.

    Returns:
        the checkpoint from which the run goes on, or None if it starts from the beginning.

    Raises:
        ValueError: the folder holds a run and neither `resume` nor `overwrite` is given, or it was
            begun with another config; or the folder holds other files.
    """
    if not (folder / CONFIG).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files than a run; choose another output=…")
        return None
    if resume:
        written = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
        before = NewNames().of(written, lambda path: str(folder / CONFIG))
        if changed := differences(before, config.model_dump(mode="json")):
            raise ValueError(
                f"{folder} was begun with another config ({', '.join(changed[:3])}): resume it "
                "with the same one, or choose another output"
            )
        return last_checkpoint(folder)
    if not overwrite:
        raise ValueError(
            f"{folder} holds a run already: choose another output=…, or pass --resume to go on "
            "with it or --overwrite to replace it"
        )
    return None


def make_folder(folder: Path, config: Section) -> None:
    """Makes the directory of a new run, writes its config and removes the files of an old run."""
    for name in (CHECKPOINTS, "tensorboard", artifact.FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS, REPORT):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = config.model_dump(mode="json")
    write_text(folder / CONFIG, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Returns the dotted keys whose values differ between two nested mappings."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        parts = [
            differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
            for key in keys
        ]
        return [key for part in parts for key in part]
    return [] if before == now else [path]
