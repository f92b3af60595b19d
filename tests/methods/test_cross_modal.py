"""Adapters inside cross-attention, on what was fetched and what asked for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import families, tensors
from injection.matrix import bare, distance, equal
from methods.reference import (
    ACTIVATIONS,
    Array,
    assert_close,
    layer_norm,
    np,
    randomise,
)
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, Average, CrossModalConfig, Fuse, Route, Split
from mmadapters.methods.cross_modal import CrossModal
from mmadapters.sites.acting import Context

FAMILIES = families()
SCALE = 0.7


def adapted(name: str, *adapters: str, **options: Any) -> AdapterModel:
    """In float64, with random adapters, all active."""
    model = mmadapters.init(bare(FAMILIES[name]).double())
    for seed, adapter in enumerate(adapters or ("a",)):
        model.add_adapter(adapter, CrossModalConfig(size=6, scale=SCALE, **options))
        randomise(model.adapter(adapter), seed)
    model.set_active_adapters(adapters or "a")
    return model


@torch.no_grad()
def output(model: nn.Module, name: str) -> list[Tensor]:
    args, kwargs = FAMILIES[name].inputs()
    args = tuple(v.double() if v.is_floating_point() else v for v in args)
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    return tensors(model(*args, **kwargs))


def written_out(p: dict[str, Array], x: Array, u: Array, activation: str) -> Array:
    asked = layer_norm(x, p["norm_query.weight"], p["norm_query.bias"])
    fetched = layer_norm(u, p["norm_fetched.weight"], p["norm_fetched.bias"])
    halves = np.split(p["down.weight"], 2, axis=1)
    inner = ACTIVATIONS[activation](asked @ halves[0].T + fetched @ halves[1].T + p["down.bias"])
    return SCALE * (inner @ p["up.weight"].T + p["up.bias"])


# By the tower of the site: the layer, the module that gives the branch, the one that x enters.
BLIP = ("crossattention.output.dropout", "crossattention")
PLACES = {
    ("hf-blip-retrieval", "fusion"): ("text_encoder.encoder.layer", *BLIP),
    ("hf-blip-vqa", "fusion"): ("text_encoder.encoder.layer", *BLIP),
    ("hf-blip-vqa", "decoder"): ("text_decoder.bert.encoder.layer", *BLIP),
    ("hf-blip-caption", "decoder"): ("text_decoder.bert.encoder.layer", *BLIP),
    ("open_clip-coca", "fusion"): ("text_decoder.cross_attn", "ls_1", "ln_1"),
}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", sorted({name for name, _ in PLACES}))
def test_adapted_encoder_is_the_written_out_one(name: str, activation: str) -> None:
    model, plain = adapted(name, activation=activation), bare(FAMILIES[name]).double()
    before = output(plain, name)
    entries = dict(model.adapter("a").entries())
    assert {site.split(".")[0] for site in entries} == {t for n, t in PLACES if n == name}
    for site, module in entries.items():
        tower, _, index, _ = site.split(".")
        p = {key: value.detach().numpy() for key, value in module.state_dict().items()}
        layers, gives, reads = PLACES[name, tower]
        layer = plain.get_submodule(f"{layers}.{index}")
        seen: dict[str, Array] = {}

        def keep(module: nn.Module, args: Any, seen: Any = seen) -> None:
            seen["x"] = args[0].numpy()

        def add(module: nn.Module, args: Any, u: Tensor, p: Any = p, seen: Any = seen) -> Tensor:
            return u + torch.from_numpy(written_out(p, seen["x"], u.numpy(), activation))

        layer.get_submodule(reads).register_forward_pre_hook(keep)
        layer.get_submodule(gives).register_forward_hook(add)
    found = output(model, name)
    for one, other in zip(found, output(plain, name), strict=True):
        assert_close(one.numpy(), other.numpy(), 1e-10)
    assert distance(found, before) > 1e-3


@torch.no_grad()
def test_what_is_made_of_the_image_depends_on_the_question() -> None:
    """With the same fetched state and another query, the change is another one."""
    module = dict(adapted("hf-blip-vqa").adapter("a").entries())["fusion.blocks.0.cross"]
    assert isinstance(module, CrossModal)
    u, x, other = (torch.randn(2, 5, 32, dtype=torch.float64) for _ in range(3))
    one, two = (module.change(u, Context(residual=query)) for query in (x, other))
    assert distance([one], [two]) > 1e-3


@torch.no_grad()
def test_text_that_does_not_cross_is_left_as_it_was() -> None:
    name = "hf-blip-retrieval"
    model = adapted(name)
    _, kwargs = FAMILIES[name].inputs()
    kwargs["pixel_values"] = kwargs["pixel_values"].double()
    alone = tensors(model(**kwargs, use_itm_head=False))
    with model.using(None):
        assert equal(tensors(model(**kwargs, use_itm_head=False)), alone)


def test_gradients_are_those_of_finite_differences() -> None:
    module = dict(adapted("hf-blip-vqa").adapter("a").entries())["decoder.blocks.1.cross"]
    u, x = (torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True) for _ in "ux")

    def call(u: Tensor, x: Tensor) -> Tensor:
        return module(u, Context(residual=x))

    assert torch.autograd.gradcheck(call, (u, x), fast_mode=True)


def test_compositions_are_made_of_what_each_adapter_gives_alone() -> None:
    name = "hf-blip-retrieval"
    model = adapted(name, "a", "b", "twin")
    model.adapter("twin").load_state_dict(model.adapter("a").state_dict())
    give: dict[Any, list[Tensor]] = {}
    halves, route = Split("a", "twin", splits=(2,)), Route(["a", "b"])
    same, mixed = Average("a", "twin"), Average("a", "b")
    for setup in ("a", "b", None, route, halves, same, mixed):
        with model.using(setup):
            give[setup] = output(model, name)
    for index, own in enumerate(("a", "b")):
        for together, single in zip(give[route], give[own], strict=True):
            assert distance([together[index]], [single[index]]) < 1e-10
    assert distance(give[halves], give["a"]) < 1e-10
    assert distance(give[same], give["a"]) < 1e-10
    assert distance(give[mixed], give["a"]) > 1e-4
    model.add_adapter_fusion(["a", "b"])
    with model.using(Fuse("a", "b")):
        assert distance(output(model, name), give[None]) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number"),
        ({"scale": 0}, "scale must not be 0"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"dropout": -0.1}, "dropout must be"),
    ],
    ids=str,
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossModalConfig(**options)


def test_sites_without_cross_attention_are_refused() -> None:
    model = mmadapters.init(bare(FAMILIES["hf-blip-vqa"]))
    with pytest.raises(ValueError, match=r"has no cross under sites=\('vision',\)"):
        model.add_adapter("a", CrossModalConfig(sites=("vision",)))
    assert model.adapter_names == ()
