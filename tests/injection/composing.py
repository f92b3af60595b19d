"""Adapters, routes and inputs for the tests of compositions, and what a model says of a sample."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from families import Family, tensors
from families.small import randomise
from injection.matrix import EVERYWHERE, FAMILIES, NO_BIAS, READS_WEIGHTS, bare
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    Fuse,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    ParBnConfig,
    PrefixConfig,
    Route,
    SeqBnConfig,
    SSFConfig,
    Stack,
)

# transformers 4 cannot mask the text of CLIP in float64, in which these tests compute.
_MASKS_IN_DOUBLE = int(transformers.__version__.partition(".")[0]) >= 5
NAMES = (
    "timm-vit",
    "timm-eva",
    "hf-vit",
    *(["hf-clip"] if _MASKS_IN_DOUBLE else []),
    "open_clip-clip",
    "hf-wav2vec2",
    "torchaudio-wav2vec2-prenorm",
    "hf-blip-vqa",
    "hf-blip-retrieval",
    "hf-bert",
    "hf-t5",
)
each_family = pytest.mark.parametrize("name", NAMES)

ADAPTERS: dict[str, MethodConfig] = {
    "small": DoubleSeqBnConfig(size=4),
    "large": DoubleSeqBnConfig(size=7),
    "normed": BottleneckConfig(size=5, norm="after", learn_scale="channel"),
    "seq": SeqBnConfig(size=6),
    "par": ParBnConfig(size=3),
    "compacter": CompacterConfig(reduction_factor=4),
    "lora": LoRAConfig(rank=2, targets=EVERYWHERE),
    "lora4": LoRAConfig(rank=4, alpha=8, targets=("q", "v")),
    "dora": DoRAConfig(rank=3, targets=EVERYWHERE),
    "ia3": IA3Config(targets=("k", "v", "down")),
    "ssf": SSFConfig(),
    "bitfit": BitFitConfig(),
    "prefix": PrefixConfig(length=2),
    "prefix5": PrefixConfig(length=5, reparametrise=4),
    "union": ConfigUnion(
        LoRAConfig(rank=3), SeqBnConfig(size=5), LoRAConfig(rank=2, targets=("o",))
    ),
}
BRANCHES = {"small", "large", "normed", "seq", "par", "compacter"}
FUSE = Fuse("small", Stack("seq", "large"))
ROUTES: dict[str, list[Any]] = {
    "sizes": ["small", "large", "base", "small", "large"],
    "placements": ["par", "seq", "normed", "compacter", None, "small"],
    "fusions": [FUSE, "small", "base", FUSE, Average("small", "seq", weights=(3, 1))],
    "ranks": ["lora", "lora4", "base", "lora", "lora4"],
    "scales": ["ia3", "base", "ia3", "ia3"],
    "shifts": ["ssf", "ia3", "base", "ia3"],
    "biases": ["bitfit", "ssf", "base", "ssf"],
    "weights": ["dora", "lora", "base", "union", "lora"],
    "prefixes": ["prefix", "base", "prefix5", "small", "prefix5"],
    "mixture": ["lora", Stack("lora4", "seq"), "base", "small", "union", FUSE],
}


def doubled(value: Any) -> Any:
    """Inputs with all floating tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    return tuple(map(doubled, value))


def batch(family: Family, samples: Sequence[int], *, labels: bool = True) -> tuple[tuple, dict]:
    """The family's two samples, repeated in any order, in float64."""
    args, kwargs = doubled(family.inputs())
    at = torch.tensor(samples)
    kept = {key: value[at] for key, value in kwargs.items() if labels or key != "labels"}
    return tuple(value[at] for value in args), kept


@torch.no_grad()
def rows(model: nn.Module, family: Family, inputs: tuple[tuple, dict]) -> list[Tensor]:
    """What the model says of every sample, (B, ...) each; not of pairs of samples, nor of all."""
    return graph_rows(model, family, inputs)


def graph_rows(model: nn.Module, family: Family, inputs: tuple[tuple, dict]) -> list[Tensor]:
    args, kwargs = inputs
    if family.name == "timm-eva":  # Its head starts near zero and would hide differences.
        return [model.forward_features(*args)]
    if family.name.startswith("open_clip"):
        return list(model(*args, **kwargs)[:2])
    if family.name == "hf-blip-vqa":  # Gives the answer's loss only; what is read off is below it.
        kept: list[Tensor] = []
        handle = model.text_decoder.register_forward_hook(
            lambda _, __, out: kept.append(out.logits)
        )
        try:
            output = model(*args, **kwargs)
        finally:
            handle.remove()
        return [*kept, output.image_embeds]
    output = model(*args, **kwargs)
    if family.name == "hf-clip":
        towers = output.vision_model_output, output.text_model_output
        states = [tower.last_hidden_state for tower in towers]
        return [output.image_embeds, output.text_embeds, *states]
    return [tensor for tensor in tensors(output) if tensor.dim() > 1]


def taken(family: Family) -> list[str]:
    """The adapters of the table that the family can hold."""
    no_prefix, no_bias = "prefix" not in family.traits, family.name in NO_BIAS
    return [
        name
        for name in ADAPTERS
        if not (no_prefix and name.startswith("prefix"))
        and not (no_bias and name == "bitfit")
        and not (family.name in READS_WEIGHTS and name == "ssf")
    ]


@functools.cache
def held(name: str) -> AdapterModel:
    """The family's model with every adapter that it can hold, all random, nothing active."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    model = mmadapters.init(bare(family).double())
    for adapter in taken(family):
        model.add_adapter(adapter, ADAPTERS[adapter])
    model.add_adapter_fusion(FUSE)
    randomise(model.adapters, 0.2)
    randomise(model.fusions, 0.2)
    return model


def routed(name: str) -> list[str]:
    """The routes that a family can run."""
    family = FAMILIES[name]
    here = set(taken(family)) if family.name not in READS_WEIGHTS else BRANCHES
    here = here | ({"prefix", "prefix5"} & set(taken(family)))
    members = {key: Route(route) for key, route in ROUTES.items()}
    return [key for key, route in members.items() if set(route.names()) <= here]
