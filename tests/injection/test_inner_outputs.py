"""What a library reads between the blocks of an encoder has no trace of the prompts in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Family, tensors
from families.small import randomise
from injection.matrix import FAMILIES, bare, config_for, refusal
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel

PROMPTED = [name for name, family in FAMILIES.items() if refusal(family, "prompt") is None]
SETUPS = ("prompt", "prompt-shallow", "both")


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


@pytest.mark.parametrize("name", PROMPTED)
def test_inner_states_have_no_prompts(name: str) -> None:
    family, plain = FAMILIES[name], inner(bare(FAMILIES[name]), FAMILIES[name])
    assert plain
    args, kwargs = family.inputs()
    for setup in SETUPS:
        model = prompted(name, setup)
        with torch.no_grad():
            before = tensors(model(*args, **kwargs))
            states = inner(model, family)
            after = tensors(model(*args, **kwargs))
        assert [state.shape for state in states] == [state.shape for state in plain]
        assert not all(map(torch.equal, states, plain))
        assert all(map(torch.equal, before, after))
        assert not model.store.runtime.local.prompted
