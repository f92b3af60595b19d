"""UniAdapter: what vision, text and fusion share, and what each of them adds."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from families import families, tensors
from injection.matrix import bare, distance, equal
from methods.reference import Array, assert_close, layer_norm, randomise
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, Average, Fuse, Route, Split, UniAdapterConfig
from mmadapters.methods.uniadapter import UniAdapter
from mmadapters.sites.acting import Context

FAMILIES = families()
SCALE = 0.3
CONFIG = UniAdapterConfig(size=6, scale=SCALE)


def adapted(name: str, *adapters: str) -> AdapterModel:
    """In float64, with random adapters, all active."""
    model = mmadapters.init(bare(FAMILIES[name]).double())
    for seed, adapter in enumerate(adapters or ("a",)):
        model.add_adapter(adapter, CONFIG)
        randomise(model.adapter(adapter), seed)
    model.set_active_adapters(adapters or "a")
    return model


def inputs(name: str) -> dict[str, Tensor]:
    _, kwargs = FAMILIES[name].inputs()
    return {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


@torch.no_grad()
def output(model: nn.Module, name: str, **options: Any) -> list[Tensor]:
    return tensors(model(**inputs(name), **options))


def inner(p: dict[str, Array], x: Array) -> Array:
    """a(x) of the formula."""
    normed = layer_norm(x, p["norm.weight"], p["norm.bias"])
    return np.maximum(normed @ p["down.weight"].T + p["down.bias"], 0)


def up(p: dict[str, Array], name: str, a: Array) -> Array:
    return a @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def written_out(model: AdapterModel, plain: nn.Module) -> None:
    """Puts hooks of plain torch on a bare BLIP that add what the formula says."""
    modules = {
        site: {key: value.detach().numpy() for key, value in module.state_dict().items()}
        for site, module in model.adapter("a").entries()
    }
    texts = {"text": "text_encoder.encoder", "decoder": "text_decoder.bert.encoder"}
    for site, p in modules.items():
        tower, _, index, _ = site.split(".")
        seen: dict[str, Array] = {}

        def keep(key: str, seen: dict[str, Array] = seen) -> Any:
            return lambda module, args: seen.__setitem__(key, args[0].numpy())

        def add(module: nn.Module, args: Any, out: Tensor, p: Any = p, seen: Any = seen) -> Tensor:
            a = inner(p, seen["x"])
            change = up(p, "up", a)
            if "q" in seen:
                change = change + up(p, "fusion", a) + up(p, "up", inner(p, seen.pop("q")))
            return out + torch.from_numpy(SCALE * change)

        if tower == "vision":
            layer = plain.get_submodule(f"vision_model.encoder.layers.{index}")
            layer.layer_norm2.register_forward_pre_hook(keep("x"))
            layer.mlp.register_forward_hook(add)
        else:
            layer = plain.get_submodule(f"{texts[tower]}.layer.{index}")
            layer.crossattention.register_forward_pre_hook(keep("q"))
            layer.intermediate.register_forward_pre_hook(keep("x"))
            layer.output.dropout.register_forward_hook(add)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hf-blip-retrieval", {"use_itm_head": True}),
        ("hf-blip-retrieval", {"use_itm_head": False}),
        ("hf-blip-vqa", {}),
        ("hf-blip-caption", {}),
    ],
    ids=["fusion", "text-mode", "vqa", "caption"],
)
def test_adapted_blip_is_the_written_out_one(name: str, options: dict[str, bool]) -> None:
    model, plain = adapted(name), bare(FAMILIES[name]).double()
    before = output(plain, name, **options)
    written_out(model, plain)
    found, expected = output(model, name, **options), output(plain, name, **options)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_close(one.numpy(), other.numpy(), 1e-10)
    assert distance(found, before) > 1e-3


def modules(model: AdapterModel) -> dict[str, UniAdapter]:
    found = dict(model.adapter("a").entries())
    assert all(isinstance(module, UniAdapter) for module in found.values())
    return found  # type: ignore[return-value]


def test_layers_share_between_towers_and_the_decoder_only_with_itself() -> None:
    own = modules(adapted("hf-blip-vqa"))
    for layer in (0, 1):
        vision, text, decoder = (
            own[f"{tower}.blocks.{layer}.ffn"] for tower in ("vision", "text", "decoder")
        )
        assert vision.down is text.down
        assert vision.norm is text.norm
        assert decoder.down is not text.down
        assert vision.fusion is None
        assert text.fusion is not None
        assert decoder.fusion is not None
    assert own["text.blocks.0.ffn"].down is not own["text.blocks.1.ffn"].down


def test_what_is_shared_is_counted_and_stored_once() -> None:
    model = adapted("hf-blip-vqa")
    width, size, layers = 32, 6, 2
    shared = 2 * width + width * size + size
    ups = size * width + width
    count = layers * (2 * shared + (1 + 2 + 2) * ups)  # encoder and decoder; five maps up
    assert sum(p.numel() for p in model.adapter("a").parameters()) == count
    stored = model.adapter("a").tensors()
    assert sum(tensor.numel() for tensor in stored.values()) == count
    assert sum(key.endswith("down.weight") for key in stored) == 2 * layers


def test_towers_without_fusion_share_by_layer() -> None:
    own = modules(adapted("hf-clip"))
    assert {module.reads for module in own.values()} == {frozenset({"residual"})}
    for layer in (0, 1):
        assert own[f"vision.blocks.{layer}.ffn"].down is own[f"text.blocks.{layer}.ffn"].down


@torch.no_grad()
def test_text_without_an_image_uses_the_text_map_alone() -> None:
    name = "hf-blip-retrieval"
    model = adapted(name)
    fused, alone = (output(model, name, use_itm_head=itm) for itm in (True, False))
    for module in modules(model).values():
        if module.fusion is not None:
            module.fusion.weight.zero_()
    assert equal(output(model, name, use_itm_head=False), alone)
    assert not equal(output(model, name, use_itm_head=True), fused)
    for module in modules(model).values():
        module.up.weight.zero_()
        module.up.bias.zero_()
    assert not equal(output(model, name, use_itm_head=False), alone)


@torch.no_grad()
def test_call_that_broke_off_leaves_nothing_for_the_next() -> None:
    name = "hf-blip-retrieval"
    model = adapted(name)
    expected = output(model, name, use_itm_head=False)
    layer = model.backbone.text_encoder.encoder.layer[0]

    def breaks(*args: Any) -> None:
        raise RuntimeError("broken off")

    # After the query was kept and before the branch has read it.
    handle = layer.intermediate.register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match="broken off"):
        output(model, name)
    handle.remove()
    assert equal(output(model, name, use_itm_head=False), expected)


def test_threads_in_other_modes_do_not_meet() -> None:
    name = "hf-blip-retrieval"
    model = adapted(name)
    expected = {itm: output(model, name, use_itm_head=itm) for itm in (True, False)}
    wrong: list[bool] = []

    def work(itm: bool) -> None:
        for _ in range(10):
            if not equal(output(model, name, use_itm_head=itm), expected[itm]):
                wrong.append(itm)

    threads = [threading.Thread(target=work, args=(itm,)) for itm in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("itm", [True, False], ids=["fusion", "text-mode"])
def test_checkpointed_blocks_give_the_same_gradients(itm: bool) -> None:
    name = "hf-blip-retrieval"
    model = adapted(name)
    model.adapters.requires_grad_(True)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        out = tensors(model(**inputs(name), use_itm_head=itm))
        # The other mode runs between forward and backward.
        output(model, name, use_itm_head=not itm)
        torch.stack([tensor.square().sum() for tensor in out]).sum().backward()
        named = model.adapters.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("fusion" in key for key in gradients[0]) is itm
    pairs = [(gradients[1][key], gradients[0][key]) for key in gradients[0]]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


@pytest.mark.parametrize("itm", [True, False], ids=["fusion", "text-mode"])
def test_compositions_are_made_of_what_each_adapter_gives_alone(itm: bool) -> None:
    name = "hf-blip-retrieval"
    model = adapted(name, "a", "b", "twin")
    model.adapter("twin").load_state_dict(model.adapter("a").state_dict())
    give: dict[Any, list[Tensor]] = {}
    halves, route = Split("a", "twin", splits=(2,)), Route(["a", "b"])
    same, mixed = Average("a", "twin"), Average("a", "b")
    for setup in ("a", "b", route, halves, same, mixed):
        with model.using(setup):
            give[setup] = output(model, name, use_itm_head=itm)
    for index, own in enumerate(("a", "b")):
        for together, single in zip(give[route], give[own], strict=True):
            if itm or together.dim() > 2:  # Scores without matching are of all pairs.
                assert distance([together[index]], [single[index]]) < 1e-10
    assert distance(give[halves], give["a"]) < 1e-10
    assert distance(give[same], give["a"]) < 1e-10
    assert distance(give[mixed], give["a"]) > 1e-4
    with pytest.raises(ValueError, match="no AdapterFusion of 'a,b'"):
        model.set_active_adapters(Fuse("a", "b"))
    model.add_adapter_fusion(["a", "b"])
    model.set_active_adapters(Fuse("a", "b"))
    fused = output(model, name, use_itm_head=itm)
    assert distance(fused, give["a"]) > 1e-4


def test_only_the_chosen_sites_are_adapted() -> None:
    config = UniAdapterConfig(size=6, sites=("vision", "text.blocks.1"))
    built = config.build(adapted("hf-blip-retrieval").sites)
    assert list(built) == [*(f"vision.blocks.{i}.ffn" for i in (0, 1)), "text.blocks.1.ffn"]


def test_chunked_feed_forward_is_refused_where_it_would_part_query_and_state() -> None:
    name = "hf-blip-retrieval"
    model = adapted(name)
    for layer in model.backbone.text_encoder.encoder.layer:
        layer.chunk_size_feed_forward = 1
    with pytest.raises(ValueError, match=r"shape \(2, 5, 32\) .* set chunk_size_feed_forward to 0"):
        output(model, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number"),
        ({"scale": 0}, "scale must not be 0"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
    ids=str,
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniAdapterConfig(**options)


def test_gradients_are_those_of_finite_differences() -> None:
    model = adapted("hf-blip-retrieval")
    module = modules(model)["text.blocks.1.ffn"].requires_grad_(True)
    x, q, u = (torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True) for _ in "xqu")

    def call(u: Tensor, x: Tensor, q: Tensor) -> Tensor:
        return module(u, Context(residual=x, query=q))

    assert torch.autograd.gradcheck(call, (u, x, q), fast_mode=True)
