"""The measured encoders with random weights, their inputs, and their pooled outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmadapters import load_backbone
from mmadapters.injectors.calls import first_output
from mmadapters.sites.sitemap import SiteMap
from mmadapters.sites.tables import describe
from mmadapters.suggest import nearest

from .limits import TowerSize

HERTZ = 16_000


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder as `load_backbone` takes it.

    Attributes:
        name: "library/model".
        options: keyword arguments of `load_backbone`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """Returns the name of the package that it needs."""
        library = self.options.get("library", self.name.partition("/")[0])
        return {"hf": "transformers", "nano": "mmadapters"}.get(library, library)

    def make(self) -> nn.Module:
        """Builds the encoder with the same random weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return load_backbone(self.name, **self.options)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An encoder of the benchmark and its equivalents.

    Attributes:
        encoders: alternatives; the first whose library is installed is measured.
        twin: the same architecture for AdapterHub, which supports vision encoders of transformers
            only; None if there is none.
    """

    encoders: tuple[Encoder, ...]
    twin: Encoder | None = None


def _vit(size: str, width: int, depth: int, heads: int) -> Preset:
    options = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    twin = Encoder(name="hf/vit", options=options)
    timm = Encoder(name=f"timm/vit_{size}_patch16_224", options={"num_classes": 0})
    return Preset(encoders=(timm, twin), twin=twin)


# No dropout or masking, so that full fine-tuning in train mode does the same work.
_WITHOUT_DROPOUT = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
_CLIP = Encoder(name="hf/clip")

PRESETS: dict[str, Preset] = {
    "vit-s16": _vit("small", 384, 12, 6),
    "vit-b16": _vit("base", 768, 12, 12),
    "vit-l16": _vit("large", 1024, 24, 16),
    "wav2vec2-base": Preset(encoders=(Encoder(name="hf/wav2vec2", options=_WITHOUT_DROPOUT),)),
    "clip-b32": Preset(encoders=(Encoder(name="open_clip/ViT-B-32"), _CLIP), twin=_CLIP),
    "nano-vit": Preset(
        encoders=(Encoder(name="nano/vit"),),
        twin=Encoder(name="nano/vit", options={"library": "hf"}),
    ),
    "nano-wav2vec2": Preset(encoders=(Encoder(name="nano/wav2vec2", options=_WITHOUT_DROPOUT),)),
    "nano-clip": Preset(
        encoders=(Encoder(name="nano/clip"), Encoder(name="nano/clip", options={"library": "hf"})),
        twin=Encoder(name="nano/clip", options={"library": "hf"}),
    ),
}


def find_preset(name: str) -> Preset:
    """Returns the preset of a name, or one made of a name that `load_backbone` takes.

    Raises:
        ValueError: the name is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if "/" not in name:
        raise ValueError(
            f"{name!r} is no preset{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}, and "
            "names as load_backbone takes them: timm/vit_tiny_patch16_224"
        )
    encoder = Encoder(name=name)
    return Preset(encoders=(encoder,), twin=encoder if name.startswith("hf/") else None)


def choose(preset: Preset) -> Encoder:
    """Returns the first encoder whose library is installed, or the first if none is."""
    installed = [e for e in preset.encoders if importlib.util.find_spec(e.library) is not None]
    return next(iter(installed), preset.encoders[0])


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of a call of an encoder."""

    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, model: Callable[..., Any]) -> Any:
        return model(*self.args, **self.kwargs)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Returns inputs with `change` applied to every tensor."""
        return Inputs(
            tuple(change(value) for value in self.args),
            {name: change(value) for name, value in self.kwargs.items()},
        )


def make_inputs(encoder: nn.Module, batch: int, *, seconds: float) -> Inputs:
    """Makes the same random batch at every call.

    Images have the encoder's own size and texts the length of its context.

    Args:
        batch: batch size.
        seconds: length of a waveform.

    Raises:
        ValueError: the encoder has no example input.
    """
    sites, example = describe(encoder)
    if example is None:
        raise ValueError(f"the inputs of {type(encoder).__name__} are not known")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        args, kwargs = example(encoder)
    generator = torch.Generator().manual_seed(0)

    def grown(one: Tensor) -> Tensor:
        if not one.is_floating_point():
            return _lengthened(one, _context(encoder)).expand(batch, -1).contiguous()
        shape = list(one.shape)
        if "audio" in sites.towers and len(shape) == 2:
            shape[1] = int(seconds * HERTZ)
        values = torch.randn(batch, *shape[1:], generator=generator)
        return values.to(one.device, one.dtype)

    return Inputs(args, kwargs).mapped(grown)


def _context(encoder: Any) -> int:
    config = getattr(getattr(encoder, "config", None), "text_config", None)
    return getattr(config, "max_position_embeddings", 0)


def _lengthened(ids: Tensor, length: int) -> Tensor:
    """Repeats the first token of texts (1, T), so that the end token stays at the end."""
    return torch.cat([ids[:, :1].expand(-1, max(length - ids.shape[1], 0)), ids], dim=1)


def pooled(output: Any) -> Tensor:
    """Pools any encoder's output to (B, D): the mean of its last states, or both embeddings."""
    if isinstance(output, Tensor):
        return output if output.dim() == 2 else output.mean(dim=1)
    for pair in (("image_embeds", "text_embeds"), ("image_features", "text_features")):
        if all(_get(output, name) is not None for name in pair):
            return torch.cat([_get(output, name) for name in pair], dim=-1)
    last = _get(output, "last_hidden_state")
    if last is not None:
        return last.mean(dim=1)
    # open_clip's models return both embeddings and a scale.
    embeddings = [part for part in output if isinstance(part, Tensor) and part.dim() >= 2]
    return torch.cat([pooled(part) for part in embeddings], dim=-1)


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


@torch.enable_grad()
def measure_towers(encoder: nn.Module, inputs: Inputs) -> list[TowerSize]:
    """Measures the towers' sizes and their shares of the operations in one forward pass.

    Gradients are on, since without them `nn.MultiheadAttention` takes a path that is not counted.
    """
    sites: SiteMap = describe(encoder)[0]
    tokens: dict[str, int] = {}
    spent = dict.fromkeys(sites.towers, 0)
    handles = []
    counter = FlopCounterMode(display=False)

    def begin(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            spent[name] -= counter.get_total_flops()

        return hook

    def end(name: str, axis: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            spent[name] += counter.get_total_flops()
            tokens[name] = first_output(output).shape[axis]

        return hook

    for name, tower in sites.towers.items():
        for block in tower.blocks:
            handles.append(block.module.register_forward_pre_hook(begin(name)))
            axis = 1 if tower.batch_first else 0
            handles.append(block.module.register_forward_hook(end(name, axis)))
    with counter:
        inputs(encoder)
    for handle in handles:
        handle.remove()
    total = counter.get_total_flops()
    return [
        TowerSize(
            name=name,
            blocks=len(tower.blocks),
            tokens=tokens[name],
            width=tower.width,
            share=spent[name] / total,
        )
        for name, tower in sites.towers.items()
        if name in tokens
    ]
