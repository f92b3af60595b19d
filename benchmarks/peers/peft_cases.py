"""Compares peft with ours, on ViTs of timm and transformers and on wav2vec2 of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import peft
import timm
import torch
from comparison import Equality, Place, adapt, called_with, compare, randomise, write
from torch import nn
from transformers import ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model

from mmadapters import DoRAConfig, IA3Config, LoRAConfig, MethodConfig

ROLES = ("q", "k", "v", "o", "up", "down")
WIDTH, DEPTH = 64, 4
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Model:
    """A model, its inputs and its linear maps.

    peft adapts a fused projection as one map: each part has its A, and its B has the rows of all.

    Attributes:
        make: builds the model.
        inputs: shape of the input.
        tower: name of the tower in our sites.
        blocks: path of the blocks.
        linears: roles of each linear map by its path in a block.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    tower: str
    blocks: str
    linears: Mapping[str, tuple[str, ...]]

    def targets(self, roles: tuple[str, ...]) -> list[str]:
        return [path for path, served in self.linears.items() if set(served) & set(roles)]

    def places(self, names: list[str], ours: MethodConfig) -> dict[str, Place]:
        return {name: self._place(name, ours) for name in names}

    def _place(self, name: str, ours: MethodConfig) -> Place:
        inside = name.removeprefix(f"base_model.model.{self.blocks}.")
        block, _, rest = inside.partition(".")
        path = next(path for path in self.linears if rest.startswith(path + "."))
        what = rest.removeprefix(path + ".").split(".")[0]
        tensor = {
            "lora_A": "a",
            "lora_B": "b",
            "lora_magnitude_vector": "magnitude",
            "ia3_l": "scale",
        }[what]
        kinds = {"up": "ffn", "down": "ffn"}
        keys = tuple(
            f"{self.tower}.blocks.{block}.{kinds.get(role, 'attn')}.{role}#{ours.method}/{tensor}"
            for role in self.linears[path]
        )
        return Place(keys, split=tensor != "a")


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=4,
        num_classes=0,
    )


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8))


def wav2vec2(pre_norm: bool) -> nn.Module:
    config = Wav2Vec2Config(
        **SIZES,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=pre_norm,
        feat_extract_norm="layer" if pre_norm else "group",
    )
    return Wav2Vec2Model(config)


SPEECH = {
    **{f"attention.{name}_proj": (name,) for name in "qkv"},
    "attention.out_proj": ("o",),
    "feed_forward.intermediate_dense": ("up",),
    "feed_forward.output_dense": ("down",),
}
IMAGE, SOUND = (3, 3, 32, 32), (3, 2000)
MODELS = {
    "timm ViT, fused qkv": Model(
        make=timm_vit,
        inputs=IMAGE,
        tower="vision",
        blocks="blocks",
        linears={
            "attn.qkv": ("q", "k", "v"),
            "attn.proj": ("o",),
            "mlp.fc1": ("up",),
            "mlp.fc2": ("down",),
        },
    ),
    "transformers ViT": Model(
        make=vit,
        inputs=IMAGE,
        tower="vision",
        blocks="layers",
        linears={
            **{f"attention.{name}_proj": (name,) for name in "qkvo"},
            "mlp.fc1": ("up",),
            "mlp.fc2": ("down",),
        },
    ),
    "wav2vec2, post-norm": Model(
        make=lambda: wav2vec2(False),
        inputs=SOUND,
        tower="audio",
        blocks="encoder.layers",
        linears=SPEECH,
    ),
    "wav2vec2, pre-norm": Model(
        make=lambda: wav2vec2(True),
        inputs=SOUND,
        tower="audio",
        blocks="encoder.layers",
        linears=SPEECH,
    ),
}


@dataclass(frozen=True)
class Method:
    """A config of ours, and a function that makes peft's for a model."""

    name: str
    ours: MethodConfig
    theirs: Callable[[Model], peft.PeftConfig]


def lora(**options: object) -> Callable[[Model], peft.PeftConfig]:
    return lambda model: peft.LoraConfig(target_modules=model.targets(ROLES), **options)


def ia3(model: Model) -> peft.PeftConfig:
    fused = "attn.qkv" in model.linears
    return peft.IA3Config(
        target_modules=model.targets(("q", "k", "v", "down") if fused else ("k", "v", "down")),
        feedforward_modules=model.targets(("down",)),
    )


METHODS = (
    Method("LoRA", LoRAConfig(targets=ROLES), lora(r=8, lora_alpha=8)),
    Method("LoRA, alpha 32", LoRAConfig(alpha=32, targets=ROLES), lora(r=8, lora_alpha=32)),
    Method(
        "rsLoRA",
        LoRAConfig(alpha=16, rslora=True, targets=ROLES),
        lora(r=8, lora_alpha=16, use_rslora=True),
    ),
    Method("DoRA", DoRAConfig(alpha=16, targets=ROLES), lora(r=8, lora_alpha=16, use_dora=True)),
    Method("IA3", IA3Config(), ia3),
)


def measure(name: str, method: Method) -> Equality:
    torch.manual_seed(0)
    model = MODELS[name]
    base = randomise(model.make())
    call = called_with(torch.randn(model.inputs))
    config = method.ours
    if isinstance(config, IA3Config) and "attn.qkv" in model.linears:
        config = IA3Config(targets=("q", "k", "v", "down"))
    ours = adapt(base, config)
    peer = peft.get_peft_model(copy.deepcopy(base), method.theirs(model)).eval()
    parameters = {n: p for n, p in peer.named_parameters() if "lora_" in n or "ia3_" in n}
    return compare(
        name,
        method.name,
        base=base,
        peer=peer,
        parameters=parameters,
        ours=ours,
        places=model.places(list(parameters), config),
        call=call,
    )


if __name__ == "__main__":
    measured = [measure(model, method) for model in MODELS for method in METHODS]
    write(measured, [], ("peft", "timm", "transformers", "torch"))
