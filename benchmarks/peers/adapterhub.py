"""Compares AdapterHub's `adapters` with ours, on transformers' ViT and CLIP of the same weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import adapters
import torch
from comparison import (
    LIMIT,
    OURS,
    Call,
    Case,
    Equality,
    Place,
    adapt,
    called_with,
    compare,
    distance,
    outputs,
    perturb,
    randomise,
    short,
    transfer,
    write,
)
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import mmadapters
from mmadapters import (
    AdapterPlusConfig,
    CompacterConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    MethodConfig,
    ParBnConfig,
    SeqBnConfig,
    SequentialPlacement,
)

THEIRS = "theirs"
WIDTH, DEPTH = 64, 4
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
}


@dataclass(frozen=True)
class Method:
    """Equivalent configs of the peer and of ours."""

    name: str
    theirs: adapters.AdapterConfig
    ours: MethodConfig


# The peer's defaults are ours, except for the activation of the double bottleneck (swish, ours
# GELU) and the size of AdapterPlus (a factor of 96, ours 8 channels).
METHODS = (
    Method("DoubleSeqBn", adapters.DoubleSeqBnConfig(), DoubleSeqBnConfig(activation="silu")),
    Method("SeqBn", adapters.SeqBnConfig(), SeqBnConfig()),
    Method("ParBn", adapters.ParBnConfig(), ParBnConfig()),
    Method(
        "AdapterPlus",
        adapters.AdapterPlusConfig(reduction_factor=8),
        AdapterPlusConfig(size=WIDTH // 8),
    ),
    Method("LoRA q v", adapters.LoRAConfig(alpha=16), LoRAConfig(alpha=16)),
    Method(
        "LoRA q k v up down",
        adapters.LoRAConfig(
            attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
        ),
        LoRAConfig(targets=("q", "k", "v", "up", "down")),
    ),
    Method(
        "Compacter",
        adapters.CompacterConfig(reduction_factor=8),
        CompacterConfig(reduction_factor=8),
    ),
    Method(
        "Compacter++",
        adapters.CompacterPlusPlusConfig(reduction_factor=8),
        CompacterConfig(
            reduction_factor=8, placement=SequentialPlacement(at=("ffn",), residual="after")
        ),
    ),
)

# Names of the peer's tensors -> canonical sites, then names within a module.
SITES = (
    (r"encoder\.layer\.(\d+)\.attention_adapters", r"vision.blocks.\1.attn"),
    (r"encoder\.layer\.(\d+)\.output\.output_adapters", r"vision.blocks.\1.ffn"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)\w+", r"vision.blocks.\1.attn.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"vision.blocks.\1.ffn.up"),
    (r"encoder\.layer\.(\d+)\.output\.dense", r"vision.blocks.\1.ffn.down"),
    (r"(\w+)_model\.encoder\.layers\.(\d+)\.attention_adapters", r"\1.blocks.\2.attn"),
    (r"(\w+)_model\.encoder\.layers\.(\d+)\.output_adapters", r"\1.blocks.\2.ffn"),
    (r"(\w+)_model\.encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj", r"\1.blocks.\2.attn.\3"),
    (r"(\w+)_model\.encoder\.layers\.(\d+)\.mlp\.fc1", r"\1.blocks.\2.ffn.up"),
    (r"(\w+)_model\.encoder\.layers\.(\d+)\.mlp\.fc2", r"\1.blocks.\2.ffn.down"),
)
TENSORS = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
    "adapter_down.0.W_left": "down.left",
    "adapter_down.0.W_right": "down.right",
    "adapter_down.0.b": "down.bias",
    "adapter_up.W_left": "up.left",
    "adapter_up.W_right": "up.right",
    "adapter_up.b": "up.bias",
    "scaling": "scale",
    "lora_A": "a",
    "lora_B": "b",
    "m.weight": "magnitude",
}


def place(name: str, our_tensors: dict[str, torch.Tensor], method: str) -> Place:
    """Returns the place of the peer's tensor `<module>.adapters|loras.<adapter>.<tensor>`."""
    if name.startswith("shared_parameters"):
        return Place(tuple(key for key in our_tensors if key.endswith("rule")))
    module, tensor = re.split(rf"\.(?:adapters|loras)\.{THEIRS}\.", name)
    for pattern, site in SITES:
        if re.fullmatch(pattern, module):
            return Place((f"{re.sub(pattern, site, module)}#{method}/{TENSORS[tensor]}",))
    raise ValueError(f"no site is known for {name}")


def vit() -> tuple[nn.Module, Call]:
    model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8))
    pixels = torch.randn(3, 3, 32, 32)
    return model, called_with(pixels)


def clip() -> tuple[nn.Module, Call]:
    text = {**SIZES, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    ids, pixels = torch.randint(3, 99, (3, 12)), torch.randn(3, 3, 32, 32)
    ids[:, -1] = 99
    return model, called_with(input_ids=ids, pixel_values=pixels)


MODELS: dict[str, Callable[[], tuple[nn.Module, Call]]] = {"ViT": vit, "CLIP, both towers": clip}


def in_peer(base: nn.Module, config: adapters.AdapterConfig, **options: Any) -> nn.Module:
    model = copy.deepcopy(base)
    adapters.init(model, **options)
    model.add_adapter(THEIRS, config=config)
    model.train_adapter(THEIRS)
    return model.eval()


def tensors(peer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in peer.named_parameters() if f".{THEIRS}." in name}


def measure(model: str, method: Method) -> Equality:
    torch.manual_seed(0)
    made, call = MODELS[model]()
    base = randomise(made)
    ours, peer = adapt(base, method.ours), in_peer(base, method.theirs)
    parameters, our_tensors = tensors(peer), ours.adapter(OURS).tensors()
    return compare(
        model,
        method.name,
        base=base,
        peer=peer,
        parameters=parameters,
        ours=ours,
        places={name: place(name, our_tensors, method.ours.method) for name in parameters},
        call=call,
    )


def dora() -> Case:
    """The peer's DoRA scales the bias with the weight, and its merge does not."""
    torch.manual_seed(0)
    made, call = vit()
    base = randomise(made)
    bare = copy.deepcopy(base)
    for name, parameter in bare.named_parameters():
        if name.endswith(("query.bias", "value.bias")):
            nn.init.zeros_(parameter)
    theirs, our_change, merged = merge_dora(base, call)
    without, own_without, merged_without = merge_dora(bare, call)
    return Case(
        "Merging DoRA changes the outputs of ViT, whose maps have biases",
        f"by {short(theirs)}; by {short(without)} where the biases are 0",
        f"by {short(our_change)}; merged, both libraries differ by {short(merged)}",
        theirs > 1e-2 and max(without, our_change, own_without, merged, merged_without) <= LIMIT,
    )


@torch.no_grad()
def merge_dora(base: nn.Module, call: Call) -> tuple[float, float, float]:
    """Merges one DoRA in both libraries.

    Returns:
        the change of the peer's outputs, the change of ours, and the difference between both.
    """
    ours, peer = adapt(base, DoRAConfig()), in_peer(base, adapters.LoRAConfig(use_dora=True))
    parameters, our_tensors = tensors(peer), ours.adapter(OURS).tensors()
    perturb(parameters)
    transfer(parameters, ours, {name: place(name, our_tensors, "dora") for name in parameters})
    before, own_before = outputs(call, peer), outputs(call, ours)
    peer.merge_adapter(THEIRS)
    ours.merge_adapter(OURS)
    after, own_after = outputs(call, peer), outputs(call, ours)
    return distance(before, after), distance(own_before, own_after), distance(after, own_after)


def frozen() -> Case:
    torch.manual_seed(0)
    base, _ = vit()
    peer = copy.deepcopy(base)
    adapters.init(peer)
    peer.add_adapter(THEIRS, config=adapters.SeqBnConfig())
    peer.set_active_adapters(THEIRS)
    ours = mmadapters.init(copy.deepcopy(base))
    ours.add_adapter(OURS, SeqBnConfig())
    ours.set_active_adapters(OURS)
    left = [n for n, p in peer.named_parameters() if p.requires_grad and f".{THEIRS}." not in n]
    trainable = [n for n, p in ours.backbone.named_parameters() if p.requires_grad]
    return Case(
        "An adapter that was added and activated leaves the encoder trainable",
        f"{len(left)} tensors of the encoder take gradients",
        f"{len(trainable)} tensors",
        len(left) > 0 and not trainable,
    )


SPEECH = adapters.AdapterModelInterface(
    adapter_methods=["bottleneck"],
    model_embeddings="feature_projection",
    model_layers="encoder.layers",
    layer_self_attn="attention",
    layer_cross_attn=None,
    attn_k_proj="k_proj",
    attn_q_proj="q_proj",
    attn_v_proj="v_proj",
    attn_o_proj="out_proj",
    layer_intermediate_proj="feed_forward.intermediate_dense",
    layer_output_proj="feed_forward.output_dense",
    layer_pre_self_attn="attention",
    layer_pre_ffn="feed_forward",
    layer_ln_1="layer_norm",
    layer_ln_2="final_layer_norm",
)


def interface() -> Case:
    """Compares post-norm wav2vec2, which the peer supports by its generic interface only."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **SIZES,
        conv_dim=(32, 32),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    base = randomise(Wav2Vec2Model(config))
    peer = in_peer(base, adapters.SeqBnConfig(), interface=SPEECH)
    ours = adapt(base, SeqBnConfig())
    perturb(tensors(peer))
    perturb(dict(ours.adapter(OURS).named_parameters()))
    x = torch.randn(3, 1000)

    @torch.no_grad()
    def change(model: nn.Module) -> float:
        """Doubles the last block's LayerNorm; returns the change of the first block's output."""
        before = model(x, output_hidden_states=True).hidden_states[1]
        model.encoder.layers[-1].final_layer_norm.weight.mul_(2)
        return distance([before], [model(x, output_hidden_states=True).hidden_states[1]])

    theirs, our_change = change(peer), change(ours)
    return Case(
        "The last block's LayerNorm changes what the first block of wav2vec2 gives (SeqBn by the "
        "generic interface: every adapter reads the last block's norm)",
        f"by {short(theirs)}",
        f"by {short(our_change)}",
        theirs > 1e-2 and our_change <= LIMIT,
    )


if __name__ == "__main__":
    measured = [measure(model, method) for model in MODELS for method in METHODS]
    write(measured, [dora(), frozen(), interface()], ("adapters", "transformers", "torch"))
