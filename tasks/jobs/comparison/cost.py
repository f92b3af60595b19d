"""Measures the time and memory of a training step, of several jobs in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ...config.schema import JobConfig, Split
from ...core.capabilities import Calibration, capability
from ...core.device import to_device
from ...core.rows import Rows
from ...core.timing import kept_for_backward, seconds
from ...training.trainer import TaskTrainer
from ..model import make_model, rows_to_fit
from ..run import chosen, device_of, without_test
from .results import Cost

WARM = 2  # steps before the first one that is timed


def costs(jobs: Sequence[JobConfig], splits: dict[Split, Rows], *, steps: int) -> list[Cost]:
    """Measures each job on its first training batch.

    The jobs take their steps in turns, so that other work of the machine slows all of them alike.

    Args:
        splits: the rows by split.
        steps: the timed steps of each job.
    """
    with TemporaryDirectory() as folder:
        runners = [_Stepper(job, splits, Path(folder) / str(i)) for i, job in enumerate(jobs)]
        times: list[list[float]] = [[] for _ in runners]
        for _ in range(steps):
            for runner, of_runner in zip(runners, times, strict=True):
                of_runner.append(runner.timed())
    return [
        Cost(statistics.median(of_runner), runner.kept, runner.peak)
        for runner, of_runner in zip(runners, times, strict=True)
    ]


class _Stepper:
    """A job's model and its first batch, on which it takes training steps."""

    def __init__(self, job: JobConfig, splits: dict[Split, Rows], folder: Path) -> None:
        self.cuda = job.trainer.device != "cpu" and torch.cuda.is_available()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        task, model = make_model(job, rows_to_fit(splits.get("train")))
        model.to(device_of(job))
        splits = chosen(task, splits)
        capability(task, Calibration).prepare(model, without_test(splits))
        self.trainer = TaskTrainer(
            task, model, train=splits["train"], validation=None, folder=folder, quiet=True
        )
        loaded = next(iter(self.trainer.get_train_dataloader()))
        if loaded.batch is None:
            raise ValueError(f"no row of the first batch can be used: {loaded.problems[0].reason}")
        self.model = model
        self.batch = to_device(loaded.batch, self.trainer.args.device)
        self.optimizer = self.trainer.create_optimizer()
        with kept_for_backward(self.model.parameters()) as kept:
            self._step()
        self.kept = kept.bytes
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM - 1):
            self._step()
        self.peak = torch.cuda.max_memory_allocated() - before if self.cuda else None

    def timed(self) -> float:
        """Takes a step and returns its seconds."""
        return seconds(self._step, self.trainer.args.device)

    def _step(self) -> None:
        self.model.train()
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
