"""The recipe of `nano/vit`: supervised pretraining on photographs of 64×64, then a linear probe.

It takes six minutes on one H100, and about four days on two CPU cores (estimated from single
steps). The settings are those of DeiT (Touvron et al. 2021), scaled down to 40,000 photographs:
strong augmentation, mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) in alternation,
stochastic depth, label smoothing.

Shape legend: N images, D width, C classes.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapters.files import write_text
from mmadapters.zoo import vit
from mmadapters.zoo.files import CARD, WEIGHTS, write_config, write_weights

from .. import photos, vit_figures
from . import training
from .training import IMAGE

CLASSES = 200
ARCHITECTURE: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 224,
    "depth": 8,
    "num_heads": 7,
    "num_classes": 0,
    "global_pool": "avg",
    "class_token": True,
    "fc_norm": False,
}
RATE, WARMUP, WEIGHT_DECAY = 2e-3, 400, 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this recipe."""
    training.add_arguments(parser, steps=12_000, batch_size=1_024)
    parser.add_argument("--probe-epochs", type=int, default=12, help="epochs of each linear probe")


def run(options: argparse.Namespace) -> None:
    """Pretrains, probes, and writes weights, probe, `config.json` and card to `options.out`."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    folder = training.photo_folder(options.data)
    train = [tensor.to(options.device) for tensor in photos.read_photos(folder, "train")]
    held_out = [tensor.to(options.device) for tensor in photos.read_photos(folder, "validation")]
    options.out.mkdir(parents=True, exist_ok=True)

    random_top1, _ = linear_probe(vit.build(**ARCHITECTURE), train, held_out, options=options)
    model = vit.build(**ARCHITECTURE | {"num_classes": CLASSES}, drop_path_rate=0.1)
    model.to(options.device)
    curve, seconds = pretrain(model, train, held_out, options=options)

    _write_encoder(model, options)
    encoder = vit.load_weights(options.out, ARCHITECTURE)  # the shipped weights, rounded to fp16
    _, probe = linear_probe(encoder, train, held_out, options=options)
    write_weights(probe, options.out, file=vit_figures.PROBE)
    rounded = {name: tensor.half().float() for name, tensor in probe.items()}
    top1 = probe_accuracy(encoder, rounded, held_out)

    claim = "linear probe, top-1 on tiny_imagenet_64/validation"
    config = {
        "name": "nano/vit",
        "architecture": ARCHITECTURE,
        "image": IMAGE,
        "figures": {
            "linear_probe": training.figure(claim, top1, 0.01),
            "linear_probe_random_weights": training.figure(claim, random_top1),
        },
        "training": training.record(options, curve, seconds=seconds, start=start),
    }
    write_config(config, options.out)
    write_card(config, options.out)
    print(f"linear probe {top1:.4f}, random weights {random_top1:.4f}, {seconds:.0f} s")


def pretrain(
    model: nn.Module,
    train: list[Tensor],
    held_out: list[Tensor],
    *,
    options: argparse.Namespace,
) -> tuple[list[dict[str, float]], float]:
    """Trains all of `model`; returns the held-out curve and the duration in seconds.

    Args:
        train: images (N, 3, 64, 64) uint8 and labels (N,).
        held_out: the same of the validation photographs.
    """
    images, labels = train
    forward = torch.compile(model) if options.compile else model
    adam = training.optimiser([(model, RATE)], weight_decay=WEIGHT_DECAY)
    batches = training.shuffled(len(images), options.batch_size, options.device)
    mixes = torch.distributions.Beta(0.8, 0.8), torch.distributions.Beta(1.0, 1.0)

    def step(number: int) -> Tensor:
        picked = next(batches)
        x = training.augment(images[picked])
        other = torch.randperm(len(picked), device=x.device)
        share = mixes[number % 2].sample().item()
        x, share = (_mixup, _cutmix)[number % 2](x, x[other], share)
        with training.autocast(options.device):
            logits = forward(x)
        target = labels[picked]
        return share * _loss(logits, target) + (1 - share) * _loss(logits, target[other])

    def evaluate(_number: int) -> dict[str, float]:
        _write_encoder(model, options)  # an interrupted run leaves its latest state
        model.eval()
        with torch.inference_mode(), training.autocast(options.device):
            parts = [model(photos.normalise(x, IMAGE)) for x in held_out[0].split(500)]
        model.train()
        hits = torch.cat(parts).argmax(dim=1) == held_out[1]
        return {"validation top-1": hits.double().mean().item()}

    return training.train(
        step, evaluate, model=model.train(), adam=adam, options=options, warmup=WARMUP
    )


def linear_probe(
    encoder: VisionTransformer,
    train: list[Tensor],
    held_out: list[Tensor],
    *,
    options: argparse.Namespace,
) -> tuple[float, dict[str, Tensor]]:
    """Trains one linear layer on the frozen encoder and measures it.

    The layer trains on augmented photographs. Its input is standardised by the statistics of the
    training features, which are then folded into the layer, so that one matrix and one bias remain.

    Args:
        train: images (N, 3, 64, 64) uint8 and labels (N,).
        held_out: the same of the validation photographs.

    Returns:
        top1: accuracy on the held-out photographs, in [0, 1].
        probe: `weight` (C, D), `bias` (C,).
    """
    encoder = encoder.to(options.device).eval().requires_grad_(False)
    images, labels = train
    sample = vit_figures.pooled(encoder, images[:5_000], image=IMAGE).clone()
    mean, std = sample.mean(dim=0), sample.std(dim=0) + 1e-6
    layer = nn.Linear(len(mean), CLASSES).to(options.device)
    adam = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = max(options.probe_epochs * len(images) // 1_000, 1)
    schedule = training.cosine(adam, steps=steps, warmup=20)
    batches = training.shuffled(len(images), 1_000, options.device)
    for _ in range(steps):
        picked = next(batches)
        with torch.no_grad(), training.autocast(options.device):
            tokens = encoder.forward_features(training.augment(images[picked]))
        features = tokens[:, 1:].float().mean(dim=1)
        loss = F.cross_entropy(layer((features - mean) / std), labels[picked])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    weight = layer.weight.detach() / std
    probe = {"weight": weight, "bias": layer.bias.detach() - weight @ mean}
    return probe_accuracy(encoder, probe, held_out), probe


def probe_accuracy(
    encoder: VisionTransformer, probe: dict[str, Tensor], held_out: list[Tensor]
) -> float:
    """Measures the top-1 accuracy of a folded probe on (images, labels)."""
    features = vit_figures.pooled(encoder, held_out[0], image=IMAGE)
    predicted = (features @ probe["weight"].T + probe["bias"]).argmax(dim=1)
    return (predicted == held_out[1]).double().mean().item()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, label_smoothing=0.1)


def _mixup(x: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    return torch.lerp(other, x, share), share


def _cutmix(x: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    """Pastes a box of `other` over a share 1 - `share` of x; returns x and its exact share."""
    size = x.shape[-1]
    side = round(size * (1 - share) ** 0.5)
    top, left = torch.randint(0, size - side + 1, (2,)).tolist()
    x = x.clone()
    box = (..., slice(top, top + side), slice(left, left + side))
    x[box] = other[box]
    return x, 1 - (side / size) ** 2


def _write_encoder(model: nn.Module, options: argparse.Namespace) -> None:
    tensors = {k: t for k, t in model.state_dict().items() if not k.startswith("head.")}
    write_weights(tensors, options.out)


def write_card(config: dict[str, Any], out: Path) -> None:
    """Writes the card of an encoder from its `config.json`."""
    figures = {key: 100 * figure["value"] for key, figure in config["figures"].items()}
    text = CARD_TEXT.format(
        **config["training"],
        **figures,
        megabytes=(out / WEIGHTS).stat().st_size / 1e6,
        table=training.curve_table(config["training"]["curve"]),
        licence=training.DATA_LICENCE,
    )
    write_text(out / CARD, text)


CARD_TEXT = """# nano/vit

A vision transformer for pictures of 64×64: patches of 8, width 224, 8 blocks, 7 heads, class token,
4.9M parameters, {megabytes:.2f} MB in fp16. It loads as timm's `VisionTransformer`, and with the
same weights as `transformers.ViTModel`. Training used the mean of the patch tokens. The class token
takes part in attention, but no loss was put on it.

| | top-1 on `tiny_imagenet_64/validation` (2,500 photographs, 200 classes) |
|---|---:|
| linear probe on these weights (ships as `probe.safetensors`) | {linear_probe:.2f} % |
| linear probe on random weights, same architecture | {linear_probe_random_weights:.2f} % |

`mmadapters zoo verify nano/vit --data FOLDER` measures the first again.

## Training
Supervised, {steps:,} steps of {batch_size:,} photographs, seed {seed}: {seconds:,} s, or
{total_seconds:,} s with decoding and both probes, on {machine}. The command is

    python -m mmadapters.tasks.zoo.pretrain vit --data FOLDER --out FOLDER

A GPU adds in no fixed order, so the seed repeats the recipe, not every digit of the figure. Two CPU
cores would take about four days, estimated from single steps.

{table}

The curve is that of the classification head, which does not ship. The weights are those of the last
step; nothing was chosen by the curve.

Data:
{licence}

## Not good for
Anything that needs detail beyond 64×64 or knowledge beyond 200 classes, since it has seen 40,000
photographs. It knows no faces, text or medical pictures. Pretraining and probe use the same
classes, so the figure says how well it separates those, not how well it transfers. Use it to learn
and test adapters, not to judge anybody or anything.
"""
