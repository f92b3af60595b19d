"""The same weights in two libraries: a model and its twin give the same features.

Weights of blocks are copied by canonical site, so that equal features also show that a name means
the same in both libraries; what stands before and behind the blocks is copied by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmadapters import MethodConfig, init
from mmadapters.sites.tables import describe

from . import Family, vision, vision_language
from .small import randomise
from .vision import images
from .vision_language import tokens

Run = Callable[[nn.Module], list[Tensor]]


def assert_alike(
    source: nn.Module,
    target: nn.Module,
    run: Run,
    run_twin: Run,
    folder: Path,
    config: MethodConfig,
    *,
    std: float = 0.1,
) -> None:
    """An adapter saved on `source` gives `target` the same features to 1e-5."""
    model = init(source)
    model.add_adapter("pets", config)
    randomise(model.adapter("pets"), std=std)
    model.save_adapter(folder / "pets", "pets")
    twin = init(target)
    twin.load_adapter(folder / "pets")
    with torch.no_grad():
        plain = run(model)
        model.set_active_adapters("pets")
        twin.set_active_adapters("pets")
        for expected, actual, before in zip(run(model), run_twin(twin), plain, strict=True):
            assert (actual - expected).abs().max() < 1e-5
            assert (expected - before).abs().max() > 1e-3


@dataclass(frozen=True)
class Twin:
    """Families `source` and `target` with equal weights.

    `outside` copies the weights outside of the blocks. `source_features` and `target_features` run
    a model, adapted or not, on the same images (and texts) and give what must be equal.
    """

    source: str
    target: str
    outside: Callable[[nn.Module, nn.Module], None]
    source_features: Run
    target_features: Run

    def either_way(self, *, back: bool) -> tuple[nn.Module, nn.Module, Run, Run]:
        """Fresh models and what runs them, for an adapter of the source, or of the target, on the
        other."""
        source, target = self.pair()
        if back:
            return target, source, self.target_features, self.source_features
        return source, target, self.source_features, self.target_features

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Fresh models of both families with the weights of the source."""
        source, target = _family(self.source).build(), _family(self.target).build()
        copy_weights(source, target, self.outside)
        return source, target


def _family(name: str) -> Family:
    every = (*vision.FAMILIES, *vision_language.FAMILIES)
    return next(family for family in every if family.name == name)


@torch.no_grad()
def copy_weights(
    source: nn.Module, target: nn.Module, outside: Callable[[nn.Module, nn.Module], None]
) -> None:
    """Gives `target` the weights of `source`; `outside` copies those outside of the blocks."""
    known = {leaf.name: leaf for leaf in describe(source)[0].leaves()}
    for leaf in describe(target)[0].leaves():
        for mine, theirs in (
            (leaf.weight, known[leaf.name].weight),
            (leaf.bias, known[leaf.name].bias),
        ):
            if mine is not None:
                assert theirs is not None
                mine.copy_(theirs)
    outside(source, target)


def _vit_outside(source: nn.Module, target: nn.Module) -> None:
    embeddings = source.embeddings
    target.cls_token.copy_(embeddings.cls_token)
    target.pos_embed.copy_(embeddings.position_embeddings)
    target.patch_embed.proj.load_state_dict(embeddings.patch_embeddings.projection.state_dict())


def _clip_outside(source: nn.Module, target: nn.Module) -> None:
    embeddings, visual = source.vision_model.embeddings, target.visual
    visual.class_embedding.copy_(embeddings.class_embedding)
    visual.positional_embedding.copy_(embeddings.position_embedding.weight)
    visual.conv1.load_state_dict(embeddings.patch_embedding.state_dict())
    visual.ln_pre.load_state_dict(source.vision_model.pre_layrnorm.state_dict())
    visual.proj.copy_(source.visual_projection.weight.T)
    embeddings = source.text_model.embeddings
    target.token_embedding.load_state_dict(embeddings.token_embedding.state_dict())
    target.positional_embedding.copy_(embeddings.position_embedding.weight)
    target.text_projection.copy_(source.text_projection.weight.T)


def _transformers_tokens(model: nn.Module) -> list[Tensor]:
    return [model(pixel_values=images()).last_hidden_state]


def _timm_tokens(model: nn.Module) -> list[Tensor]:
    return [model(images())]


def _transformers_embeddings(model: nn.Module) -> list[Tensor]:
    output = model(input_ids=tokens(), pixel_values=images())
    return [output.image_embeds, output.text_embeds]


def _open_clip_embeddings(model: nn.Module) -> list[Tensor]:
    return list(model(images(), tokens())[:2])


TWINS: list[Twin] = [
    Twin("hf-vit", "timm-vit", _vit_outside, _transformers_tokens, _timm_tokens),
    Twin(
        "hf-clip",
        "open_clip-clip",
        _clip_outside,
        _transformers_embeddings,
        _open_clip_embeddings,
    ),
]
