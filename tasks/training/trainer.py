"""transformers' `Trainer` for our tasks: its loop, precision, processes and trackers.

What differs from it: a checkpoint holds what is trained and no more, and counts only when it is
whole; evaluation is `evaluate`; the best model is kept by the validation metric; batches
are the same for any number of processes (`batches`); no file of it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mmadapters.files import replacing_file

from ..config.schema import TrainerConfig
from ..core.device import default_device, processes, to_device
from ..core.errors import DataError, Problem
from ..core.task import Rows, Scores, Task, TaskModel
from ..data.batches import EpochBatches, MixedBatches, StreamExamples, share_of
from ..data.examples import Collate, Examples, Loaded
from ..data.workers import loader_generator, readers
from .cache.cache import TrunkCache, prepare
from .cache.split import KeptSplit
from .evaluate import evaluate, refuse

CHECKPOINTS = "checkpoints"
_WEIGHTS, _WHOLE = "model.safetensors", "whole"


class TrainLoader(DataLoader):
    """A loader whose batches' order is that of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, (EpochBatches, MixedBatches)):
            self.batch_sampler.set_epoch(epoch)


class EncoderTrainer(Trainer):
    """Trains what of a `TaskModel` is trainable; subclasses say on what and how it is validated.

    Attributes:
        problems: rows of the training split that could not be used, by number.
        waited: seconds in which the model waited for data, of `seconds` in all.
    """

    # Whether a step may give no gradient to what is trained.
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
        """`batches` is None for a stream, which has no epochs; `metric` where nothing is
        validated."""
        self.task_model, self.settings, self.batches = model, settings, batches
        self.name, self.seed, self.metric = name, seed, metric
        self.greater_is_better, self.folder = greater_is_better, folder
        self.problems: dict[int, Problem] = {}
        self.waited = 0.0
        _, world = processes()
        super().__init__(
            model=model,
            args=self._arguments(settings, world),
            # What is validated is the subclass's to know; transformers asks only if it is there.
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
        return TrainingArguments(
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
            # An encoder has parts that a task does not use (poolers, other towers).
            ddp_find_unused_parameters=self.finds_unused
            or config.mode == "full"
            or isinstance(config.adapter_drop, tuple),
            report_to=["wandb"] if config.wandb else [],
            run_name=self.name,
            seed=self.seed,
            # Without an accelerator transformers refuses bf16 unless it is told so.
            use_cpu="cpu" in (config.device, default_device()),
            **timing,
        )

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
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        assert self.batches is not None
        return math.ceil(self.settings.epochs * self.batches.steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, None]:
        """The parts of a step as keyword arguments of the model; bad rows are counted here."""
        started = time.perf_counter()
        parts = []
        for _ in range(num_batches):
            loaded: Loaded | None = next(epoch_iterator, None)
            if loaded is None:
                break
            self.note(loaded)
            if loaded.batch is None:
                raise DataError(
                    f"no row of a training batch can be used: {loaded.problems[0].reason}; "
                    "`mmadapters doctor` lists all"
                )
            parts.append(loaded.batch)
        self.waited += time.perf_counter() - started
        return parts, None

    def note(self, loaded: Loaded) -> None:
        """Counts the bad rows of a batch, or refuses them."""
        raise TypeError(f"{type(self).__name__} does not say what it does with bad rows")

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(inputs, self.args.device)

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
        """What `validate` gives; keeps the best model."""
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{name}": v for name, v in self.validate().items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def validate(self) -> dict[str, float]:
        """The metrics of the validation split by name, without intervals."""
        raise TypeError(f"{type(self).__name__} does not say how it validates")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better:
            # transformers leaves this out where nothing is saved at the same moment.
            self.state.best_global_step = self.state.global_step
            if self.args.should_save:
                write_trained(self.task_model, self.best_file())
        return better

    def fit(self, checkpoint: Path | None) -> dict[str, Any]:
        """Trains from the start or a checkpoint, puts the best back, and tells how it went."""
        started = time.perf_counter()
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - started
        self.load_best()
        return {
            "steps": self.state.global_step,
            "best_step": self.state.best_global_step,
            "train_seconds": round(seconds, 1),
            "waited_for_data": round(self.waited / seconds, 4),
        }

    def best_file(self) -> Path:
        """Where the best model of the run so far lies: named by its step, so that a resumed run
        takes the one that its own state speaks of."""
        return self.folder / CHECKPOINTS / f"best-{self.state.best_global_step}.safetensors"

    def load_best(self) -> None:
        """Puts back what was best on the validation split; without one, the last stays."""
        if self.metric is not None and self.state.best_global_step:
            read_trained(self.task_model, self.best_file())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Called in every process.
        if not self.args.should_save:
            return
        folder = self.folder / CHECKPOINTS if output_dir is None else Path(output_dir)
        write_trained(self.task_model, folder / _WEIGHTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self.folder / CHECKPOINTS
            (folder / f"checkpoint-{self.state.global_step}" / _WHOLE).touch()
            for other in folder.glob("best-*.safetensors"):
                if other != self.best_file():
                    other.unlink()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        read_trained(self.task_model, Path(resume_from_checkpoint) / _WEIGHTS)


class TaskTrainer(EncoderTrainer):
    """Trains the model of one task on its rows."""

    def __init__(
        self,
        task: Task,
        model: TaskModel,
        *,
        train: Any,
        validation: Rows | None,
        folder: Path,
        quiet: bool = False,
    ) -> None:
        self.task = task
        self.train_rows, self.validation_rows = train, validation
        self.cache = TrunkCache()
        config = task.config.trainer
        streaming = not hasattr(train, "__len__")
        if streaming and config.max_steps is None:
            raise ValueError("a streamed training split has no end: set trainer.max_steps")
        if streaming and config.views is not None:
            raise ValueError(
                "trainer.views draws for rows that come back, and those of a stream do not: leave "
                "it out, or turn data.streaming off"
            )
        super().__init__(
            model,
            name=task.config.name,
            seed=task.config.seed,
            settings=config,
            batches=None if streaming else task_batches(task, train),
            metric=None if validation is None else task.metric,
            greater_is_better=task.greater_is_better,
            folder=folder,
            quiet=quiet,
        )

    def fit(self, checkpoint: Path | None) -> dict[str, Any]:
        """Trains from what is kept of the frozen encoder, as far as `trainer.cache_trunk` says."""
        config = self.settings
        steps = self.total_steps()
        rows = len(self.train_rows) if self.batches is not None else math.inf
        self.cache = prepare(
            self.task,
            self.task_model,
            self.train_rows,
            self.validation_rows,
            passes=steps * config.batch_size / rows,
            evaluations=self._evaluations(steps),
            quiet=not any(isinstance(c, Progress) for c in self.callback_handler.callbacks),
        )
        facts = super().fit(checkpoint)
        return facts if config.cache_trunk == "off" else {**facts, "cache": self.cache.facts()}

    def _evaluations(self, steps: int) -> int:
        if self.metric is None:
            return 0
        if self.args.eval_strategy == "steps" and self.args.eval_steps:
            return int(steps // self.args.eval_steps)
        assert self.batches is not None
        return math.ceil(steps / self.batches.steps)

    def get_train_dataloader(self) -> DataLoader:
        config, (rank, world) = self.settings, processes()
        common: dict[str, Any] = {
            "collate_fn": Collate(self.task),
            "pin_memory": self.args.device.type == "cuda",
            "generator": loader_generator(),
        }
        if self.batches is None:
            stream = StreamExamples(
                self.task, self.train_rows, seed=self.seed, rank=rank, world=world
            )
            share = share_of(config.batch_size, config.accumulation, world)
            workers = min(readers(config), 1)
            return TrainLoader(stream, batch_size=share, num_workers=workers, **common)
        examples: Any = Examples(self.task, self.train_rows, train=True, views=config.views)
        kept = self.cache.train
        workers = readers(config, decoded=kept is not None)
        if kept is not None:
            examples, workers = kept.examples, kept.workers(workers)
            common["collate_fn"] = kept.collate
        return TrainLoader(
            examples,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            **common,
        )

    def note(self, loaded: Loaded) -> None:
        self.problems |= {problem.index: problem for problem in loaded.problems}
        refuse(self.task, loaded.problems)
        if self.cache.train is not None:
            self.cache.train.read += len(loaded.indices)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The task's loss, and the penalty of a fusion that is trained; AdapterDrop draws here."""
        encoder, kept = self.task_model.encoder, self.cache.train
        resumed = contextlib.nullcontext() if kept is None else kept.resumed(inputs)
        with encoder.randomly_dropped(), resumed:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.settings.mode != "fusion":
            return loss
        assert isinstance(loss, Tensor)
        return loss + encoder.fusion_penalty()

    def validate(self) -> dict[str, float]:
        assert self.validation_rows is not None
        kept = self.cache.validation
        scores = validated(self.task, self.task_model, self.validation_rows, kept=kept)
        return {metric.name: metric.value for metric in scores.metrics}


def task_batches(task: Task, rows: Rows) -> EpochBatches:
    """The batches of one task on its rows, for this process."""
    config, (rank, world) = task.config.trainer, processes()
    return EpochBatches(
        len(rows),
        config.batch_size,
        seed=task.config.seed,
        accumulation=config.accumulation,
        rank=rank,
        world=world,
        lengths=task.lengths(rows),
        groups=task.groups(rows),
    )


def validated(task: Task, model: TaskModel, rows: Rows, *, kept: KeptSplit | None = None) -> Scores:
    """A task's scores without intervals, in the batches that its config says; `kept`: of rows."""
    config = task.config.trainer
    _, world = processes()
    share = share_of(config.batch_size, config.accumulation, world)
    found = evaluate(
        task,
        model,
        rows,
        batch_size=config.eval_batch_size or share,
        workers=readers(config, decoded=kept is not None),
        precision=config.precision,
        kept=kept,
    )
    return task.score(found.records, bootstrap=0)


_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run: a process that was killed may leave a part of one."""
    found = [path.parent for path in (folder / CHECKPOINTS).glob(f"checkpoint-*/{_WHOLE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def parameter_groups(model: nn.Module, config: TrainerConfig) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and weight decay (none for vectors and scalars)."""
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


def trained_tensors(model: TaskModel) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers beside them; shared ones once."""
    parts = ["head.", "encoder.adapters.", "encoder.fusions."]
    if any(parameter.requires_grad for parameter in model.encoder.backbone.parameters()):
        parts.append("encoder.backbone.")
    tensors = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    tensors |= {n: b for n, b in model.named_buffers() if n.startswith(tuple(parts))}
    return tensors


def write_trained(model: TaskModel, path: Path) -> None:
    """Writes `trained_tensors`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().cpu().contiguous() for k, t in trained_tensors(model).items()}
    with replacing_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_trained(model: TaskModel, path: Path) -> None:
    """Copies in what `write_trained` wrote.

    Raises:
        ValueError: the file is of another model.
    """
    own, stored = trained_tensors(model), load_file(path)
    if own.keys() != stored.keys() or any(own[k].shape != stored[k].shape for k in own):
        raise ValueError(
            f"{path} is a checkpoint of another model: the config was changed after it was written"
        )
    for key, tensor in own.items():
        tensor.copy_(stored[key])


class Patience(EarlyStoppingCallback):
    """Early stopping, without the advice to let transformers keep the best model."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        return


class Progress(ProgressCallback):
    """The progress bar, with a line for each evaluation instead of one for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")
        values = [
            f"{key.removeprefix('eval_')} {value:.4g}"
            for key, value in logs.items()
            if key.startswith("eval_") and key != "eval_runtime"
        ]
        if values:
            self.training_bar.write(f"step {state.global_step}  validation  {'  '.join(values)}")
