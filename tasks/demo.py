"""A first run: count the things in drawn scenes with a frozen, shipped encoder.

Three ways, each with a linear head on the mean token, the same scenes, steps and learning rates:
the frozen encoder alone, with bottleneck adapters and with LoRA in its upper blocks. The scenes are
synthetic, of shapes and colours that pretraining never drew.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapters import MethodConfig

TRAIN, TEST = 1000, 1000
EPOCHS, BATCH, LEARNING_RATE = 4, 50, 2e-3
CLASSES = 6  # one to five things, or more
UPPER = ("vision.blocks.[4-7]",)
WAYS = ("head only", "bottleneck", "lora")
TITLE = f"How many things are drawn? {TRAIN:,} synthetic scenes to train on, {TEST:,} to test"


@dataclass(frozen=True)
class Result:
    """One way's outcome. `correct`: (TEST,) bool; `trained`: parameters of adapter and head."""

    name: str
    correct: Tensor
    trained: int
    share: float
    kilobytes: float
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the accuracy over test scenes (normal approximation)."""
        p = self.accuracy
        return 1.96 * (p * (1 - p) / len(self.correct)) ** 0.5


def scenes(seeds: range) -> tuple[Tensor, Tensor]:
    """Drawn scenes as the encoder takes them, (N, 3, 64, 64), and their class, (N,)."""
    import torch

    from mmadapters.tasks.synthetic.scenes import UNSEEN, make_scene, render
    from mmadapters.zoo import nano_config

    drawn = [make_scene(seed, UNSEEN) for seed in seeds]
    images, _ = render(drawn, UNSEEN)
    config = nano_config("nano/vit")["image"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    counts = [min(len(scene.things), CLASSES) - 1 for scene in drawn]
    return (images / 255 - mean) / std, torch.tensor(counts)


def run(
    out: Path,
    progress: Callable[[str, float], None],
    *,
    train_scenes: int = TRAIN,
    test_scenes: int = TEST,
    epochs: int = EPOCHS,
) -> list[Result]:
    """Trains and tests the three ways, saves the adapters and heads under `out`.

    `progress(way, share)` is told how much of a way's training is done.
    """
    import mmadapters
    from mmadapters import LoRAConfig, SeqBnConfig
    from mmadapters.tasks.synthetic.scenes import TASK_SEEDS, TEST_SEEDS

    train = scenes(TASK_SEEDS[:train_scenes])
    test = scenes(TEST_SEEDS[:test_scenes])
    backbone = mmadapters.load_backbone("nano/vit")
    configs: tuple[MethodConfig | None, ...] = (
        None,
        SeqBnConfig(reduction_factor=8, sites=UPPER),
        LoRAConfig(rank=8, targets=("q", "v", "up", "down"), sites=UPPER),
    )
    return [
        _way(name, config, copy.deepcopy(backbone), train, test, epochs, out / name, progress)
        for name, config in zip(WAYS, configs, strict=True)
    ]


def _way(
    name: str,
    config: MethodConfig | None,
    backbone: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int,
    directory: Path,
    progress: Callable[[str, float], None],
) -> Result:
    import torch
    import torch.nn.functional as F

    import mmadapters

    torch.manual_seed(0)
    started = time.perf_counter()
    model = mmadapters.init(backbone)
    head = torch.nn.Linear(backbone.num_features, CLASSES)
    if config is not None:
        model.add_adapter("count", config)
        model.train_adapter("count")
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    per_epoch = len(train[1]) // BATCH
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    inputs, labels = train
    encode = functools.partial(_features, model)
    if config is None:
        # Nothing in the encoder changes: its features are computed once.
        inputs, encode = _all_features(model, inputs), torch.nn.Identity()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels)).split(BATCH)
        rows = order[step % per_epoch]
        loss = F.cross_entropy(head(encode(inputs[rows])), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(name, (step + 1) / steps)
    seconds = time.perf_counter() - started
    model.eval()
    guesses = head(_all_features(model, test[0])).argmax(1)
    kilobytes = 0.0
    if config is not None:
        model.save_adapter(directory, "count", head=head, metadata={"classes": CLASSES})
        kilobytes = (directory / "adapter.safetensors").stat().st_size / 1024
    count = sum(parameter.numel() for parameter in trained)
    base = sum(parameter.numel() for parameter in backbone.parameters())
    return Result(name, guesses == test[1], count, 100 * count / base, kilobytes, seconds)


def _all_features(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 3, 64, 64) -> (N, D), without gradients."""
    import torch

    with torch.no_grad():
        return torch.cat([_features(model, part) for part in images.split(250)])


def _features(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, 64, 64) -> (B, D): the mean over tokens."""
    return model.forward_features(images).mean(dim=1)
