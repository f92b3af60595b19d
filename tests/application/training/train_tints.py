"""A program: trains the small task in FOLDER and writes its figures to FOLDER/figures.json.

    python train_tints.py FOLDER JSON_OF_TRAINER_SECTION [STEP]

The section may also say "dropout": false.
With STEP the process kills itself (SIGKILL) when so many steps are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from application.training.tints import Pictures, job, task_and_model
from transformers import TrainerCallback

from mmadapters.tasks.training.checkpoint import last_checkpoint, trained_tensors
from mmadapters.tasks.training.evaluate import evaluate
from mmadapters.tasks.training.trainer import TaskTrainer


class Killer(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, settings: dict, kill_at: int | None) -> None:
    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    dropout = settings.pop("dropout", True)
    task, model = task_and_model(job(**settings))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    trainer = TaskTrainer(
        task,
        model,
        train=Pictures(70),
        validation=Pictures(30, seed=1),
        folder=folder,
        quiet=True,
    )
    if kill_at is not None:
        trainer.add_callback(Killer(kill_at))
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.load_best()
    found = evaluate(task, model, Pictures(50, seed=2), batch_size=7)
    digest = hashlib.sha256()
    for tensor in trained_tensors(model).values():
        digest.update(tensor.contiguous().numpy().tobytes())
    if state.is_main_process:
        figures = {
            "resumed": None if checkpoint is None else checkpoint.name,
            "accuracy": task.score(found.records, bootstrap=0)["accuracy"].value,
            "answers": [record["correct"] for record in found.records],
            "indices": [record["index"] for record in found.records],
            "validation": [
                log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log
            ],
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "best": trainer.state.best_global_step,
            "hash": digest.hexdigest(),
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None)
