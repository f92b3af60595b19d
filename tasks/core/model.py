"""The model of a task: a frozen encoder with adapters, and the head that is trained on it."""

from __future__ import annotations

import torch
from torch import nn

from mmadapters import AdapterModel


class TaskModel(nn.Module):
    """A frozen encoder with adapters, and the head that is trained on it.

    `forward(**batch)` returns a dict. Its "loss" is a scalar in float32, where the batch has
    targets. The head holds every trainable tensor that is not the adapter's, and only the head and
    the adapter are saved. No attribute may be called `config`, because transformers' Trainer would
    take it for a config of its library.

    Attributes:
        encoder: the encoder with its adapters.
        head: the layers of the task.
        active_in_training: modules of the encoder that are in train mode while the model trains:
            those of LayerDrop and SpecAugment, where a config asks for them.
    """

    def __init__(self, encoder: AdapterModel, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.active_in_training: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> TaskModel:
        """Puts adapter and head in train mode, and of the encoder only `active_in_training`."""
        super().train(mode)
        for module in self.active_in_training:
            module.training = mode
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
