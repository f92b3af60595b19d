"""Methods and families for the tests of injection: which go together, and one life of a pair."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from families import Family, families, speech, tensors
from injection import selection
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    AdapterModel,
    AdapterPlusConfig,
    AdaptFormerConfig,
    BitFitConfig,
    BottleneckConfig,
    CLIPAdapterConfig,
    CompacterConfig,
    ConfigUnion,
    ConformerAdapterConfig,
    ConvpassConfig,
    CrossModalConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    EAdapterConfig,
    FacTConfig,
    FrontEndAdapterConfig,
    GatedCrossAttentionConfig,
    IA3Config,
    LAdapterConfig,
    LadderConfig,
    LoRAConfig,
    MAMConfig,
    MethodConfig,
    MMAConfig,
    MMSAdapterConfig,
    MonaConfig,
    ParallelPlacement,
    ParBnConfig,
    PrefixConfig,
    PromptConfig,
    RepAdapterConfig,
    SeqBnConfig,
    SequentialPlacement,
    SSFConfig,
    UniAdapterConfig,
    UniPELTConfig,
)
from mmadapters.sites.tables import describe

EVERYWHERE = ("q", "k", "v", "o", "up", "down")

# Sized for blocks 32 to 64 wide.
METHODS: dict[str, MethodConfig] = {
    "bottleneck": BottleneckConfig(size=8, activation="gelu", norm="after", learn_scale="scalar"),
    "bottleneck-normed": BottleneckConfig(
        placement=ParallelPlacement(at=("attn", "cross", "ffn"), input="normed"),
        size=8,
        activation="silu",
    ),
    "bottleneck-after": BottleneckConfig(
        placement=SequentialPlacement(residual="after"), size=8, norm="before", dropout=0.1
    ),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "seq_bn": SeqBnConfig(reduction_factor=2),
    "par_bn": ParBnConfig(),
    "adaptformer": AdaptFormerConfig(size=16),
    "adapter_plus": AdapterPlusConfig(),
    "compacter": CompacterConfig(reduction_factor=4),
    "clip_adapter": CLIPAdapterConfig(),
    "clip_adapter-both": CLIPAdapterConfig(ratio=0.5, towers=("vision", "text")),
    "convpass": ConvpassConfig(scale=2.0),
    "mona": MonaConfig(size=8),
    "lora": LoRAConfig(rank=4, alpha=8, targets=EVERYWHERE),
    "lora-dropout": LoRAConfig(rank=4, targets=("q", "k", "v", "o"), dropout=0.1, rslora=True),
    "dora": DoRAConfig(rank=4, targets=EVERYWHERE),
    "fact": FacTConfig(rank=4),
    "fact-tk": FacTConfig(rank=4, core=3, scale=0.5, targets=("q", "v", "up")),
    "repadapter": RepAdapterConfig(scale=0.5),
    "ladder": LadderConfig(heads=2, mlp_ratio=2),
    "ia3": IA3Config(targets=("q", "k", "v", "o", "down")),
    "ssf": SSFConfig(),
    "bitfit": BitFitConfig(),
    "prefix": PrefixConfig(length=3),
    "prefix-reparametrised": PrefixConfig(length=3, reparametrise=8),
    "prompt": PromptConfig(length=3),
    "prompt-shallow": PromptConfig(length=3, deep=False),
    "e_adapter": EAdapterConfig(size=8),
    "mms_adapter": MMSAdapterConfig(size=8),
    "conformer_adapter": ConformerAdapterConfig(size=8, kernel=5),
    "l_adapter": LAdapterConfig(),
    "l_adapter-replacing": LAdapterConfig(residual=False),
    "conv_front_end": FrontEndAdapterConfig(size=8),
    "uniadapter": UniAdapterConfig(size=8),
    "mma": MMAConfig(size=8, scale=0.1, lowest=0),
    "cross_modal": CrossModalConfig(size=8),
    "gated_cross_attention": GatedCrossAttentionConfig(size=16, heads=2),
    "gated_cross_attention-ffn": GatedCrossAttentionConfig(size=8, heads=1, feed_forward=1),
    "union": ConfigUnion(
        LoRAConfig(rank=4),
        SeqBnConfig(reduction_factor=2, activation="gelu"),
        LoRAConfig(rank=2, targets=("o", "up")),
    ),
    "union-of-weights": ConfigUnion(
        IA3Config(), LoRAConfig(rank=4, targets=("k", "down")), BitFitConfig()
    ),
    "mam": MAMConfig(PrefixConfig(length=3, reparametrise=8), ParBnConfig()),
    "unipelt": UniPELTConfig(
        PrefixConfig(length=3), LoRAConfig(rank=4), SeqBnConfig(reduction_factor=2)
    ),
}
# Whose text crosses to the image by itself.
LOOKING = {"hf-blip-retrieval", "hf-blip-vqa", "hf-blip-caption"}
HAS_PREFIX = {"prefix", "prefix-reparametrised", "mam", "unipelt"}
HAS_PROMPT = {"prompt", "prompt-shallow"}
FOR_IMAGES = {"convpass", "mona"}
FOR_SPEECH = {"conformer_adapter", "l_adapter", "l_adapter-replacing"}
# Towers whose embedding in a shared space comes out of a module.
EMBEDDINGS = {
    "hf-clip": ("vision", "text"),
    "hf-clip-vision-projected": ("vision",),
    "hf-clip-text-projected": ("text",),
    "hf-siglip": ("vision", "text"),
    "hf-siglip-vision": ("vision",),
    "hf-siglip-text": ("text",),
    "open_clip-clip": ("vision",),
    "open_clip-custom_text": ("vision", "text"),
    "open_clip-own_attention": ("vision", "text"),
    "open_clip-timm_tower": ("vision", "text"),
    "open_clip-bert": ("vision", "text"),
    "open_clip-coca": ("vision", "text"),
}
ON_EMBEDDINGS = {"clip_adapter": 1, "clip_adapter-both": 2}
# What needs the activations at a linear map, so not a map whose weight the library reads itself.
NEEDS_CALLED_MAPS = {"lora-dropout", "unipelt"}
# Read weights themselves, other than in `nn.MultiheadAttention`, which adapters compute anew.
READS_WEIGHTS = {
    "timm-eva",
    "timm-eva02-packed",
    "timm-beit",
    "hf-wavlm",
    "torchaudio-wavlm",
    "open_clip-own_attention",
}
# Keys without a bias in a map whose weight the library reads: nothing can be shifted there.
KEYS_WITHOUT_BIAS = {"timm-eva", "timm-eva02-packed", "timm-beit"}
# Have no bias at all.
NO_BIAS = {"hf-t5"}
NEEDS_BIASES = {"bitfit", "union-of-weights"}

FAMILIES: dict[str, Family] = families()
SPEECH = {family.name for family in speech.FAMILIES}


def config_for(family: Family, method: str) -> MethodConfig:
    """The method as this family's users would write it: prompts and convolutions over patches in
    the image tower only."""
    if method in HAS_PROMPT and "prompt" in family.traits and len(towers(family)) > 1:
        deep = method == "prompt"
        return PromptConfig(length=3, deep=deep, sites=("vision",))
    if method in FOR_IMAGES and "vision" in towers(family):
        return dataclasses.replace(METHODS[method], sites=("vision",))
    if method == "clip_adapter" and EMBEDDINGS.get(family.name) == ("text",):
        return CLIPAdapterConfig(towers=("text",))
    return METHODS[method]


def refusal(family: Family, method: str) -> str | None:
    """What the refusal of a method by a family must say, as a pattern; None if it is taken."""
    if method in HAS_PREFIX and "prefix" not in family.traits:
        return r"prefix tuning cannot enter .*; these can take it: "
    if method in HAS_PROMPT and "prompt" not in family.traits:
        return r"prompt tuning cannot enter .*(can take it|name sites=)"
    if method in NEEDS_CALLED_MAPS and family.name in READS_WEIGHTS:
        return r"reads this weight itself.*(use dropout=0|leave it out with sites=)"
    if len(EMBEDDINGS.get(family.name, ())) < ON_EMBEDDINGS.get(method, 0):
        return r"acts on the embedding of tower|clip_adapter cannot enter tower"
    if method in FOR_SPEECH and family.name not in SPEECH:
        return r"is for speech, and .* has no audio tower; it has "
    if method == "ladder" and "vision" not in towers(family):
        return r"ladder is for image encoders, and .* has no vision tower; it has "
    if method == "conv_front_end" and family.name not in SPEECH - {"hf-whisper"}:
        return r"has no convolutional front end that conv_front_end can enter; wav2vec 2.0, "
    if method in NEEDS_BIASES and family.name in NO_BIAS:
        return r"has no bias under sites="
    if method == "uniadapter" and not sees_and_reads(family):
        return r"shares one adapter between images and texts, and .*: take an image-text encoder"
    if method == "uniadapter" and family.name == "open_clip-timm_tower":
        return r"shares the down-projection .* is 32 wide .* 64: take mma, which shares between"
    if method == "mma" and not {"vision", "text"} <= set(towers(family)):
        return (
            r"couples the blocks of an image tower with those of a text tower, and .* has no tower"
        )
    if method == "cross_modal" and not _crossed(family.name):
        return r"acts inside cross-attention, and .* has none: take gated_cross_attention"
    if method.startswith("gated") and family.name in LOOKING and "vision" in towers(family):
        return r"looks at the image already, by cross-attention of its own: take cross_modal"
    if method.startswith("gated") and not {"vision", "text"} <= set(towers(family)):
        return r"lets a text tower look at an image, and .* has no tower .*: take an image-text"
    if method in FOR_IMAGES and "vision" not in towers(family):
        return r"reads the grid of an image's patches, which .*image encoders can take it"
    if method in ("ssf", "repadapter") and family.name in KEYS_WITHOUT_BIAS:
        return r"nothing to shift; leave it out with sites="
    return None


def sees_and_reads(family: Family) -> bool:
    """Whether an encoder has a tower for images and one for texts."""
    return "vision" in towers(family) and bool({"text", "decoder"} & set(towers(family)))


def home(method: str) -> Family:
    """A family that takes the method: an image encoder if one does."""
    families = (FAMILIES[name] for name in ("timm-vit", "hf-wav2vec2", "hf-clip", "hf-blip-vqa"))
    return next(family for family in families if refusal(family, method) is None)


@functools.cache
def _built(name: str) -> nn.Module:
    return FAMILIES[name].build()


def bare(family: Family) -> nn.Module:
    """A fresh model of the family, with the same weights each time."""
    return copy.deepcopy(_built(family.name))


@functools.cache
def _bare_outputs(name: str, frozen: bool) -> list[Tensor]:
    return run(bare(FAMILIES[name]).requires_grad_(not frozen), FAMILIES[name])


def bare_outputs(family: Family, *, frozen: bool = True) -> list[Tensor]:
    """What the encoder gives with no library of adapters around it.

    `frozen`: with `requires_grad_(False)`. torch picks other kernels for weights that require
    gradients, under `no_grad`, too, so that the last bits may differ from those of a trainable one.
    """
    return _bare_outputs(family.name, frozen)


@functools.cache
def _towers(name: str) -> tuple[str, ...]:
    return tuple(mmadapters.init(bare(FAMILIES[name])).sites.towers)


@functools.cache
def _crossed(name: str) -> bool:
    return any(part.kind == "cross" for part in describe(_built(name))[0].sublayers())


def towers(family: Family) -> tuple[str, ...]:
    return _towers(family.name)


def adapted(family: Family, config: MethodConfig, **options: Any) -> AdapterModel:
    """A fresh model with one adapter, `a`, active but not trainable."""
    model = mmadapters.init(bare(family), **options)
    model.add_adapter("a", config)
    model.set_active_adapters("a")
    return model


def run(model: nn.Module, family: Family) -> list[Tensor]:
    """The floating tensors that a model gives for the family's batch of two, without gradients."""
    args, kwargs = family.inputs()
    with torch.no_grad():
        return tensors(model(*args, **kwargs))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, over the scale of the tensor it is in."""
    assert len(left) == len(right) > 0
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(left, right, strict=True)
    )


def loss_of(outputs: Iterable[Tensor], seed: int = 3) -> Tensor:
    """A number that depends on every entry of every output, each in another way."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator)
        total = total + (output.float() * weight).mean()
    return total


def step(model: nn.Module, inputs: tuple[tuple, dict], optimizer: torch.optim.Optimizer) -> None:
    """One training step; the gradients stay."""
    optimizer.zero_grad()
    args, kwargs = inputs
    loss_of(t for t in tensors(model(*args, **kwargs)) if t.requires_grad).backward()
    optimizer.step()


def train(model: AdapterModel, inputs: tuple[tuple, dict], *, steps: int = 3) -> set[str]:
    """Trains adapter `a` and leaves the model in eval mode.

    Returns the parameters of the whole model that had a gradient other than zero in some step.
    """
    model.train_adapter("a")
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam([p for p in parameters.values() if p.requires_grad], lr=1e-2)
    reached: set[str] = set()
    for _ in range(steps):
        step(model, inputs, optimizer)
        for name, parameter in parameters.items():
            if parameter.grad is not None and parameter.grad.ne(0).any():
                reached.add(name)
    model.eval()
    return reached


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that `state_dict` names."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """The same names in the same order with the same bits."""
    now = model.state_dict()
    return list(now) == list(before) and all(
        now[name].dtype == tensor.dtype and torch.equal(now[name], tensor)
        for name, tensor in before.items()
    )


@dataclass(frozen=True)
class Trace:
    """What an adapter could leave behind on the modules of an encoder, by module."""

    classes: dict[str, type]
    hooks: dict[str, dict[str, int]]
    attributes: dict[str, tuple[str, ...]]
    requires_grad: dict[str, bool]
    modes: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> Trace:
        modules = dict(model.named_modules())
        return cls(
            classes={name: type(module) for name, module in modules.items()},
            hooks={name: _hooks(module) for name, module in modules.items()},
            attributes={name: tuple(sorted(vars(module))) for name, module in modules.items()},
            requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
            modes={name: module.training for name, module in modules.items()},
        )


def _hooks(module: nn.Module) -> dict[str, int]:
    """How many there are of every kind of hook that torch has."""
    return {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}


@dataclass(eq=False)
class Life:
    """A family's model with one adapter, and what it gave on the way: bare, wrapped, with an idle
    adapter, with a fresh active one, after training.

    `trainable`: the parameters that required gradients in training; `reached` as `train` gives it.
    Afterwards none does, for the reason that `bare_outputs` gives.
    """

    family: Family
    method: str
    config: MethodConfig
    backbone: nn.Module
    before: Trace
    weights: dict[str, Tensor]
    model: AdapterModel
    bare: list[Tensor]
    wrapped: list[Tensor]
    idle: list[Tensor]
    fresh: list[Tensor]
    trainable: set[str]
    reached: set[str]
    trained: list[Tensor]

    @property
    def inputs(self) -> tuple[tuple, dict[str, Any]]:
        return self.family.inputs()

    def outputs(self) -> list[Tensor]:
        return run(self.model, self.family)


@functools.lru_cache(maxsize=1)
def live(family: Family, method: str) -> Life:
    """Wraps a fresh model, adds an adapter and trains it for three steps.

    The last one is kept for all tests of the pair, which follow each other (see conftest.py), and
    leave it as it is.
    """
    torch.manual_seed(0)
    config = config_for(family, method)
    backbone = bare(family)
    before, weights = Trace.of(backbone), state(backbone)
    model = mmadapters.init(backbone)
    wrapped = run(model, family)
    model.add_adapter("a", config)
    idle = run(model, family)
    model.set_active_adapters("a")
    fresh = run(model, family)
    reached = train(model, family.inputs())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.adapter("a").requires_grad_(False)
    return Life(
        family=family,
        method=method,
        config=config,
        backbone=backbone,
        before=before,
        weights=weights,
        model=model,
        bare=bare_outputs(family),
        wrapped=wrapped,
        idle=idle,
        fresh=fresh,
        trainable=trainable,
        reached=reached,
        trained=run(model, family),
    )


PAIRS = [(family, method) for family in FAMILIES.values() for method in METHODS]
TAKEN = [pair for pair in PAIRS if refusal(*pair) is None]
REFUSED = [pair for pair in PAIRS if refusal(*pair) is not None]
# What costs a second model is tried with every method on one family of each form of block in each
# library: linear maps that are called, fused or read as weights; norms before, behind and around;
# each way to attend; each combination of towers. On every other family, with each mechanism once.
FORMS = {
    "timm-vit",
    "timm-vit-post",
    "timm-eva",
    "timm-eva02",
    "timm-beit",
    "hf-vit",
    "hf-dinov2-swiglu",
    "hf-wav2vec2",
    "hf-wavlm",
    "hf-clip",
    "hf-blip-vqa",
    "hf-bert",
    "hf-t5",
    "torchaudio-wav2vec2-prenorm",
    "torchaudio-wavlm",
    "open_clip-clip",
    "open_clip-own_attention",
}
EACH_ONCE = ("bottleneck-after", "lora", "ia3", "prefix", "prompt")
COPIED = [pair for pair in TAKEN if pair[0].name in FORMS or pair[1] in EACH_ONCE]
# Which of them the tests run.
TAKEN_HERE = selection.select(TAKEN)
COPIED_HERE = selection.select(COPIED, selection.facts_of_copies, first=TAKEN_HERE)
REFUSED_HERE = selection.select(REFUSED, selection.facts_of_copies)


def pair_id(pair: tuple[Family, str]) -> str:
    return f"{pair[0].name}-{pair[1]}"
