"""The model of a job: its encoder, adapters and head, with the trainable tensors of its mode."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import set_seed

import mmadapters
from mmadapters import AdapterModel, Fuse, methods
from mmadapters.composition import parse

from .. import artifact
from ..config.schema import JobConfig
from ..core.model import TaskModel
from ..core.rows import Rows
from ..core.task import Task
from ..data.stream import Stream
from ..encoders.speech import convolutions
from ..registry import task_class

STREAMED = 10_000  # rows of a stream that labels and vocabularies are taken from


def make_model(config: JobConfig, rows: Rows | None) -> tuple[Task, TaskModel]:
    """Makes the task of a config and its model.

    Args:
        rows: the rows to which the task is fitted; see `rows_to_fit`.

    Returns:
        the fitted task, and its model, of which exactly what `trainer.mode` trains is trainable.
    """
    set_seed(config.seed)
    backbone = artifact.make_backbone(config.backbone)
    task = task_class(config.task)(config)
    task.fit(rows, backbone)
    return task, build_model(task, make_encoder(backbone))


def make_encoder(backbone: nn.Module) -> AdapterModel:
    """Makes the encoder on which one model is built, or several models one after another."""
    encoder = mmadapters.init(backbone)
    encoder.identity()  # hashes the original weights now, before training may change them
    return encoder


def build_model(task: Task, encoder: AdapterModel) -> TaskModel:
    """Builds the model of a fitted task, with a new adapter and a new head.

    Exactly what `trainer.mode` trains is trainable. Other adapters of the encoder are frozen, and
    inactive unless the composition of the config names them.
    """
    config, trainer, backbone = task.config, task.config.trainer, encoder.backbone
    full = trainer.mode == "full"
    encoder.train_trunk = full if trainer.trunk_dropout is None else trainer.trunk_dropout
    add_adapters(config, encoder)
    # A head starts from the same values in every mode, so that modes can be compared.
    set_seed(config.seed)
    model = task.build(encoder)
    model.active_in_training = artifact.modules_active_in_training(config.backbone, encoder)
    encoder.set_grad_checkpointing(trainer.gradient_checkpointing)
    if trainer.mode == "none":
        model.requires_grad_(False)
    if full:
        backbone.requires_grad_(True)
        if config.backbone.freeze_front_end and "audio" in encoder.sites.towers:
            for part in convolutions(backbone):
                part.requires_grad_(False)
    return model


def add_adapters(config: JobConfig, encoder: AdapterModel) -> None:
    """Loads the members, adds the adapter or fusion of this run and activates the composition.

    Only the new adapter or fusion is trainable.

    Raises:
        ValueError: there are members without a composition, or mode fusion without a `fuse`.
    """
    for name, directory in config.members.items():
        artifact.load_member(encoder, name, directory)
    adapter, drop = adapter_config(config), config.trainer.adapter_drop
    composition = parse(config.composition)
    if config.members and composition is None:
        raise ValueError(
            "members are loaded but composition does not say how they act: write, for instance, "
            f"composition: {{stack: [{next(iter(config.members))}, {config.name}]}}"
        )
    if config.trainer.mode == "fusion":
        if not isinstance(composition, Fuse):
            raise ValueError(
                "mode fusion trains the attention over several members: write composition: "
                "{fuse: [one, another]}"
            )
        encoder.add_adapter_fusion(composition)
        encoder.train_adapter_fusion(composition, drop=drop)
    elif adapter is None:
        encoder.set_active_adapters(composition, drop=0 if isinstance(drop, tuple) else drop)
    else:
        encoder.add_adapter(config.name, adapter)
        encoder.train_adapter(composition or config.name, drop=drop)
        for name in encoder.adapter_names:
            encoder.adapter(name).requires_grad_(name == config.name)


def rows_to_fit(rows: Any) -> Rows | None:
    """Returns the rows to which a task is fitted: all training rows, or some of a stream."""
    return rows.to_fit(STREAMED) if isinstance(rows, Stream) else rows


def adapter_config(config: JobConfig) -> mmadapters.MethodConfig | None:
    """Returns the adapter that `trainer.mode` inserts, or None in a mode without a new adapter."""
    mode = config.trainer.mode
    if mode in ("full", "head", "none", "fusion"):
        return None
    if mode == "adapter":
        return methods.from_dict(config.adapter)
    return methods.method_named(mode)()


def sizes(model: TaskModel, name: str) -> dict[str, Any]:
    """Counts the parameters of a model.

    Args:
        name: the adapter that is counted if no adapter is active.

    Returns:
        the parameters of the encoder; of the active adapters with a trained fusion; of the head;
        and the trained parameters of the encoder and its adapters over those of the encoder.
    """

    def count(module: nn.Module, *, trained: bool = False) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    encoder = count(model.encoder.backbone)
    acting = model.encoder.active_adapters
    names = [name] if acting is None else [*acting.names()]
    adapter = sum(
        count(model.encoder.adapter(other))
        for other in names
        if other in model.encoder.adapter_names
    )
    adapter += count(model.encoder.fusions, trained=True)
    trained = count(model.encoder, trained=True)
    return {
        "encoder_parameters": encoder,
        "adapter_parameters": adapter,
        "head_parameters": count(model.head, trained=True),
        "trained_share": trained / encoder,
    }
