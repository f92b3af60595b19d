"""A program: trains a job of `trunk_jobs` in FOLDER and writes FOLDER/figures.json.

python train_trunk.py FOLDER JOB JSON_OF_TRAINER_SECTION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from application.training.trunk_jobs import figures, fitted


def main(folder: Path, name: str, settings: dict[str, Any]) -> None:
    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    training, told = fitted(name, folder, **settings)
    if state.is_main_process:
        losses, metrics = figures(training)
        found = {"losses": losses, "metrics": metrics, "cache": told.get("cache")}
        (folder / "figures.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
