"""MMA: bottlenecks of two towers that share their middle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import Family, families, seeded, tensors
from families.vision_language import TEXT, VISION, both
from injection.matrix import bare, distance, equal
from methods.reference import Array, assert_close, randomise
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, Average, Fuse, MMAConfig, Route, Split
from mmadapters.sites.tables import describe

FAMILIES = families()
SCALE = 0.2
CONFIG = MMAConfig(size=6, scale=SCALE, lowest=0)


def uneven() -> nn.Module:
    """A CLIP whose image tower is deeper and wider than its text tower."""
    vision = {**VISION, "hidden_size": 48, "num_hidden_layers": 4}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**TEXT, "num_hidden_layers": 3}, projection_dim=32
    )
    return seeded(lambda: transformers.CLIPModel(config))


UNEVEN = Family("uneven", uneven, both)


def adapted(plain: nn.Module, *adapters: str) -> AdapterModel:
    model = mmadapters.init(plain.double())
    for seed, adapter in enumerate(adapters or ("a",)):
        model.add_adapter(adapter, CONFIG)
        randomise(model.adapter(adapter), seed)
    model.set_active_adapters(adapters or "a")
    return model


@torch.no_grad()
def output(model: nn.Module, family: Family) -> list[Tensor]:
    args, kwargs = family.inputs()
    args = tuple(v.double() if v.is_floating_point() else v for v in args)
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    return tensors(model(*args, **kwargs))


def written_out(p: dict[str, Array], n: Array) -> Array:
    inner = np.maximum(n @ p["down.weight"].T + p["down.bias"], 0)
    inner = np.maximum(inner @ p["middle.weight"].T + p["middle.bias"], 0)
    return SCALE * (inner @ p["up.weight"].T + p["up.bias"])


PATHS = {
    "transformers": ("{}_model.encoder.layers.{}", "layer_norm1", "mlp"),
    "open_clip-vision": ("visual.transformer.resblocks.{1}", "ln_1", "mlp"),
    "open_clip-text": ("transformer.resblocks.{1}", "ln_1", "mlp"),
}


@pytest.mark.parametrize(
    "family",
    [FAMILIES["hf-clip"], FAMILIES["hf-siglip"], FAMILIES["open_clip-clip"], UNEVEN],
    ids=lambda family: family.name,
)
def test_adapted_towers_are_the_written_out_ones(family: Family) -> None:
    """Reads the first LayerNorm's output and adds to the MLP's."""
    model, plain = adapted(family.build()), family.build().double()
    before = output(plain, family)
    for site, module in model.adapter("a").entries():
        tower, _, index, _ = site.split(".")
        p = {key: value.detach().numpy() for key, value in module.state_dict().items()}
        key = f"open_clip-{tower}" if family.name.startswith("open_clip") else "transformers"
        path, norm, mlp = PATHS[key]
        block = plain.get_submodule(path.format(tower, index))
        seen: dict[str, Array] = {}

        def keep(module: nn.Module, args: Any, out: Tensor, seen: Any = seen) -> None:
            seen["n"] = out.numpy()

        def add(module: nn.Module, args: Any, out: Tensor, p: Any = p, seen: Any = seen) -> Tensor:
            return out + torch.from_numpy(written_out(p, seen["n"]))

        block.get_submodule(norm).register_forward_hook(keep)
        block.get_submodule(mlp).register_forward_hook(add)
    found, expected = output(model, family), output(plain, family)
    for one, other in zip(found, expected, strict=True):
        assert_close(one.numpy(), other.numpy(), 1e-10)
    assert distance(found, before) > 1e-3


def test_towers_are_paired_from_the_top() -> None:
    built: dict[str, Any] = CONFIG.build(describe(uneven())[0])
    assert [*built] == [
        *(f"vision.blocks.{i}.ffn" for i in (1, 2, 3)),
        *(f"text.blocks.{i}.ffn" for i in (0, 1, 2)),
    ]
    for vision, text in ((3, 2), (2, 1), (1, 0)):
        one, other = built[f"vision.blocks.{vision}.ffn"], built[f"text.blocks.{text}.ffn"]
        assert one.middle is other.middle
        assert one.down is not other.down
    assert len({id(module.middle) for module in built.values()}) == 3


@pytest.mark.parametrize(("lowest", "blocks"), [(None, 2), (0, 3), (2, 1)])
def test_blocks_below_the_lowest_are_left_alone(lowest: int | None, blocks: int) -> None:
    built = MMAConfig(lowest=lowest).build(describe(uneven())[0])
    assert [*built] == [
        *(f"vision.blocks.{i}.ffn" for i in range(4 - blocks, 4)),
        *(f"text.blocks.{i}.ffn" for i in range(3 - blocks, 3)),
    ]


def test_default_is_the_papers_blocks_and_size_of_vit_b() -> None:
    """Blocks 5 to 12 of a ViT-B/16 CLIP, 32 wide."""
    vision = {**VISION, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {**TEXT, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    with torch.device("meta"):
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text)
        )
    built = MMAConfig().build(describe(clip)[0])
    assert next(iter(built)) == "vision.blocks.4.ffn"
    assert len(built) == 16
    count = sum(p.numel() for p in nn.ModuleList(built.values()).parameters())
    assert count == 8 * (2 * 32 * (768 + 512) + 768 + 512 + 2 * 32 + 32 * 32 + 32)


def test_middle_is_stored_once_and_learns_from_both_towers() -> None:
    model = adapted(bare(FAMILIES["hf-clip"]))
    stored = model.adapter("a").tensors()
    assert sum(key.endswith("middle.weight") for key in stored) == 2
    model.adapters.requires_grad_(True)
    middle = dict(model.adapter("a").entries())["text.blocks.1.ffn"].middle.weight
    gradients = []
    for attribute in ("image_embeds", "text_embeds", None):
        model.zero_grad()
        _, kwargs = FAMILIES["hf-clip"].inputs()
        kwargs["pixel_values"] = kwargs["pixel_values"].double()
        given = model(**kwargs)
        names = ["image_embeds", "text_embeds"] if attribute is None else [attribute]
        sum(given[name][:, 0].sum() for name in names).backward()
        gradients.append(middle.grad.clone())
    assert all(bool(gradient.any()) for gradient in gradients)
    assert torch.allclose(gradients[0] + gradients[1], gradients[2])


def test_compositions_are_made_of_what_each_adapter_gives_alone() -> None:
    family = FAMILIES["hf-clip"]
    model = adapted(bare(family), "a", "b", "twin")
    model.adapter("twin").load_state_dict(model.adapter("a").state_dict())
    give: dict[Any, list[Tensor]] = {}
    halves, route = Split("a", "twin", splits=(2,)), Route(["a", "b"])
    for setup in ("a", "b", None, route, halves, Average("a", "twin"), Average("a", "b")):
        with model.using(setup):
            give[setup] = output(model, family)
    for index, own in enumerate(("a", "b")):
        for together, single in zip(give[route][2:], give[own][2:], strict=True):
            assert distance([together[index]], [single[index]]) < 1e-10
    assert distance(give[halves], give["a"]) < 1e-10
    assert distance(give[Average("a", "twin")], give["a"]) < 1e-10
    assert distance(give[Average("a", "b")], give["a"]) > 1e-5
    model.add_adapter_fusion(["a", "b"])
    with model.using(Fuse("a", "b")):
        assert not equal(output(model, family), give[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number"),
        ({"scale": 0.0}, "scale must not be 0"),
        ({"lowest": -1}, "lowest must be the number of a block"),
        ({"lowest": True}, "lowest must be the number of a block"),
        ({"lowest": 1.0}, "lowest must be the number of a block"),
    ],
    ids=str,
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMAConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MMAConfig(lowest=3), "lowest=3 leaves no block: a tower has 3, numbered from 0 to 2"),
        (
            MMAConfig(lowest=2, sites=("vision.blocks.0",)),
            r"adapts the upper 1 blocks of both towers of CLIPModel, and sites=.* names none",
        ),
    ],
    ids=["depth", "sites"],
)
def test_config_that_leaves_no_block_is_refused(config: MMAConfig, message: str) -> None:
    model = mmadapters.init(uneven())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config)
    assert model.adapter_names == ()
