"""Adapters folded into the frozen weights, and taken out again to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.small import filled, output, randomise, small_vit

from mmadapters import (
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    PrefixConfig,
    PromptConfig,
    SeqBnConfig,
    SSFConfig,
    Stack,
    UniPELTConfig,
    init,
)

MERGEABLE: list[MethodConfig] = [
    LoRAConfig(rank=2, targets=("q", "k", "v", "o", "up", "down"), dropout=0.1),
    DoRAConfig(rank=2, targets=("q", "down")),
    IA3Config(targets=("q", "k", "o", "up", "down")),
    SSFConfig(),
]


@pytest.mark.parametrize("config", MERGEABLE, ids=lambda config: config.method)
def test_merged_adapter_computes_the_same_and_reset_gives_the_bits_back(config: Any) -> None:
    model = init(small_vit())
    frozen = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.add_adapter("a", config)
    randomise(model.adapter("a"))
    plain = output(model)
    model.set_active_adapters("a")
    acting = output(model)
    model.merge_adapter("a")
    assert model.active_adapters is None
    merged = output(model)
    assert (merged - acting).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 1e-3
    model.reset_adapter("a")
    state = model.backbone.state_dict()
    assert list(state) == list(frozen)
    assert all(torch.equal(state[key], frozen[key]) for key in frozen)
    assert torch.equal(output(model), plain)
    model.set_active_adapters("a")
    assert torch.equal(output(model), acting)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (SeqBnConfig(), "non-linearity between its two projections"),
        (CompacterConfig(size=4), "non-linearity"),
        (PrefixConfig(), "a prefix adds keys and values"),
        (PromptConfig(), "a prompt adds tokens"),
        (ConfigUnion(LoRAConfig(rank=2), SeqBnConfig()), "non-linearity"),
        (UniPELTConfig(), "its gates depend on the input"),
    ],
    ids=lambda value: value.method if isinstance(value, MethodConfig) else "",
)
def test_what_no_weight_equals_refuses_to_merge(config: MethodConfig, reason: str) -> None:
    model = init(small_vit())
    model.add_adapter("a", config)
    frozen = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    with pytest.raises(ValueError, match=f"adapter 'a' cannot be merged: .*{reason}"):
        model.merge_adapter("a")
    state = model.backbone.state_dict()
    assert all(torch.equal(state[key], frozen[key]) for key in frozen)


def test_merges_are_undone_in_the_order_opposite_to_theirs() -> None:
    model = filled("lora", "ssf")
    frozen = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.set_active_adapters(Stack("lora", "ssf"))
    acting = output(model)
    model.merge_adapter("lora")
    assert model.active_adapters == Stack("ssf")
    model.merge_adapter("ssf")
    assert (output(model) - acting).abs().max() < 1e-5
    with pytest.raises(ValueError, match="adapter 'ssf' was merged after 'lora': reset it first"):
        model.reset_adapter("lora")
    assert (output(model) - acting).abs().max() < 1e-5
    model.reset_adapter("ssf")
    model.reset_adapter("lora")
    state = model.backbone.state_dict()
    assert all(torch.equal(state[key], frozen[key]) for key in frozen)
    with pytest.raises(ValueError, match="adapter 'lora' is not merged"):
        model.reset_adapter("lora")


def test_merged_adapter_cannot_act_a_second_time() -> None:
    model = filled("lora", "bottleneck")
    model.merge_adapter("lora")
    merged = output(model)
    for verb, message in (
        ("set_active_adapters", "is merged into the weights and would act twice"),
        ("train_adapter", "is merged into the weights and would act twice"),
        ("merge_adapter", "is merged into the weights and cannot be merged again"),
        ("delete_adapter", "is merged into the weights and cannot be deleted"),
    ):
        with pytest.raises(ValueError, match=rf"'lora' {message}; call reset_adapter\('lora'\)"):
            getattr(model, verb)("lora")
    with pytest.raises(ValueError, match="would act twice"), model.using(Stack("lora")):
        pass
    assert torch.equal(output(model), merged)
    model.set_active_adapters("bottleneck")
    assert not torch.equal(output(model), merged)


@pytest.mark.parametrize("setup", ["lora", None])
def test_merging_inside_using_is_refused_as_the_adapter_might_act_twice(setup: Any) -> None:
    model = filled("lora")
    before = output(model)
    with model.using(setup), pytest.raises(ValueError, match=r"'lora' .* inside a using block"):
        model.merge_adapter("lora")
    assert torch.equal(output(model), before)
    model.merge_adapter("lora")
    assert not torch.equal(output(model), before)
