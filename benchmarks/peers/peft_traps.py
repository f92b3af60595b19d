"""Modules on which peft's adapters have no effect, a wrong one, or change frozen weights; and ours.

Each case is measured on one model with random weights. The reference for LoRA needs neither
library: it is the model with c B A added to its weights by hand.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import open_clip
import peft
import torch
from comparison import (
    LIMIT,
    OURS,
    Call,
    Case,
    adapt,
    called_with,
    deviation,
    distance,
    outputs,
    perturb,
    randomise,
    short,
    write,
)
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn
from transformers import ViTConfig, ViTModel, WavLMConfig, WavLMModel

from mmadapters import AdapterModel, Architecture, DoRAConfig, LoRAConfig, SublayerSpec, TowerSpec

WIDTH, DEPTH, HEADS, RANK = 64, 2, 4, 8
STEPS = 200


@dataclass(frozen=True)
class Effect:
    """The effect of an adapter with random values.

    Attributes:
        change: largest change of an output, without gradients.
        gradient: largest gradient of an adapter parameter.
    """

    change: float
    gradient: float

    def __str__(self) -> str:
        return f"effect {short(self.change)}, gradient {short(self.gradient)}"

    @property
    def inert(self) -> bool:
        """Tells whether there is no gradient and no change except rounding."""
        return self.change <= LIMIT and self.gradient == 0.0

    @property
    def acts(self) -> bool:
        return self.change > 1e-2 and self.gradient > 0.0


def effect(base: nn.Module, adapted: nn.Module, call: Call, *, train: bool = False) -> Effect:
    adapted.train(train)
    with torch.no_grad():
        change = distance(outputs(call, base), outputs(call, adapted))
    loss = sum((tensor * torch.randn_like(tensor)).sum() for tensor in outputs(call, adapted))
    gradients = [0.0]
    if loss.requires_grad:
        trained = [p for p in adapted.parameters() if p.requires_grad]
        of_trained = torch.autograd.grad(loss, trained, allow_unused=True)
        gradients += [g.abs().max().item() for g in of_trained if g is not None]
    return Effect(change, max(gradients))


def in_peft(
    base: nn.Module, targets: list[str], *, fresh: bool = False, **options: Any
) -> tuple[nn.Module, int]:
    """Adapts a copy of the model by peft; returns it and the number of warnings.

    Args:
        fresh: keep the adapter's initial values.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, **options)
        model = peft.get_peft_model(copy.deepcopy(base), config)
    if not fresh:
        perturb(dict(lora_tensors(model)))
    return model.eval(), len([w for w in caught if not issubclass(w.category, FutureWarning)])


def lora_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" in name]


def in_ours(base: nn.Module, config: LoRAConfig, **options: Any) -> AdapterModel:
    model = adapt(base, config, **options)
    perturb(dict(model.adapter(OURS).named_parameters()))
    return model


@torch.no_grad()
def by_hand(base: nn.Module, ours: AdapterModel, weights: Mapping[str, str]) -> nn.Module:
    """Adds B A to the weights of a copy of the model.

    Args:
        weights: the parameter of each role, or a third of one ("name@0").
    """
    model = copy.deepcopy(base)
    tensors = ours.adapter(OURS).tensors()
    for key, a in tensors.items():
        site, _, what = key.partition("#")
        if not what.endswith("/a"):
            continue
        block, role = site.split(".")[2], site.split(".")[-1]
        path, _, third = weights[role].format(block).partition("@")
        weight = model.get_parameter(path)
        rows = weight.chunk(3)[int(third)] if third else weight
        rows += tensors[key.removesuffix("a") + "b"] @ a
    return model


def clip() -> nn.Module:
    vision = {"layers": DEPTH, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": WIDTH, "heads": HEADS, "context_length": 12, "vocab_size": 100}
    torch.manual_seed(0)
    return randomise(open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text))


def image_features(dtype: torch.dtype = torch.float32) -> Call:
    torch.manual_seed(1)
    x = torch.randn(3, 3, 32, 32, dtype=dtype)

    def call(model: nn.Module) -> Any:
        return (model.base_model.model if hasattr(model, "peft_config") else model).encode_image(x)

    return call


CLIP_WEIGHTS = {
    **{
        role: f"visual.transformer.resblocks.{{}}.attn.in_proj_weight@{i}"
        for i, role in enumerate("qkv")
    },
    "o": "visual.transformer.resblocks.{}.attn.out_proj.weight",
}


def out_proj() -> Case:
    base, call = clip(), image_features()
    theirs, warned = in_peft(base, ["out_proj"])
    ours = in_ours(base, LoRAConfig(targets=("o",), sites=("vision",)))
    peer, our_effect = effect(base, theirs, call), effect(base, ours, call)
    off = deviation(by_hand(base, ours, CLIP_WEIGHTS), ours, call)
    return Case(
        "LoRA on `out_proj` of open_clip's attention is inert, without a warning",
        f"{peer}, {warned} warnings",
        f"{our_effect}, off the changed weights by {short(off)}",
        peer.inert and not warned and our_effect.acts and off <= LIMIT,
    )


def merge_of_out_proj() -> Case:
    base, call = clip(), image_features()
    theirs, _ = in_peft(base, ["out_proj"])
    ours = in_ours(base, LoRAConfig(targets=("o",), sites=("vision",)))
    with torch.no_grad():
        before, own_before = outputs(call, theirs), outputs(call, ours)
        changed = distance(before, outputs(call, theirs.merge_and_unload()))
        ours.merge_adapter(OURS)
        own_changed = distance(own_before, outputs(call, ours))
    return Case(
        "Merging that adapter changes the outputs",
        f"by {short(changed)}",
        f"by {short(own_changed)}",
        changed > 1e-2 and own_changed <= LIMIT,
    )


@torch.no_grad()
def whole_attention() -> Case:
    """Copies peft's A, which its q, k and v share, into each of ours."""
    base, call = clip(), image_features()
    theirs, _ = in_peft(base, ["attn"])
    ours = in_ours(base, LoRAConfig(targets=("q", "k", "v", "o"), sites=("vision",)))
    our_tensors, peer = ours.adapter(OURS).tensors(), dict(lora_tensors(theirs))
    for key, tensor in our_tensors.items():
        site, _, what = key.partition("#lora/")
        block, role = site.split(".")[2], site.split(".")[-1]
        inside = "attn.base_layer.out_proj" if role == "o" else "attn"
        holder = f"base_model.model.visual.transformer.resblocks.{block}.{inside}"
        value = peer[f"{holder}.lora_{what.upper()}.default.weight"]
        tensor.copy_(value.chunk(3)["qkv".index(role)] if what == "b" and role != "o" else value)
    reference = by_hand(base, ours, CLIP_WEIGHTS)
    off, own_off = deviation(reference, theirs, call), deviation(reference, ours, call)
    return Case(
        "LoRA on a whole `nn.MultiheadAttention` (open_clip) is not `W + c B A`",
        f"off by {short(off)}: `out_proj`'s part counts {counted(theirs):.3g} times",
        f"off by {short(own_off)}",
        off > 1e-2 and own_off <= LIMIT,
    )


def counted(theirs: nn.Module) -> float:
    """Returns how often merging adds B A to the output weight of the first attention."""
    layer = copy.deepcopy(theirs).base_model.model.visual.transformer.resblocks[0].attn
    out = layer.base_layer.out_proj
    frozen, delta = out.get_base_layer().weight.clone(), out.get_delta_weight("default")
    layer.merge()
    change = out.get_base_layer().weight - frozen
    return ((change * delta).sum() / delta.square().sum()).item()


def training_drift() -> Case:
    base, call = clip().bfloat16(), image_features(torch.bfloat16)
    theirs, _ = in_peft(base, ["attn"], fresh=True)
    ours = adapt(base, LoRAConfig(targets=("q", "k", "v", "o"), sites=("vision",)))
    drift = trained_drift(theirs, call, lambda name: name.replace(".base_layer.", "."))
    our_drift = trained_drift(ours, call, lambda name: name)
    return Case(
        f"Frozen bf16 weights of `nn.MultiheadAttention` drift in {STEPS} steps of training LoRA",
        f"by {short(100 * drift)} %",
        f"by {short(100 * our_drift)} %",
        drift > 1e-3 and our_drift == 0.0,
    )


def trained_drift(model: nn.Module, call: Call, plain: Callable[[str], str]) -> float:
    """Trains; returns the largest relative change of a frozen weight matrix of an attention."""

    def frozen() -> dict[str, torch.Tensor]:
        return {
            plain(name): tensor.detach().clone().float()
            for name, tensor in model.named_parameters()
            if ".attn." in name and tensor.dim() == 2 and not tensor.requires_grad
        }

    before = frozen()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(2)
    target = torch.randn_like(call(model))
    model.train()
    for _ in range(STEPS):
        (call(model) - target).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    after = frozen()
    return max(((after[n] - w).norm() / w.norm()).item() for n, w in before.items())


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    return randomise(nn.TransformerEncoder(layer, DEPTH))


ENCODER = Architecture(
    towers=(
        TowerSpec(
            name="text",
            blocks="layers",
            sublayers={
                "attn": SublayerSpec(
                    output="dropout1",
                    residual="self_attn",
                    owner="self_attn",
                    norm="norm1",
                    post_norm=True,
                    leaves={
                        "q": "self_attn.in_proj_weight[0/3]",
                        "k": "self_attn.in_proj_weight[1/3]",
                        "v": "self_attn.in_proj_weight[2/3]",
                        "o": "self_attn.out_proj.weight",
                    },
                ),
                "ffn": SublayerSpec(
                    output="dropout2",
                    residual="linear1",
                    norm="norm2",
                    post_norm=True,
                    leaves={"up": "linear1", "down": "linear2"},
                ),
            },
        ),
    )
)
ENCODER_WEIGHTS = {
    **{role: f"layers.{{}}.self_attn.in_proj_weight@{i}" for i, role in enumerate("qkv")},
    "o": "layers.{}.self_attn.out_proj.weight",
    "up": "layers.{}.linear1.weight",
    "down": "layers.{}.linear2.weight",
}


def fast_path(title: str, targets: list[str], roles: tuple[str, ...]) -> Case:
    base, x = encoder(), torch.randn(3, 10, WIDTH)
    call = called_with(x)
    theirs, _ = in_peft(base, targets)
    ours = in_ours(base, LoRAConfig(targets=roles), sites=ENCODER, example_inputs=(x[:1],))
    peer, our_effect = effect(base, theirs, call), effect(base, ours, call)
    off = deviation(by_hand(base, ours, ENCODER_WEIGHTS), ours, call)
    trained = effect(base, theirs, call, train=True)
    return Case(
        title,
        f"{peer}; in training {trained}",
        f"{our_effect}, off the changed weights by {short(off)}",
        peer.inert and trained.acts and our_effect.acts and off <= LIMIT,
    )


def fused(model: type[nn.Module], **options: Any) -> Case:
    torch.manual_seed(0)
    base = randomise(
        model(
            img_size=32,
            patch_size=8,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            num_classes=0,
            qkv_bias=True,
            **options,
        )
    )
    call = called_with(torch.randn(3, 3, 32, 32))
    weights = {role: f"blocks.{{}}.attn.qkv.weight@{i}" for i, role in enumerate("qkv")}
    title = f"LoRA on `qkv` of timm's {model.__name__} is inert"
    return inert_weights(title, base, call, ["qkv"], ("q", "k", "v"), weights)


def wavlm() -> Case:
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        conv_dim=(32, 32),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    base = randomise(WavLMModel(config))
    call = called_with(torch.randn(3, 1000))
    names = {role: f"{role}_proj" for role in "qkv"} | {"o": "out_proj"}
    weights = {role: f"encoder.layers.{{}}.attention.{n}.weight" for role, n in names.items()}
    title = "LoRA on q, k, v and o of transformers' WavLM is inert"
    return inert_weights(title, base, call, list(names.values()), tuple(names), weights)


def inert_weights(
    title: str,
    base: nn.Module,
    call: Call,
    targets: list[str],
    roles: tuple[str, ...],
    weights: Mapping[str, str],
) -> Case:
    theirs, warned = in_peft(base, targets)
    ours = in_ours(base, LoRAConfig(targets=roles))
    peer, our_effect = effect(base, theirs, call), effect(base, ours, call)
    off = deviation(by_hand(base, ours, weights), ours, call)
    return Case(
        title,
        f"{peer}, {warned} warnings",
        f"{our_effect}, off the changed weights by {short(off)}",
        peer.inert and not warned and our_effect.acts and off <= LIMIT,
    )


def dora_on_attention() -> Case:
    base, call = clip(), image_features()
    roles = ("q", "k", "v", "o")
    ours = in_ours(base, DoRAConfig(targets=roles, sites=("vision",)))
    reference = by_hand(base, ours, CLIP_WEIGHTS)
    with torch.no_grad():
        for key, magnitude in ours.adapter(OURS).tensors().items():
            site, _, what = key.partition("#dora/")
            if what == "magnitude":
                role = site.split(".")[-1]
                path, _, third = CLIP_WEIGHTS[role].format(site.split(".")[2]).partition("@")
                weight = reference.get_parameter(path)
                rows = weight.chunk(3)[int(third)] if third else weight
                rows *= (magnitude / rows.norm(dim=1))[:, None]
    off = deviation(reference, ours, call)
    our_effect = effect(base, ours, call)
    try:
        in_peft(base, ["attn"], use_dora=True)
        said = ""
    except ValueError as error:
        said = str(error)
    return Case(
        "DoRA on `nn.MultiheadAttention` (open_clip) is refused",
        f"raises “{said.partition(',')[0]}”" if said else "accepted",
        f"{our_effect}, off the changed weights by {short(off)}",
        bool(said) and our_effect.acts and off <= LIMIT,
    )


def vit() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
    )
    x = torch.randn(3, 3, 32, 32)
    return randomise(ViTModel(config)), lambda model: model(x.to(model.dtype))


def misspelt() -> Case:
    base, _ = vit()
    theirs, warned = in_peft(base, ["q_proj", "v_porj"])
    adapted = {name.partition(".lora_")[0] for name, _ in lora_tensors(theirs)}
    try:
        in_ours(base, LoRAConfig(targets=("q", "w")))
        said = ""
    except ValueError as error:
        said = str(error)
    return Case(
        "A misspelt target beside a right one passes unnoticed (`q_proj`, `v_porj`; `q`, `w`)",
        f"adapts {len(adapted)} of {2 * DEPTH} maps, {warned} warnings",
        f"raises “{said}”" if said else "accepted",
        len(adapted) == DEPTH and not warned and bool(said),
    )


def unmerged(dtype: torch.dtype) -> Case:
    base, _ = vit()
    base = base.to(dtype)
    theirs, _ = in_peft(base, ["q_proj", "v_proj"])
    ours = in_ours(base, LoRAConfig())
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    ours.merge_adapter(OURS)
    ours.reset_adapter(OURS)
    before = dict(base.named_parameters())
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in theirs.named_parameters()
        if "lora_" not in name
    }
    changed, our_changes = changed_bits(before, after), changed_bits(before, backbone_of(ours))
    return Case(
        f"Merging LoRA and undoing it leaves {str(dtype).removeprefix('torch.')} weights changed",
        changed[1],
        our_changes[1],
        changed[0] > 0 and our_changes[0] == 0,
    )


def backbone_of(model: AdapterModel) -> dict[str, nn.Parameter]:
    return dict(model.backbone.named_parameters())


def changed_bits(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> tuple[int, str]:
    """Returns the number of elements that differ, and words with the largest difference."""
    differences = [(after[name] - tensor).abs() for name, tensor in before.items()]
    count = sum(int((d > 0).sum()) for d in differences)
    largest = max(d.max().item() for d in differences)
    return count, f"{count} elements changed, by up to {short(largest)}"


CASES: tuple[Callable[[], Case], ...] = (
    out_proj,
    merge_of_out_proj,
    whole_attention,
    training_drift,
    lambda: fast_path(
        "LoRA on `linear1` and `linear2` of `nn.TransformerEncoder` is inert in evaluation",
        ["linear1", "linear2"],
        ("up", "down"),
    ),
    lambda: fast_path(
        "LoRA on `self_attn` of `nn.TransformerEncoder` is inert in evaluation",
        ["self_attn"],
        ("q", "k", "v", "o"),
    ),
    lambda: fused(Eva, qkv_fused=True, use_rot_pos_emb=True),
    lambda: fused(Beit, use_abs_pos_emb=False, use_rel_pos_bias=True),
    wavlm,
    dora_on_attention,
    misspelt,
    lambda: unmerged(torch.float32),
    lambda: unmerged(torch.bfloat16),
)

if __name__ == "__main__":
    write(
        [], [case() for case in CASES], ("peft", "timm", "transformers", "open_clip_torch", "torch")
    )
