"""A program: trains an adapter on a speech encoder whose layers are dropped, in each process.

    python train_dropped_layers.py FOLDER

It writes the steps that were done and whether all processes hold the same values at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from application.encoders.test_layer_drop import asr_job, spoken
from transformers import set_seed

import mmadapters
from mmadapters.tasks import artifact
from mmadapters.tasks.asr.task import ASRTask
from mmadapters.tasks.jobs.model import build_model
from mmadapters.tasks.training.checkpoint import trained_tensors
from mmadapters.tasks.training.trainer import TaskTrainer


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    config, rows = asr_job(), spoken(8)
    set_seed(0)
    backbone = artifact.make_backbone(config.backbone)
    task = ASRTask(config)
    task.fit(rows, backbone)
    model = build_model(task, mmadapters.init(backbone))
    # Each process drops other layers.
    trainer = TaskTrainer(task, model, train=rows, validation=None, folder=folder, quiet=True)
    torch.manual_seed(state.process_index)
    trainer.train()
    mine = torch.cat([t.detach().flatten() for t in trained_tensors(model).values()])
    every = [torch.empty_like(mine) for _ in range(state.num_processes)]
    dist.all_gather(every, mine)
    if state.is_main_process:
        told = {
            "processes": state.num_processes,
            "steps": trainer.state.global_step,
            "same": all(torch.equal(mine, other) for other in every),
        }
        (folder / "told.json").write_text(json.dumps(told))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
