"""States that a library reads between the blocks of an encoder have no prompts in them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from families import Family, tensors
from families.small import randomise, seeded
from injection.matrix import FAMILIES, adapted, bare, config_for, loss_of, refusal
from injection.selection import kind, select
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, PromptConfig

SETUPS = ("prompt", "prompt-shallow", "both")
PAIRS = select(
    [
        (family, setup)
        for family in FAMILIES.values()
        for setup in SETUPS[:2]
        if refusal(family, setup) is None
    ],
    lambda family, setup: {("setup", setup, kind(family)): 1},
)


def prompted(name: str, setup: str) -> AdapterModel:
    """A model with random deep prompts, shallow ones, or both."""
    family = FAMILIES[name]
    model = mmadapters.init(bare(family))
    for method in ("prompt", "prompt-shallow") if setup == "both" else (setup,):
        model.add_adapter(method, config_for(family, method))
    randomise(model.adapters, 0.5)
    model.set_active_adapters(model.adapter_names)
    return model


def inner(model: nn.Module, family: Family) -> list[Tensor]:
    """All that the library returns from between the blocks."""
    args, kwargs = family.inputs()
    with torch.no_grad():
        if family.name.startswith("timm"):
            final, maps = model.forward_intermediates(*args)
            early = model.forward_intermediates(*args, indices=[0], stop_early=True)[1]
            by_layer = getattr(model, "get_intermediate_layers", None)
            layers = by_layer(*args, n=2, reshape=True) if by_layer is not None else []
            return [*early, final, *maps, *layers]
        if family.name.startswith("open_clip"):
            pixels = kwargs.get("image", args[0] if args else None)
            if not hasattr(model, "forward_intermediates"):
                return model.visual.forward_intermediates(pixels)["image_intermediates"]
            return model.forward_intermediates(image=pixels)["image_intermediates"]
        output = model(*args, **kwargs, output_hidden_states=True)
    return [state for value in _states(output) for state in value]


def _states(output: Any) -> list[tuple[Tensor, ...]]:
    """The hidden states of an output of transformers, and of the towers in it."""
    states = []
    for name, value in output.items():
        if name.endswith("hidden_states"):
            states.append(value)
        elif hasattr(value, "items"):
            states += _states(value)
    return states


@pytest.mark.parametrize(
    ("family", "setup"), PAIRS, ids=lambda value: getattr(value, "name", value)
)
def test_inner_states_have_no_prompts(family: Family, setup: str) -> None:
    plain = inner(bare(family), family)
    model, (args, kwargs) = prompted(family.name, setup), family.inputs()
    with torch.no_grad():
        before = tensors(model(*args, **kwargs))
        states = inner(model, family)
        after = tensors(model(*args, **kwargs))
    assert [state.shape for state in states] == [state.shape for state in plain]
    assert states
    assert not all(map(torch.equal, states, plain))
    assert all(map(torch.equal, before, after))
    assert not model.store.runtime.local.prompted


@pytest.mark.parametrize("setup", SETUPS)
def test_inner_states_are_the_tokens_of_the_written_out_stream(setup: str) -> None:
    model = prompted("timm-vit", setup)
    images = FAMILIES["timm-vit"].inputs()[0][0]
    tokens = {
        (method, site): module.tokens
        for method in model.adapter_names
        for site, module in model.adapter(method).entries()
    }
    with torch.no_grad():
        final, states = model.forward_intermediates(images, output_fmt="NLC")
        encoder = model.detach()
        x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
        length, expected = x.shape[1], []
        for index, block in enumerate(encoder.blocks):
            entering = [
                tokens[method, f"vision.blocks.{index}"].expand(len(x), -1, -1)
                for method in ("prompt-shallow", "prompt")
                if (method, f"vision.blocks.{index}") in tokens
            ]
            x = block(torch.cat([x, *entering], dim=1))
            if setup != "prompt-shallow":
                x = x[:, :-3]
            expected.append(x[:, 1:length])
        assert all(map(torch.equal, states, expected))
        assert torch.equal(final, encoder.norm(x[:, :length]))


def test_feature_maps_have_no_prompts() -> None:
    config = bare(FAMILIES["hf-dinov2"]).config.to_dict()
    config = transformers.Dinov2Config(**{**config, "out_indices": [0, 1, 2], "out_features": None})
    model = mmadapters.init(seeded(lambda: transformers.Dinov2Backbone(config)))
    images = FAMILIES["hf-dinov2"].inputs()[1]["pixel_values"]
    with torch.no_grad():
        plain = model(images).feature_maps
        model.add_adapter("a", PromptConfig(length=3, deep=False))
        randomise(model.adapters, 0.5)
        model.set_active_adapters("a")
        maps = model(images).feature_maps
    assert [m.shape for m in maps] == [m.shape for m in plain]
    assert torch.equal(maps[0], plain[0])  # The input of the first block.
    assert not torch.equal(maps[1], plain[1])


def test_attention_maps_show_the_prompts() -> None:
    model = prompted("hf-vit", "both")
    model.backbone.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**FAMILIES["hf-vit"].inputs()[1], output_attentions=True).attentions
    assert [m.shape for m in maps] == [(2, 2, 17 + 6, 17 + 6)] * 2


def test_hooks_of_users_see_and_change_the_tokens_alone() -> None:
    model = prompted("timm-vit", "both")
    images = FAMILIES["timm-vit"].inputs()[0][0]
    lengths = []

    def doubled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        lengths.extend((args[0].shape[1], output.shape[1]))
        return 2 * output

    with torch.no_grad():
        plain = model(images)
        handle = model.blocks[0].register_forward_hook(doubled)
        changed = model(images)
        handle.remove()
        assert lengths == [17, 17]
        assert not torch.equal(plain, changed)
        assert torch.equal(model(images), plain)


@pytest.mark.parametrize("recorded_before", [False, True])
def test_hidden_states_hold_what_a_ladder_adds(recorded_before: bool) -> None:
    model = mmadapters.init(bare(FAMILIES["hf-clip-vision"]))
    inputs = FAMILIES["hf-clip-vision"].inputs()[1]
    with torch.no_grad():
        plain = bare(FAMILIES["hf-clip-vision"])(**inputs, output_hidden_states=True).hidden_states
        if recorded_before:  # transformers puts its hooks on blocks at the first such call.
            model(**inputs, output_hidden_states=True)
        model.add_adapter("a", config_for(FAMILIES["hf-clip-vision"], "ladder"))
        randomise(model.adapters, 0.5)
        model.set_active_adapters("a")
        output = model(**inputs, output_hidden_states=True)
        assert all(map(torch.equal, output.hidden_states[:-1], plain[:-1]))
        assert not torch.equal(output.hidden_states[-1], plain[-1])
        pooled = model.sites.towers["vision"].norm.module(output.hidden_states[-1][:, 0])
        assert torch.equal(pooled, output.pooler_output)


def test_pass_that_ends_early_leaves_no_prompts_to_another() -> None:
    model = prompted("timm-vit", "prompt-shallow")
    images, x = FAMILIES["timm-vit"].inputs()[0][0], torch.randn(2, 17, 32)
    with torch.no_grad():
        expected = model(images)
        model.forward_intermediates(images, indices=[0], stop_early=True)
        with model.using(None):
            assert torch.equal(
                model.blocks[1](x), type(model.blocks[1]).forward(model.blocks[1], x)
            )
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("checkpointing", ["ours", "library"])
def test_gradients_pass_any_checkpointing(setup: str, checkpointing: str) -> None:
    family = FAMILIES["timm-vit"]
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = prompted("timm-vit", setup)
        model.train_adapter(model.adapter_names)
        if checkpointed:
            (model if checkpointing == "ours" else model.backbone).set_grad_checkpointing()
        loss_of(tensors(model(*family.inputs()[0]))).backward()
        gradients.append([parameter.grad for parameter in model.adapters.parameters()])
    assert all(grad.ne(0).any() for grad in gradients[0])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("method", ["convpass", "mona"])
def test_checkpointing_of_the_library_names_that_of_the_model(method: str) -> None:
    model = adapted(FAMILIES["timm-vit"], config_for(FAMILIES["timm-vit"], method))
    model.train_adapter("a")
    model.backbone.set_grad_checkpointing()
    loss = model(*FAMILIES["timm-vit"].inputs()[0]).sum()
    with pytest.raises(ValueError, match=r"call set_grad_checkpointing\(\) of the AdapterModel"):
        loss.backward()
    model.backbone.set_grad_checkpointing(False)
    model.set_grad_checkpointing()
    model(*FAMILIES["timm-vit"].inputs()[0]).sum().backward()


def test_padding_masks_show_the_prompts_to_every_token() -> None:
    model = prompted("hf-vit", "both")
    images = FAMILIES["hf-vit"].inputs()[1]["pixel_values"]
    if "attention_mask" not in inspect.signature(type(model.backbone).forward).parameters:
        pytest.skip("this transformers gives images no mask")
    mask = torch.ones(2, 17, dtype=torch.long)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        torch.testing.assert_close(model(images, attention_mask=mask).last_hidden_state, plain)
        mask[1, 9:] = 0
        hidden = model(images, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[0], plain[0])
    assert not torch.allclose(hidden[1], plain[1])
