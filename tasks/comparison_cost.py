"""What a training step costs, in time and memory, of several jobs side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .config import JobConfig, Split
from .run import make_model, rows_to_fit
from .task import Rows
from .training import TaskTrainer

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


def costs(jobs: Sequence[JobConfig], splits: Mapping[Split, Rows], *, steps: int) -> list[Cost]:
    """The costs of the jobs, on the first training batch of each; their steps are timed in turns,
    so that what else the machine does falls on all alike."""
    with TemporaryDirectory() as folder:
        runners = [_Stepper(job, splits, Path(folder) / str(i)) for i, job in enumerate(jobs)]
        seconds: list[list[float]] = [[] for _ in runners]
        for _ in range(steps):
            for runner, own in zip(runners, seconds, strict=True):
                own.append(runner.timed())
    return [
        Cost(statistics.median(own), runner.kept, runner.peak)
        for runner, own in zip(runners, seconds, strict=True)
    ]


class _Stepper:
    """A job's model and its first batch, on which it can take a step."""

    def __init__(self, job: JobConfig, splits: Mapping[Split, Rows], folder: Path) -> None:
        self.cuda = job.trainer.device != "cpu" and torch.cuda.is_available()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        task, model = make_model(job, rows_to_fit(splits.get("train")))
        self.trainer = TaskTrainer(
            task, model, train=splits["train"], validation=None, folder=folder, quiet=True
        )
        loaded = next(iter(self.trainer.get_train_dataloader()))
        if loaded.batch is None:
            raise ValueError(f"no row of the first batch can be used: {loaded.problems[0].reason}")
        model.to(self.trainer.args.device)
        self.model = model
        self.batch = self.trainer._prepare_inputs(loaded.batch)
        self.optimizer = self.trainer.create_optimizer()
        self.kept = 0
        with self._watched():
            self._step()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM - 1):
            self._step()
        self.peak = torch.cuda.max_memory_allocated() - before if self.cuda else None

    def timed(self) -> float:
        """The seconds of one step."""
        self._wait()
        started = time.perf_counter()
        self._step()
        self._wait()
        return time.perf_counter() - started

    def _step(self) -> None:
        self.model.train()
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Counts what is kept inside the block for a backward pass."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.kept = sum(kept.values())
