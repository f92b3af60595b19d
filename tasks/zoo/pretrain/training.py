"""The parts that the image recipes share: options, augmentation, optimiser, schedule and loop.

Shape legend: N images, S image side in pixels.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import photos

# ImageNet's statistics, with which most image encoders of timm and transformers are trained.
IMAGE: dict[str, Any] = {"size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

DATA_LICENCE = """\
- `tiny_imagenet_64`: 40,000 photographs of ImageNet in 64×64 to train on and 2,500 held out, of 200
  classes, under ImageNet's terms: non-commercial research and education. They are not shipped.
  Before you use these weights commercially, judge for yourself whether those terms allow it."""

SCENES_LICENCE = """\
- Drawn scenes are synthetic: {scenes:,} of them with two captions each, made by
  `mmadapters.tasks.data.synthetic.scenes` (vocabulary `PRETRAINING`, seeds from 1,000,000 on), free
  of any licence but the package's. Seeds below 1,000,000 were never trained on; the figures are of
  seeds from 0 on, the curve's of seeds from 100,000 on."""


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, batch_size: int) -> None:
    """Adds the options of every image recipe.

    Args:
        steps: default of `--steps`.
        batch_size: default of `--batch-size`.
    """
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="photographs in a step")
    parser.add_argument(
        "--evaluate-every", type=int, default=max(steps // 10, 1), help="steps between evaluations"
    )
    parser.add_argument("--seed", type=int, default=0, help="of torch's random numbers")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="compile the model with torch.compile",
    )


def photo_folder(data: Path | None) -> Path:
    """Returns the folder of the photographs in `--data`.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = photos.find_photos(data)
    if folder is None:
        raise FileNotFoundError(f"--data {data} has no folder {photos.FOLDER} with classes.txt")
    return folder


def machine(device: str) -> str:
    """Describes the device for a card."""
    if device.startswith("cuda"):
        return f"one {torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    return f"{torch.get_num_threads()} threads of {platform.machine()}, PyTorch {torch.__version__}"


def figure(name: str, value: float, tolerance: float | None = None) -> dict[str, Any]:
    """Returns a figure of a card; `verify` measures those with a tolerance again."""
    entry: dict[str, Any] = {"name": name, "value": round(value, 4)}
    return entry if tolerance is None else entry | {"tolerance": tolerance}


def record(
    options: argparse.Namespace,
    curve: list[dict[str, float]],
    *,
    seconds: float,
    start: float,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the facts of a training for `config.json` and the card.

    Args:
        curve: held-out figures, from `train`.
        seconds: duration of the training, from `train`.
        start: `time.perf_counter()` at the start of the recipe.
        more: names of further options of the recipe to record.
    """
    return {
        **{key: getattr(options, key) for key in ("steps", "batch_size", *more, "seed")},
        "seconds": round(seconds),
        "total_seconds": round(time.perf_counter() - start),
        "machine": machine(options.device),
        "curve": curve,
    }


def optimiser(
    groups: list[tuple[nn.Module | nn.Parameter, float]], *, weight_decay: float
) -> torch.optim.AdamW:
    """Makes AdamW with a learning rate per module; only matrices decay, not norms and biases."""
    options: list[dict[str, Any]] = []
    for part, rate in groups:
        parameters = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        flat = [p for p in parameters if p.ndim < 2]
        matrices = [p for p in parameters if p.ndim >= 2]
        options.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
        options.append({"params": flat, "lr": rate, "weight_decay": 0.0})
    on_gpu = options[0]["params"][0].is_cuda
    return torch.optim.AdamW([o for o in options if o["params"]], betas=(0.9, 0.98), fused=on_gpu)


def cosine(
    adam: torch.optim.Optimizer, *, steps: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Makes a schedule of linear warm-up, then half a cosine to zero.

    Args:
        warmup: steps; at most a tenth of all steps are taken.
    """
    warmup = min(warmup, max(steps // 10, 1))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return torch.optim.lr_scheduler.LambdaLR(adam, factor)


def shuffled(count: int, batch_size: int, device: str) -> Iterator[Tensor]:
    """Yields batches of indices without end; each epoch has a new order and no short batch."""
    while True:
        batches = torch.randperm(count, device=device).split(min(batch_size, count))
        yield from (batch for batch in batches if len(batch) == min(batch_size, count))


def augment(
    images: Tensor,
    *,
    area: float = 0.35,
    aspect: float = 0.25,
    colour: float = 0.4,
    flip: bool = True,
) -> Tensor:
    """Crops, flips and recolours each image at random, on its device.

    Args:
        images: (N, 3, S, S) uint8.
        area: smallest share of the image that a crop keeps, in (0, 1]; 1 keeps the whole image.
        aspect: bound of the absolute log aspect ratio of a crop, 0 or more.
        colour: brightness, contrast and saturation are scaled by up to 1 ± this, in [0, 1].
        flip: whether half of the images are mirrored.

    Returns:
        (N, 3, S, S) fp32, normalised by `IMAGE`.
    """
    number, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(number, device=device).uniform_(low, high)

    x = images.float() / 255
    if area < 1 or flip:
        kept, ratio = uniform(area, 1), uniform(-aspect, aspect).exp()
        width, height = (kept * ratio).sqrt().clamp(max=1), (kept / ratio).sqrt().clamp(max=1)
        theta = torch.zeros(number, 2, 3, device=device)
        theta[:, 0, 0] = width * (torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if flip else 1.0)
        theta[:, 1, 1] = height
        theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
        theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    for reduced in (
        (1, 2, 3),
        (1,),
    ):  # contrast around the image's grey, saturation around the pixel's
        grey = x.mean(dim=reduced, keepdim=True)
        x = grey + (x - grey) * uniform(1 - colour, 1 + colour)[:, None, None, None]
    x = (x * uniform(1 - colour, 1 + colour)[:, None, None, None]).clamp(0, 1)
    mean, std = _statistics(device)
    return (x - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns `IMAGE`'s mean and std, each (3, 1, 1); cached, since a copy waits for the device."""
    mean, std = (torch.tensor(IMAGE[key], device=device)[:, None, None] for key in ("mean", "std"))
    return mean, std


def autocast(device: str, *, bf16: bool | None = None) -> torch.autocast:
    """Returns the precision of the forward pass: bf16 or fp32.

    Args:
        bf16: None means bf16 on a GPU and fp32 on a CPU, where bf16 is slow on most machines.
    """
    enabled = "cuda" in device if bf16 is None else bf16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def train(
    step: Callable[[int], Tensor],
    evaluate: Callable[[int], dict[str, float]],
    *,
    model: nn.Module,
    adam: torch.optim.Optimizer,
    options: argparse.Namespace,
    warmup: int,
) -> tuple[list[dict[str, float]], float]:
    """Trains for `options.steps` steps.

    Args:
        step: returns the loss (a scalar) of a step, by its number from 1.
        evaluate: returns held-out figures after a step; called after every
            `options.evaluate_every` steps and after the last one.
        warmup: steps, see `cosine`.

    Returns:
        curve: the figures of each evaluation, with their step.
        seconds: wall time with evaluation.
    """
    schedule = cosine(adam, steps=options.steps, warmup=warmup)
    curve, start = [], time.perf_counter()
    bar = tqdm(range(1, options.steps + 1), mininterval=5, desc="training")
    for number in bar:
        loss = step(number)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        if number % 100 == 0:  # reading the loss waits for the device
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if number % options.evaluate_every == 0 or number == options.steps:
            figures = {key: round(value, 4) for key, value in evaluate(number).items()}
            curve.append({"step": number, **figures})
            tqdm.write(str(curve[-1]))
    return curve, time.perf_counter() - start


def curve_table(curve: list[dict[str, float]]) -> str:
    """Formats the held-out curve as a Markdown table, shares in percent."""
    keys = [key for key in curve[0] if key != "step"]
    lines = ["| step | " + " | ".join(keys) + " |", "|---:" * (len(keys) + 1) + "|"]
    for row in curve:
        cells = [f"{row['step']:,}", *(f"{100 * row[key]:.1f} %" for key in keys)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
