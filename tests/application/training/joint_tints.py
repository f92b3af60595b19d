"""Two small tasks on one encoder, and a program that trains them together.

python joint_tints.py FOLDER JSON_OF_TRAINER_SECTION
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from application.training.tints import Pictures, TintTask, job
from families.small import small_vit

import mmadapters
from mmadapters import SeqBnConfig
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.jobs.multitask.config import MultitaskConfig
from mmadapters.tasks.jobs.multitask.training import JointModel, JointTrainer
from mmadapters.tasks.training.checkpoint import trained_tensors

ROWS = {"first": 48, "second": 16}
STEADY = {"schedule": "constant", "warmup": 0.0, "learning_rate": 1e-2, "batch_size": 8}


def pictures(name: str) -> tuple[Pictures, Pictures]:
    """The rows that a task is trained and validated on."""
    seed = list(ROWS).index(name)
    return Pictures(ROWS[name], seed=seed), Pictures(24, seed=10 + seed)


def tasks(**trainer: Any) -> dict[str, TintTask]:
    return {name: TintTask(job(**trainer).model_copy(update={"name": name})) for name in ROWS}


def joint(made: dict[str, TintTask], sharing: Any) -> JointModel:
    """A model of all tasks, without dropout, whose adapters and heads train."""
    torch.manual_seed(0)
    encoder = mmadapters.init(small_vit())
    encoder.add_adapters(list(made), SeqBnConfig(size=8), sharing=sharing)
    encoder.adapters.requires_grad_(True)
    models: dict[str, TaskModel] = {name: task.build(encoder) for name, task in made.items()}
    for model in models.values():
        model.head[0].p = 0.0  # type: ignore[index]
    return JointModel(encoder, models)


def trainer(
    folder: Path,
    made: dict[str, TintTask],
    model: JointModel,
    *,
    sampling: Any = "proportional",
    broken: tuple[int, ...] = (),
) -> JointTrainer:
    """`broken`: rows that cannot be used of the second task."""
    rows = {name: pictures(name) for name in made}
    rows["second"][0].broken = broken
    config = MultitaskConfig(
        name="both", tasks=({"config": "a"}, {"config": "b"}), sampling=sampling
    )
    return JointTrainer(
        made,
        model,
        config,
        train={name: pair[0] for name, pair in rows.items()},
        validation={name: pair[1] for name, pair in rows.items()},
        folder=folder,
        quiet=True,
    )


def digest(model: JointModel) -> str:
    sha = hashlib.sha256()
    for tensor in trained_tensors(model).values():
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def main(folder: Path, settings: dict[str, Any]) -> None:
    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    made = tasks(**settings)
    model = joint(made, "half_down")
    training = trainer(folder, made, model)
    training.train()
    if state.is_main_process:
        logs = [log for log in training.state.log_history if "eval_mean" in log]
        figures = {
            "mean": [log["eval_mean"] for log in logs],
            "weights": {k: t.flatten()[:8].tolist() for k, t in trained_tensors(model).items()},
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
