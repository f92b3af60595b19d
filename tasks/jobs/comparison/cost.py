"""What a training step costs, in time and memory, of several jobs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...config.schema import JobConfig, Split
from ...core.capabilities import Calibration, capability
from ...core.rows import Rows
from ...core.timing import kept_for_backward, seconds
from ...training.trainer import TaskTrainer
from ..run import chosen, device_of, make_model, rows_to_fit, without_test

WARM = 2  # steps before any is measured


@dataclass(frozen=True)
class Cost:
    """Of one training step: forward, backward and update.

    Attributes:
        step_seconds: the median.
        kept_bytes: what the forward pass keeps for the backward pass, parameters left out.
        peak_bytes: the most that was allocated on an accelerator, the model included; None on CPU.
    """

    step_seconds: float
    kept_bytes: int
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs(jobs: Sequence[JobConfig], splits: dict[Split, Rows], *, steps: int) -> list[Cost]:
    """The costs of the jobs, on the first training batch of each; their steps are timed in turns,
    so that what else the machine does falls on all alike."""
    with TemporaryDirectory() as folder:
        runners = [_Stepper(job, splits, Path(folder) / str(i)) for i, job in enumerate(jobs)]
        times: list[list[float]] = [[] for _ in runners]
        for _ in range(steps):
            for runner, own in zip(runners, times, strict=True):
                own.append(runner.timed())
    return [
        Cost(statistics.median(own), runner.kept, runner.peak)
        for runner, own in zip(runners, times, strict=True)
    ]


class _Stepper:
    """A job's model and its first batch, on which it can take a step."""

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
        self.batch = self.trainer._prepare_inputs(loaded.batch)
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
        """The seconds of one step."""
        return seconds(self._step, self.trainer.args.device)

    def _step(self) -> None:
        self.model.train()
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
