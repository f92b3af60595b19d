"""Measures one method on one model in a peer and in ours, for the scripts of the peers.

Both libraries adapt copies of one model with random weights. The peer's adapter gets random values,
and each of its tensors is copied into ours.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, MethodConfig

OURS = "ours"
LIMIT = 1e-5
Call = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Equality:
    """One method on one model, in the peer and in ours.

    Attributes:
        parameters: number of adapter parameters that were copied.
        effect: largest change of an output by the adapter; it shows that the adapter is active.
        difference: largest difference between the peer's outputs and ours.
        relative: `difference` divided by the largest output.
        gradient: largest difference of adapter gradients divided by the largest gradient.
    """

    model: str
    method: str
    parameters: int
    effect: float
    difference: float
    relative: float
    gradient: float


@dataclass(frozen=True)
class Case:
    """The behaviour of a peer and of ours on one module.

    Attributes:
        title: the claim.
        peer, ours: the measured behaviour in words.
        holds: whether both behave as the title claims.
    """

    title: str
    peer: str
    ours: str
    holds: bool


@dataclass(frozen=True)
class Place:
    """The place of one tensor of the peer in ours.

    Attributes:
        keys: names of our tensors.
        split: whether the rows are divided among the keys; otherwise each key gets a copy.
    """

    keys: tuple[str, ...]
    split: bool = False


def write(equalities: list[Equality], cases: list[Case], packages: tuple[str, ...]) -> None:
    """Writes the measurements as JSON to the file named on the command line."""
    report = {
        "versions": {package: version(package) for package in packages},
        "equalities": [asdict(equality) for equality in equalities],
        "cases": [asdict(case) for case in cases],
    }
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Gives every linear map and LayerNorm weights that make outputs and attention uneven."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(mean=1.0, std=0.2)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            module.in_proj_weight.normal_(std=module.embed_dim**-0.5)
            module.in_proj_bias.normal_(std=0.1)
        bias = getattr(module, "bias", None)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and isinstance(bias, nn.Parameter):
            bias.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def perturb(parameters: Mapping[str, nn.Parameter]) -> None:
    """Moves adapter parameters far from their initial values; matrices by their column count."""
    for parameter in parameters.values():
        scale = 0.2 if parameter.dim() != 2 else 0.5 * parameter.shape[-1] ** -0.5
        parameter.add_(scale * torch.randn_like(parameter))


def called_with(*args: Any, **kwargs: Any) -> Call:
    """Calls any model with these inputs."""
    return lambda model: model(*args, **kwargs)


def outputs(call: Call, model: nn.Module) -> list[Tensor]:
    """Returns all floating-point tensors in a model's output, in order."""
    return list(_tensors(call(model)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Returns the largest absolute difference, or NaN if any is NaN."""
    pairs = zip(one, other, strict=True)
    return size([a.detach().double() - b.detach().double() for a, b in pairs])


@torch.no_grad()
def deviation(reference: nn.Module, adapted: nn.Module, call: Call) -> float:
    """Returns the largest difference between the outputs of two models."""
    return distance(outputs(call, reference), outputs(call, adapted))


def short(value: float) -> str:
    """Formats a number for a table with two digits."""
    return f"{value:.2g}"


def size(tensors: list[Tensor]) -> float:
    """Returns the largest absolute value, or NaN if any is NaN."""
    return torch.stack([tensor.abs().max().double() for tensor in tensors]).max().item()


def adapt(backbone: nn.Module, config: MethodConfig, **options: Any) -> AdapterModel:
    """Adapts a copy of the model with ours: one active, trainable adapter, in eval mode."""
    model = mmadapters.init(copy.deepcopy(backbone), **options)
    model.add_adapter(OURS, config)
    model.train_adapter(OURS)
    return model.eval()


def transfer(
    peer: Mapping[str, nn.Parameter], model: AdapterModel, places: Mapping[str, Place]
) -> None:
    """Copies the peer's adapter tensors into ours.

    Raises:
        ValueError: a tensor of either side has no counterpart.
    """
    tensors = model.adapter(OURS).tensors()
    filled = {key for place in places.values() for key in place.keys}
    if filled != tensors.keys() or places.keys() != peer.keys():
        raise ValueError(f"without a counterpart: {sorted(filled ^ tensors.keys())}")
    with torch.no_grad():
        for name, place in places.items():
            value = peer[name]
            pieces = value.chunk(len(place.keys)) if place.split else [value] * len(place.keys)
            for key, piece in zip(place.keys, pieces, strict=True):
                tensors[key].copy_(piece.reshape(tensors[key].shape))


def compare(
    model: str,
    method: str,
    *,
    base: nn.Module,
    peer: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    ours: AdapterModel,
    places: Mapping[str, Place],
    call: Call,
) -> Equality:
    """Perturbs the peer's adapter, copies it into ours and measures both.

    Args:
        parameters: adapter tensors of the peer.
    """
    perturb(parameters)
    transfer(parameters, ours, places)
    with torch.no_grad():
        plain = outputs(call, base)
    theirs, our_outputs = outputs(call, peer), outputs(call, ours)
    for tensors in (theirs, our_outputs):
        torch.manual_seed(0)
        sum((tensor * torch.randn_like(tensor)).sum() for tensor in tensors).backward()
    our_tensors = ours.adapter(OURS).tensors()
    pairs = []
    for name, place in places.items():
        gradients = [our_tensors[key].grad for key in place.keys]
        joined = torch.cat(gradients) if place.split else torch.stack(gradients).sum(0)
        pairs.append((parameters[name].grad, joined.reshape(parameters[name].shape)))
    return Equality(
        model=model,
        method=method,
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        effect=distance(theirs, plain),
        difference=distance(theirs, our_outputs),
        relative=distance(theirs, our_outputs) / size(theirs),
        gradient=distance(*map(list, zip(*pairs, strict=True))) / size([g for g, _ in pairs]),
    )
