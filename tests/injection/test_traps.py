"""Mistakes that other adapter libraries make, each of which must not happen here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from families import tensors
from injection.matrix import (
    FAMILIES,
    METHODS,
    adapted,
    bare,
    equal,
    home,
    loss_of,
    run,
    state,
    train,
)
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    BottleneckConfig,
    ConfigUnion,
    DoRAConfig,
    LoRAConfig,
    ParallelPlacement,
    SeqBnConfig,
    SequentialPlacement,
)
from mmadapters.methods import METHODS as METHOD_CLASSES
from mmadapters.methods import from_dict


def test_every_site_acts_with_its_own_parameters() -> None:
    """Not with those of the last layer, as hooks do that share a variable of a loop."""
    family = FAMILIES["timm-vit"]
    model = adapted(family, BottleneckConfig(size=4, norm="before"))
    train(model, family.inputs())
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for site, module in model.adapter("a").entries():

        def note(_: nn.Module, args: tuple, site: str = site) -> None:
            _, context = args
            seen[site] = [context.residual, context.input]

        handles.append(module.register_forward_pre_hook(note))
    by_hand = model(*family.inputs()[0])
    for handle in handles:
        handle.remove()
    assert list(seen) == [site for site, _ in model.adapter("a").entries()]
    assert len(seen) == 4

    # The same by hand, with timm's own blocks written out.
    backbone, parts = model.backbone, dict(model.adapter("a").entries())
    (images,), _ = family.inputs()
    with torch.no_grad():
        x = backbone._pos_embed(backbone.patch_embed(images))
        for index, block in enumerate(backbone.blocks):
            for sublayer, norm in (("attn", block.norm1), ("mlp", block.norm2)):
                branch = getattr(block, sublayer)(norm(x))
                site = f"vision.blocks.{index}.{'ffn' if sublayer == 'mlp' else sublayer}"
                own = parts[site]
                hidden = own.norm_before(branch)
                x = x + branch + own.up(torch.relu(own.down(hidden)))
        x = backbone.norm(x)
    torch.testing.assert_close(by_hand.detach(), x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("attempt", "nearest"),
    [
        (lambda model: model.set_active_adapters("pest"), "did you mean 'pets'"),
        (lambda model: model.set_active_adapters(["pets", "nihgt"]), "did you mean 'night'"),
        (lambda model: model.train_adapter("pest"), "did you mean 'pets'"),
        (lambda model: model.delete_adapter("pest"), "did you mean 'pets'"),
        (lambda model: model.merge_adapter("pest"), "did you mean 'pets'"),
        (lambda model: model.using("pest").__enter__(), "did you mean 'pets'"),
        (lambda model: model.add_adapter("new", "bottlenek"), "did you mean 'bottleneck'"),
        (lambda model: model.add_adapter("new", LoRAConfig(targets=("qq",))), "must be one of 'q'"),
        (
            lambda model: model.add_adapter("new", LoRAConfig(sites=("vison.blocks.0",))),
            "did you mean 'vision.blocks.0'",
        ),
        (
            lambda model: model.add_adapter("new", LoRAConfig(sites=("*", "vision.blocks.7"))),
            "no site of VisionTransformer matches 'vision.blocks.7'",
        ),
        (
            lambda model: model.add_adapter("new", BottleneckConfig(reduction_factor=64)),
            "larger than the width",
        ),
    ],
)
def test_wrong_name_fails_and_names_the_nearest(
    attempt: Callable[[mmadapters.AdapterModel], Any], nearest: str
) -> None:
    family = FAMILIES["timm-vit"]
    model = mmadapters.init(bare(family))
    model.add_adapter("pets", LoRAConfig(rank=2))
    model.add_adapter("night", LoRAConfig(rank=2))
    model.set_active_adapters("night")
    before = run(model, family)
    with pytest.raises(ValueError, match=nearest):
        attempt(model)
    assert model.adapter_names == ("pets", "night")
    assert list(model.active_adapters.names()) == ["night"]
    assert equal(run(model, family), before)


def test_unknown_option_in_a_file_fails() -> None:
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        from_dict({"method": "lora", "rnak": 4})


def test_wrapping_freezes_the_encoder_without_any_further_call() -> None:
    model = mmadapters.init(bare(FAMILIES["hf-vit"]))
    model.add_adapter("a", LoRAConfig(rank=2))
    model.set_active_adapters("a")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("method", [LoRAConfig(rank=4, targets=("o",)), DoRAConfig(targets=("o",))])
@pytest.mark.parametrize("name", ["open_clip-clip", "open_clip-own_attention", "open_clip-coca"])
def test_lora_on_the_output_map_of_open_clip_acts_learns_and_merges(
    name: str, method: LoRAConfig
) -> None:
    family = FAMILIES[name]
    model = adapted(family, method)
    with model.using(None):
        before = run(model, family)
    reached = train(model, family.inputs())
    assert reached == {name for name, _ in model.named_parameters() if "/o#" in name}
    after = run(model, family)
    assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-3
    model.merge_adapter("a")
    for merged, unmerged in zip(run(model, family), after, strict=True):
        torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bitfit"])
def test_weights_of_attention_do_not_drift_in_200_bfloat16_steps(method: str) -> None:
    family = FAMILIES["open_clip-clip"]
    backbone = bare(family).to(torch.bfloat16)
    before = state(backbone)
    model = mmadapters.init(backbone)
    model.add_adapter("a", METHODS[method])
    (images, texts), kwargs = family.inputs()
    train(model, ((images.to(torch.bfloat16), texts), kwargs), steps=200)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", ["hf-vit", "hf-bert", "hf-wav2vec2-stable", "hf-clip-vision"])
def test_hidden_states_of_transformers_are_those_with_the_adapter(name: str) -> None:
    """Also if they were asked for once before the adapter came."""
    family = FAMILIES[name]
    args, kwargs = family.inputs()
    backbone = bare(family)
    with torch.no_grad():
        bare_states = backbone(*args, **kwargs, output_hidden_states=True).hidden_states
    model = mmadapters.init(backbone)
    model.add_adapter("a", SeqBnConfig(reduction_factor=2, sites=("*.blocks.0",)))
    train(model, family.inputs())
    with torch.no_grad():
        output = model(*args, **kwargs, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == len(bare_states)
    assert torch.equal(states[0], bare_states[0])
    assert not torch.equal(states[1], bare_states[1])
    assert not torch.equal(states[2], bare_states[2])
    blocks = next(iter(model.sites.towers.values())).blocks
    recorded: list[Tensor] = []
    handle = blocks[1].module.register_forward_pre_hook(
        lambda _, args: recorded.append(args[0].clone())
    )
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    assert torch.equal(states[1], recorded[0])


def test_bottleneck_is_not_merged_in_silence() -> None:
    model = adapted(FAMILIES["hf-vit"], BottleneckConfig(size=4))
    with pytest.raises(ValueError, match="non-linearity between its two projections"):
        model.merge_adapter("a")


def test_merged_adapter_does_not_act_twice() -> None:
    family = FAMILIES["open_clip-clip"]
    model = adapted(family, METHODS["lora"])
    train(model, family.inputs())
    model.merge_adapter("a")
    for attempt in (model.set_active_adapters, model.train_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"reset_adapter\('a'\) first"):
            attempt("a")


@pytest.mark.parametrize("method", [*METHOD_CLASSES])
def test_no_method_starts_where_it_cannot_learn(method: str) -> None:
    """Two factors that are both zero get no gradient, ever."""
    method = method if method in METHODS else "union"
    family = home(method)
    model = adapted(family, METHODS[method])
    assert train(model, family.inputs(), steps=2) == {
        f"adapters.a.{name}" for name, _ in model.adapter("a").named_parameters()
    }


@pytest.mark.parametrize("name", ["hf-wav2vec2", "hf-wav2vec2-stable", "hf-hubert", "hf-wavlm"])
def test_speech_front_end_is_outside_of_the_graph_in_train_mode(name: str) -> None:
    family = FAMILIES[name]
    model = adapted(family, METHODS["lora"] if name != "hf-wavlm" else METHODS["par_bn"])
    model = mmadapters.init(model.detach(), train_trunk=True)
    model.add_adapter("a", BottleneckConfig(size=4))
    model.train_adapter("a")
    front = next(
        module
        for path, module in model.backbone.named_modules()
        if path.endswith("feature_extractor")
    )
    assert front.training
    assert not front(torch.randn(2, 4800)).requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    family = FAMILIES[name]
    config = ConfigUnion(
        BottleneckConfig(size=4, placement=SequentialPlacement(residual="after")),
        BottleneckConfig(size=4, placement=ParallelPlacement()),
        LoRAConfig(rank=2, targets=("q", "v", "o", "down")),
    )
    bare(family)  # made once and kept: what is drawn for it must not come after the seed below
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(family, config)
        train(model, family.inputs(), steps=1)
        if checkpointing:
            model.gradient_checkpointing_enable()
            entered = count_entries(model)
        model.adapter("a").requires_grad_(True)
        model.zero_grad()
        # transformers checkpoints in train mode only; nothing here is random.
        train_without_randomness(model)
        args, kwargs = family.inputs()
        loss_of(t for t in tensors(model(*args, **kwargs)) if t.requires_grad).backward()
        if checkpointing:
            # Once in the forward pass, once more in the backward pass.
            assert set(entered.values()) == {2}
        gradients.append({n: p.grad for n, p in model.adapter("a").named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6 + 1e-5 * scale, rtol=0)


def train_without_randomness(model: nn.Module) -> None:
    """Train mode, with every rate of dropout at zero, all layers and no masks over time."""
    model.adapters.train()
    config = getattr(model.backbone, "config", None)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment, config.layerdrop = False, 0.0
    for module in model.backbone.modules():
        module.training = True
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            module.training = False
    for module in model.backbone.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def count_entries(model: mmadapters.AdapterModel) -> dict[str, int]:
    """How often each block is run from now on, seen at the first module that it calls: some
    versions of transformers recompute within a block's own hooks, others outside of them."""
    entered: dict[str, int] = {}
    for block in model.sites.blocks():
        entered[block.name] = 0

        def enter(*_: Any, name: str = block.name) -> None:
            entered[name] += 1

        first = next(iter(block.sublayers.values()))
        first.residual.register_forward_pre_hook(enter)
    return entered


@pytest.mark.parametrize(
    "enable",
    [
        mmadapters.AdapterModel.gradient_checkpointing_enable,
        mmadapters.AdapterModel.set_grad_checkpointing,
    ],
    ids=["transformers-name", "timm-name"],
)
@pytest.mark.parametrize("name", ["hf-vit", "hf-wav2vec2", "timm-vit", "open_clip-bert"])
def test_gradient_checkpointing_recomputes_in_the_usual_training(
    name: str, enable: Callable[[mmadapters.AdapterModel], None]
) -> None:
    """That is, with the frozen trunk in eval mode, where transformers would leave it off."""
    family = FAMILIES[name]
    model = adapted(family, METHODS["bottleneck"])
    enable(model)
    entered = count_entries(model)
    model.train_adapter("a")
    args, kwargs = family.inputs()
    loss_of(t for t in tensors(model(*args, **kwargs)) if t.requires_grad).backward()
    assert set(entered.values()) == {2}


@pytest.mark.parametrize("name", ["hf-bert", "hf-blip-retrieval", "hf-blip-vqa"])
def test_gradient_checkpointing_leaves_the_embeddings_out_of_the_graph(name: str) -> None:
    """transformers makes them require gradients, which only re-entrant checkpointing needs."""
    family = FAMILIES[name]
    model = adapted(family, BottleneckConfig(size=4, sites=("*.blocks.1",)))
    model.gradient_checkpointing_enable()
    model.train_adapter("a")
    block = model.sites.towers["text"].blocks[0].module
    seen: list[bool] = []
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            any(t.requires_grad for t in [*tensors(args[:1]), *tensors(kwargs)])
        ),
        with_kwargs=True,
    )
    args, kwargs = family.inputs()
    model(*args, **kwargs)
    assert seen[0] is False


def test_reentrant_checkpointing_is_refused() -> None:
    model = adapted(FAMILIES["hf-vit"], LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="no gradient"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
