"""transformers' `Trainer` for models of tasks: its loop, precision, processes and trackers.

Differences from it: a checkpoint holds the trained tensors alone, and counts only when it is
complete (`checkpoint`); evaluation is `evaluate`; the validation metric chooses the best model;
batches are the same for any number of processes (`data.batches`); no file is ever unpickled.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..config.schema import TrainerConfig
from ..core.device import default_device, processes, to_device
from ..core.errors import DataError, Problem
from ..core.model import TaskModel
from ..data.batches import EpochBatches, MixedBatches, share_of
from ..data.examples import Loaded
from ..data.workers import readers
from .callbacks import Patience, Progress
from .checkpoint import CHECKPOINTS, WEIGHTS, mark_whole, read_trained, write_trained
from .divergence import LossWatch

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class TrainLoader(DataLoader):
    """A loader whose batches have an order of their own in each epoch."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, (EpochBatches, MixedBatches)):
            self.batch_sampler.set_epoch(epoch)


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Lets a process train on one GPU, and says how to use all of them.

    transformers would take nn.DataParallel for several visible GPUs, whose copies of an encoder
    would share the hooks of the first one.
    """
    if arguments.n_gpu <= 1:
        return
    warnings.warn(
        f"one of {arguments.n_gpu} GPUs is used: start the run with torchrun --nproc-per-node "
        f"{arguments.n_gpu} -m mmadapters train … to use all",
        stacklevel=2,
    )
    arguments._n_gpu = 1  # transformers has no public way to say so


class EncoderTrainer(Trainer):
    """Trains the trainable tensors of a `TaskModel`.

    Subclasses provide the batches (`get_train_dataloader`), treat bad rows (`take_problems`) and
    validate (`validate`).

    Attributes:
        problems: rows of the training split that could not be used, by number.
        waited: seconds in which the model waited for data.
    """

    # True if a step may leave a trainable parameter without a gradient.
    finds_unused = False

    def __init__(
        self,
        model: TaskModel,
        *,
        name: str,
        seed: int,
        settings: TrainerConfig,
        batches: EpochBatches | MixedBatches | None,
        metric: str | None,
        greater_is_better: bool = True,
        folder: Path,
        quiet: bool = False,
    ) -> None:
        """
        Args:
            name: the name of the run, for trackers.
            settings: the `trainer` section of the config.
            batches: the batches of each epoch; None for a stream, which has no epochs.
            metric: the validation metric that chooses the best model; None without validation.
            folder: the run directory.
            quiet: no progress bar.
        """
        self.task_model, self.settings, self.batches = model, settings, batches
        self.name, self.seed, self.metric = name, seed, metric
        self.greater_is_better, self.folder = greater_is_better, folder
        self.problems: dict[int, Problem] = {}
        self.waited = 0.0
        self._losses_seen = LossWatch()
        _, world = processes()
        super().__init__(
            model=model,
            args=self._arguments(settings, world),
            # Subclasses hold the validation rows; transformers only asks if there are any.
            eval_dataset=None if metric is None else [],  # type: ignore[arg-type]
        )
        self._set_callbacks(settings, quiet=quiet)

    def _arguments(self, config: TrainerConfig, world: int) -> TrainingArguments:
        steps = self.total_steps()
        every = config.evaluate_every
        if every is None and self.batches is None:
            every = max(steps // 10, 1)
        evaluates = self.metric is not None
        save_every = config.save_every or every
        timing: dict[str, Any] = {
            "eval_strategy": ("epoch" if every is None else "steps") if evaluates else "no",
            "save_strategy": "epoch" if save_every is None else "steps",
        }
        if every is not None and evaluates:
            timing["eval_steps"] = every
        if save_every is not None:
            timing["save_steps"] = save_every
        arguments = TrainingArguments(
            output_dir=str(self.folder / CHECKPOINTS),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            per_device_train_batch_size=share_of(config.batch_size, config.accumulation, world),
            gradient_accumulation_steps=config.accumulation,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type=_SCHEDULES[config.schedule],
            warmup_steps=round(config.warmup * steps),
            max_grad_norm=config.max_grad_norm,
            bf16=config.precision == "bf16",
            fp16=config.precision == "fp16",
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_total_limit=2,
            metric_for_best_model=self.metric,
            greater_is_better=self.greater_is_better if evaluates else None,
            restore_callback_states_from_checkpoint=True,
            dataloader_num_workers=readers(config),
            remove_unused_columns=False,
            # A task does not use all parts of an encoder (poolers, other towers), and LayerDrop and
            # AdapterDrop leave out other adapters in every step.
            ddp_find_unused_parameters=self.finds_unused
            or config.mode == "full"
            or bool(self.task_model.active_in_training)
            or isinstance(config.adapter_drop, tuple),
            report_to=["wandb"] if config.wandb else [],
            run_name=self.name,
            seed=self.seed,
            # On a machine without an accelerator transformers accepts bf16 only with `use_cpu`.
            use_cpu="cpu" in (config.device, default_device()),
            **timing,
        )
        use_one_gpu(arguments)
        return arguments

    def _set_callbacks(self, config: TrainerConfig, *, quiet: bool) -> None:
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not quiet:
            self.add_callback(Progress())
        if config.early_stopping is not None and self.metric is not None:
            self.add_callback(Patience(config.early_stopping))
        if config.tensorboard and self.is_world_process_zero():
            from tensorboardX import SummaryWriter

            self.add_callback(TensorBoardCallback(SummaryWriter(str(self.folder / "tensorboard"))))

    def total_steps(self) -> int:
        """Returns the optimiser steps of the whole run."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        assert self.batches is not None
        return math.ceil(self.settings.epochs * self.batches.steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, None]:
        """Returns the batches of an optimiser step, each as keyword arguments of the model."""
        started = time.perf_counter()
        parts = []
        for _ in range(num_batches):
            loaded: Loaded | None = next(epoch_iterator, None)
            if loaded is None:
                break
            self.take_problems(loaded)
            if loaded.batch is None:
                raise DataError(
                    f"no row of a training batch can be used: {loaded.problems[0].reason}; "
                    "`mmadapters doctor` lists all"
                )
            parts.append(loaded.batch)
        self.waited += time.perf_counter() - started
        return parts, None

    def take_problems(self, loaded: Loaded) -> None:
        """Records the bad rows of a batch, or raises an error for them."""
        raise TypeError(f"{type(self).__name__} does not say what it does with bad rows")

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(inputs, self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trains on a part of a batch and returns its loss.

        Raises:
            ValueError: the loss stays without a finite value.
        """
        loss = super().training_step(*args, **kwargs)
        step = self.state.global_step + 1
        self._losses_seen.see(loss, step)
        # An accelerator would be waited for; a log waits for it anyway.
        if loss.device.type == "cpu" or step % self.args.logging_steps == 0:
            self._losses_seen.check(learning_rate=self._get_learning_rate())
        return loss

    def _refuse_diverged(self) -> None:
        """Raises ValueError if parameters would be saved that bad losses have destroyed."""
        self._losses_seen.check(
            learning_rate=self._get_learning_rate(),
            parameters=(p for p in self.task_model.parameters() if p.requires_grad),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            config = self.settings
            groups = parameter_groups(self.task_model if model is None else model, config)
            self.optimizer = torch.optim.AdamW(
                groups, lr=config.learning_rate, fused=self.args.device.type == "cuda"
            )
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Returns the metrics of `validate` under transformers' names, and logs them."""
        self._refuse_diverged()
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{name}": v for name, v in self.validate().items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def validate(self) -> dict[str, float]:
        """Returns the metrics of the validation split by name, without intervals."""
        raise TypeError(f"{type(self).__name__} does not say how it validates")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if not better and self.metric is not None:
            # Of equal models the latest has learned most: a metric may stand still at its worst
            # value while the model improves.
            better = metrics[f"eval_{self.metric}"] == self.state.best_metric
        if better:
            # transformers sets this only if a checkpoint is saved at the same step.
            self.state.best_global_step = self.state.global_step
            if self.args.should_save:
                write_trained(self.task_model, self.best_file())
        return better

    def fit(self, checkpoint: Path | None) -> dict[str, Any]:
        """Trains from the start or from a checkpoint, then loads the best model.

        Returns:
            figures of the training, JSON-ready: steps, the best step, seconds, and the share of
            them (0 to 1) in which the model waited for data.
        """
        started = time.perf_counter()
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self._refuse_diverged()
        seconds = time.perf_counter() - started
        self.load_best()
        return {
            "steps": self.state.global_step,
            "best_step": self.state.best_global_step,
            "train_seconds": round(seconds, 1),
            "waited_for_data": round(self.waited / seconds, 4),
        }

    def best_file(self) -> Path:
        """Returns the file of the best model so far.

        Its name holds the step, so that a resumed run reads the file that belongs to its state.
        """
        return self.folder / CHECKPOINTS / f"best-{self.state.best_global_step}.safetensors"

    def load_best(self) -> None:
        """Loads the model that was best on the validation split; without one the last stays."""
        if self.metric is not None and self.state.best_global_step:
            read_trained(self.task_model, self.best_file())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Called in every process.
        if not self.args.should_save:
            return
        folder = self.folder / CHECKPOINTS if output_dir is None else Path(output_dir)
        write_trained(self.task_model, folder / WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_diverged()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self.folder / CHECKPOINTS
            mark_whole(folder / f"checkpoint-{self.state.global_step}")
            for other in folder.glob("best-*.safetensors"):
                if other != self.best_file():
                    other.unlink()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        read_trained(self.task_model, Path(resume_from_checkpoint) / WEIGHTS)


def parameter_groups(model: nn.Module, config: TrainerConfig) -> list[dict[str, Any]]:
    """Returns the trainable parameters grouped by learning rate and weight decay.

    Vectors and scalars have no weight decay. The head and the backbone may have learning rates of
    their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("module.")
        rate = config.learning_rate
        if name.startswith("head."):
            rate = config.head_learning_rate or rate
        elif name.startswith("encoder.backbone."):
            rate = config.backbone_learning_rate or rate
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
