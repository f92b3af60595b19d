"""Gated cross-attention: texts that look at the tokens of an image."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import families, tensors
from injection.matrix import bare, distance, equal
from methods.reference import Array, assert_close, gelu, layer_norm, randomise, softmax
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    BatchSplit,
    Fuse,
    GatedCrossAttentionConfig,
    LoRAConfig,
    Parallel,
    PromptConfig,
    Route,
    Split,
    Stack,
)
from mmadapters.sites.acting import Context

FAMILIES = families()
HEADS = 2
CONFIG = GatedCrossAttentionConfig(size=8, heads=HEADS, feed_forward=2)
NAMES = ("hf-clip", "hf-siglip", "open_clip-clip", "open_clip-timm_tower", "open_clip-coca")
PARTS = {
    "hf": ("{}_model.encoder.layers.{}", "vision_model.encoder.layers.1"),
    "open_clip-clip": ("transformer.resblocks.{1}", "visual.transformer.resblocks.1"),
    "open_clip-coca": ("text.transformer.resblocks.{1}", "visual.transformer.resblocks.1"),
    "open_clip-timm_tower": ("text.transformer.resblocks.{1}", "visual.trunk.blocks.{}"),
}


def adapted(name: str, *adapters: str, config: Any = CONFIG) -> AdapterModel:
    """In float64, with random adapters, all active."""
    model = mmadapters.init(bare(FAMILIES[name]).double())
    for seed, adapter in enumerate(adapters or ("a",)):
        model.add_adapter(adapter, config)
        randomise(model.adapter(adapter), seed)
    model.set_active_adapters(adapters or "a")
    return model


def inputs(name: str) -> tuple[tuple, dict[str, Tensor]]:
    args, kwargs = FAMILIES[name].inputs()
    args = tuple(v.double() if v.is_floating_point() else v for v in args)
    return args, {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


@torch.no_grad()
def output(model: nn.Module, name: str) -> list[Tensor]:
    args, kwargs = inputs(name)
    return tensors(model(*args, **kwargs))


def written_out(p: dict[str, Array], x: Array, z: Array) -> Array:
    """x'' of the formula, one head after another."""
    normed = layer_norm(x, p["norm.weight"], p["norm.bias"])
    image = layer_norm(z, p["norm_image.weight"], p["norm_image.bias"])
    q = normed @ p["query.weight"].T
    k, v = image @ p["key.weight"].T, image @ p["value.weight"].T
    size = q.shape[-1] // HEADS
    fetched = []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        scores = q[..., own] @ k[..., own].swapaxes(-1, -2) / np.sqrt(size)
        fetched.append(softmax(scores) @ v[..., own])
    x = x + np.tanh(p["gate"]) * (np.concatenate(fetched, axis=-1) @ p["out.weight"].T)
    normed = layer_norm(x, p["inner.norm.weight"], p["inner.norm.bias"])
    inner = gelu(normed @ p["inner.up.weight"].T)
    return x + np.tanh(p["inner.gate"]) * (inner @ p["inner.down.weight"].T)


@pytest.mark.parametrize("name", NAMES)
def test_adapted_encoder_is_the_written_out_one(name: str) -> None:
    model, plain = adapted(name), bare(FAMILIES[name]).double()
    before = output(plain, name)
    texts, images = PARTS.get(name, PARTS["hf"])
    depth = len(model.sites.towers["vision"].blocks)
    seen: dict[str, Array] = {}

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen["z"] = (out if isinstance(out, Tensor) else out[0]).numpy()

    plain.get_submodule(images.format(depth - 1)).register_forward_hook(keep)
    for site, module in model.adapter("a").entries():
        p = {key: value.detach().numpy() for key, value in module.state_dict().items()}
        tower, _, index = site.split(".")

        def enter(module: nn.Module, args: tuple, p: Any = p) -> tuple:
            return (torch.from_numpy(written_out(p, args[0].numpy(), seen["z"])), *args[1:])

        plain.get_submodule(texts.format(tower, index)).register_forward_pre_hook(enter)
    found = output(model, name)
    for one, other in zip(found, output(plain, name), strict=True):
        assert_close(one.numpy(), other.numpy(), 1e-9)
    assert distance(found, before) > 1e-3


@torch.no_grad()
def embedded(model: AdapterModel, images: Tensor | None, texts: Tensor) -> Tensor:
    """The texts' embeddings by a CLIP of transformers, beside images or alone."""
    if images is None:
        given = model.get_text_features(input_ids=texts)
        return given if isinstance(given, Tensor) else given.pooler_output
    output = model(pixel_values=images, input_ids=texts)
    return output.text_model_output.pooler_output


def encoded(model: AdapterModel, images: Tensor) -> Tensor:
    """The tokens of images by a CLIP of transformers."""
    with model.paired() as pair:
        model.get_image_features(pixel_values=images)
    assert pair.tokens is not None
    return pair.tokens


@torch.no_grad()
def test_each_text_looks_at_its_own_image() -> None:
    model = adapted("hf-clip")
    _, given = inputs("hf-clip")
    images, texts = given["pixel_values"], given["input_ids"]
    one = embedded(model, images, texts)
    other = embedded(model, torch.stack([images[0], -images[1]]), texts)
    assert distance([other[0]], [one[0]]) < 1e-12
    assert distance([other[1]], [one[1]]) > 1e-3
    with model.using(None):
        assert equal([embedded(model, images, texts)], [embedded(model, -images, texts)])


@torch.no_grad()
def test_towers_run_one_after_another_give_what_one_call_gives() -> None:
    model = adapted("open_clip-clip")
    (images, texts), _ = inputs("open_clip-clip")
    together = model(images, texts)[1]
    with model.paired() as pair:
        model.encode_image(images)
        assert pair.tokens is not None
        assert distance([model.encode_text(texts, normalize=True)], [together]) < 1e-12
    with model.looking_at(pair.tokens):
        assert distance([model.encode_text(texts, normalize=True)], [together]) < 1e-12
        # What is given by hand stays, whatever image goes through the encoder.
        model.encode_image(-images)
        assert distance([model(-images, texts)[1]], [together]) < 1e-12
    with model.looking_at(pair.tokens[[1, 0]]):
        swapped = model.encode_text(texts[[1, 0]], normalize=True)
    assert distance([swapped[[1, 0]]], [together]) < 1e-12


@torch.no_grad()
def test_text_without_an_image_is_refused_or_said_to_stand_alone() -> None:
    name = "open_clip-clip"
    model = adapted(name)
    (images, texts), _ = inputs(name)
    plain = bare(FAMILIES[name]).double().requires_grad_(False)
    message = (
        r"at text.blocks.0 attends to an image.*looking_at\(image_tokens\)"
        r".*looking_at\(None\)"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model.encode_text(texts)
        with pytest.raises(ValueError, match=message):
            model(text=texts)
        with model.paired(), pytest.raises(ValueError, match=message):
            model.encode_text(texts)
        with model.looking_at(None):
            assert torch.equal(model.encode_text(texts), plain.encode_text(texts))
            assert equal(tensors(model(images, texts)), tensors(plain(images, texts)))
        with model.using(None):
            assert torch.equal(model.encode_text(texts), plain.encode_text(texts))
        # An earlier batch's image is never looked at: the second time is like the first.
        model(images, texts)
        model.encode_image(images)


@torch.no_grad()
def test_call_that_broke_off_leaves_no_image_behind() -> None:
    model = adapted("open_clip-clip")
    (images, texts), _ = inputs("open_clip-clip")

    def breaks(*args: Any) -> None:
        raise RuntimeError("broken off")

    handle = model.backbone.token_embedding.register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="broken off"):
        model(images, texts)
    handle.remove()
    with pytest.raises(ValueError, match="none has been encoded in this call"):
        model.encode_text(texts)


@torch.no_grad()
def test_numbers_and_shapes_that_do_not_fit_are_named() -> None:
    model = adapted("open_clip-clip")
    (images, texts), _ = inputs("open_clip-clip")
    with pytest.raises(ValueError, match=r"2 texts reached text.blocks.0 with 1 images"):
        model(images[:1], texts)
    for wrong in (torch.zeros(2, 32), torch.zeros(2, 17, 31), "image"):
        with (
            pytest.raises(ValueError, match=r"takes image tokens of shape \(images, tokens, 32\)"),
            model.looking_at(wrong),  # type: ignore[arg-type]
        ):
            pass


def test_threads_look_at_images_of_their_own() -> None:
    model = adapted("hf-clip")
    _, given = inputs("hf-clip")
    images, texts = given["pixel_values"], given["input_ids"]
    batches = [images, -images, images.flip(0)]
    with torch.no_grad():
        tokens = [encoded(model, batch) for batch in batches]
    expected = [embedded(model, batch, texts) for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for turn in range(8):
            if turn % 2:
                found = embedded(model, batches[index], texts)
            else:
                with model.looking_at(tokens[index]):
                    found = embedded(model, None, texts)
            if distance([found], [expected[index]]) > 1e-12:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert distance([expected[0]], [expected[1]]) > 1e-3


@pytest.mark.parametrize("name", ["hf-clip", "open_clip-clip"])
def test_checkpointed_blocks_give_the_same_gradients(name: str) -> None:
    model = adapted(name)
    model.add_adapter("lora", LoRAConfig(rank=2, sites=("vision",)))
    randomise(model.adapter("lora"))
    model.set_active_adapters(["a", "lora"])
    model.adapters.requires_grad_(True)
    args, kwargs = inputs(name)
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        out = model(*args, **kwargs)
        text = out[1] if isinstance(out, tuple) else out.text_embeds
        # Another batch before backward, which must not be looked at.
        flipped = {k: v.flip(0) for k, v in kwargs.items()}
        model(*(value.flip(0) for value in args), **flipped)
        text[:, :4].sum().backward()
        named = model.adapters.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # The loss is of the texts alone, and the image tower learns from it.
    assert any("lora" in key for key in gradients[0])
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, rtol=1e-8, atol=1e-10), key


@pytest.mark.parametrize("name", ["hf-clip", "open_clip-clip"])
def test_prompts_of_the_image_tower_are_not_looked_at_whichever_was_added_first(name: str) -> None:
    given = []
    for order in (("a", "words"), ("words", "a")):
        model = mmadapters.init(bare(FAMILIES[name]).double())
        for adapter in order:
            config = PromptConfig(length=3, sites=("vision",)) if adapter == "words" else CONFIG
            model.add_adapter(adapter, config)
            randomise(model.adapter(adapter))
        model.set_active_adapters(["words", "a"])
        given.append(output(model, name))
        with torch.no_grad(), model.paired() as pair:
            if name == "hf-clip":
                model.get_image_features(pixel_values=inputs(name)[1]["pixel_values"])
            else:
                model.encode_image(inputs(name)[0][0])
        assert pair.tokens is not None
        assert pair.tokens.shape == (2, 17, 32)
    assert distance(given[0], given[1]) < 1e-12


@torch.no_grad()
def test_blocks_that_take_tokens_first_give_the_same() -> None:
    name = "open_clip-clip"
    model = adapted(name)
    plain = bare(FAMILIES[name]).double()
    for tower in (plain.visual.transformer, plain.transformer):
        tower.batch_first = False
        for block in tower.resblocks:
            block.attn.batch_first = False
    turned = mmadapters.init(plain)
    assert not turned.sites.towers["text"].batch_first
    turned.add_adapter("a", CONFIG)
    turned.adapter("a").load_state_dict(model.adapter("a").state_dict())
    turned.set_active_adapters("a")
    assert distance(output(turned, name), output(model, name)) < 1e-10


@pytest.mark.parametrize("every", [1, 2])
def test_every_nth_block_is_entered_by_one(every: int) -> None:
    model = adapted("hf-clip", config=GatedCrossAttentionConfig(size=8, heads=2, every=every))
    sites = [site for site, _ in model.adapter("a").entries()]
    assert sites == [f"text.blocks.{index}" for index in range(0, 2, every)]
    with model.using("a", drop=1):
        dropped = output(model, "hf-clip")
    with model.using(None):
        assert equal(dropped, output(model, "hf-clip")) is (every == 2)


def test_compositions_are_made_of_what_each_adapter_gives_alone() -> None:
    name = "hf-siglip"
    model = adapted(name, "a", "b", "twin")
    model.adapter("twin").load_state_dict(model.adapter("a").state_dict())
    give: dict[Any, Tensor] = {}
    route, split = Route(["a", "b"]), BatchSplit("b", "base", batch_sizes=(1, 1))
    halves, same, mixed = Split("a", "twin", splits=(3,)), Average("a", "twin"), Average("a", "b")
    for setup in ("a", "b", None, route, split, halves, same, mixed, Stack("a", "b")):
        with model.using(setup), torch.no_grad():
            give[setup] = model(**inputs(name)[1]).text_embeds
    for setup, owners in ((route, ("a", "b")), (split, ("b", None))):
        for index, own in enumerate(owners):
            assert distance([give[setup][index]], [give[own][index]]) < 1e-10
    assert distance([give[halves]], [give["a"]]) < 1e-10
    assert distance([give[same]], [give["a"]]) < 1e-10
    for setup in (mixed, Stack("a", "b")):
        assert min(distance([give[setup]], [give[own]]) for own in ("a", "b")) > 1e-4


def test_compositions_without_a_meaning_are_refused() -> None:
    model = adapted("hf-siglip", "a", "b")
    with pytest.raises(ValueError, match=r"Parallel cannot hold 'a', a gated_cross_attention: it"):
        model.set_active_adapters(Parallel("a", "b"))
    with pytest.raises(ValueError, match=r"'a', a gated_cross_attention, cannot be fused"):
        model.add_adapter_fusion(["a", "b"])
    with pytest.raises(ValueError, match=r"no AdapterFusion of 'a,b'"):
        model.set_active_adapters(Fuse("a", "b"))
    assert model.active_adapters == Stack("a", "b")


def test_file_is_bound_to_the_image_tower_too(tmp_path: Path) -> None:
    model = adapted("hf-clip")
    model.save_adapter(tmp_path / "a", "a")
    other = mmadapters.init(bare(FAMILIES["hf-clip"]).double())
    other.load_adapter(tmp_path / "a")
    other.set_active_adapters("a")
    assert equal(output(other, "hf-clip"), output(model, "hf-clip"))
    changed = bare(FAMILIES["hf-clip"]).double()
    with torch.no_grad():
        changed.vision_model.encoder.layers[0].mlp.fc1.weight.add_(0.1)
    other = mmadapters.init(changed)
    with pytest.raises(ValueError, match="vision"):
        other.load_adapter(tmp_path / "a")
    assert other.adapter_names == ()


def test_what_looks_is_known() -> None:
    model = adapted("hf-clip", "a")
    assert model.looks_at_images
    model.add_adapter("lora", LoRAConfig(rank=2))
    with model.using("lora"):
        assert not model.looks_at_images
    with model.using(Route(["lora", "a"])):
        assert model.looks_at_images
    model.set_active_adapters(None)
    assert not model.looks_at_images


def test_gradients_are_those_of_finite_differences() -> None:
    module = dict(adapted("hf-clip").adapter("a").entries())["text.blocks.1"].requires_grad_(True)
    x = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, z: Tensor) -> Tensor:
        return module(x, Context(image=z))

    assert torch.autograd.gradcheck(call, (x, z), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number"),
        ({"size": 10, "heads": 4}, "size 10 is no multiple of the 4 heads"),
        ({"every": 0}, "every must be a whole number"),
        ({"feed_forward": -1}, "feed_forward must be a whole number"),
        ({"feed_forward": 0.5}, "feed_forward must be a whole number"),
        ({"dropout": 1}, "dropout must be"),
    ],
    ids=str,
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedCrossAttentionConfig(**options)


@pytest.mark.parametrize("sites", [("vision",), ("*.attn",), ("text.blocks.1.ffn",)], ids=str)
def test_sites_that_are_no_blocks_of_the_text_tower_are_refused(sites: tuple[str, ...]) -> None:
    model = mmadapters.init(bare(FAMILIES["hf-clip"]))
    with pytest.raises(ValueError, match=r"acts before the blocks text.blocks.0 to text.blocks.1"):
        model.add_adapter("a", GatedCrossAttentionConfig(sites=sites))
    assert model.adapter_names == ()
