"""What holds for every method on every family of encoders."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, tensors
from injection.matrix import (
    COPIED_HERE,
    EACH_ONCE,
    FAMILIES,
    METHODS,
    REFUSED_HERE,
    TAKEN_HERE,
    Life,
    Trace,
    adapted,
    bare,
    bare_outputs,
    config_for,
    distance,
    equal,
    live,
    pair_id,
    refusal,
    run,
    same_state,
    state,
    train,
)
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

import mmadapters


@pytest.fixture
def life(request: pytest.FixtureRequest) -> Life:
    """One trained model per method and family; tests that change it work on a copy."""
    life = live(*request.param)
    # What a test draws does not depend on whether it is the first of its pair.
    torch.manual_seed(0)
    return life


each_life = pytest.mark.parametrize("life", TAKEN_HERE, ids=pair_id, indirect=True)
each_copied_life = pytest.mark.parametrize("life", COPIED_HERE, ids=pair_id, indirect=True)


@each_life
def test_fresh_adapter_leaves_output_bitwise_equal(life: Life) -> None:
    assert equal(life.wrapped, life.bare)
    assert equal(life.idle, life.bare)
    # Prompts and prefixes take attention from the start, and say so.
    assert equal(life.fresh, life.bare) is life.config.identity


@each_life
def test_training_changes_the_adapter_and_nothing_else(life: Life) -> None:
    assert not equal(life.trained, life.fresh)
    assert all(bool(output.isfinite().all()) for output in life.trained)
    own = {f"adapters.a.{name}" for name, _ in life.model.adapter("a").named_parameters()}
    assert own
    assert life.trainable == own
    assert life.reached == own
    assert all(p.grad is None for p in life.backbone.parameters())
    assert same_state(life.backbone, life.weights)


@each_life
def test_adapter_switched_off_leaves_output_bitwise_equal(life: Life) -> None:
    with life.model.using(None):
        assert equal(life.outputs(), life.bare)
    assert equal(life.outputs(), life.trained)
    life.model.set_active_adapters(None)
    try:
        assert equal(life.outputs(), life.bare)
    finally:
        life.model.set_active_adapters("a")


@each_life
def test_merged_adapter_gives_the_same_output_and_reset_the_same_bits(life: Life) -> None:
    model = life.model
    reason = unmergeable(life)
    if reason is not None:
        with pytest.raises(ValueError, match="adapter 'a' cannot be merged: ") as error:
            model.merge_adapter("a")
        assert reason in str(error.value)
    else:
        try:
            model.merge_adapter("a")
            assert model.active_adapters is None
            assert distance(life.outputs(), life.trained) <= 1e-5
        finally:
            model.reset_adapter("a")
        assert equal(life.outputs(), life.bare)
        model.set_active_adapters("a")
    assert same_state(life.backbone, life.weights)
    assert equal(life.outputs(), life.trained)


def unmergeable(life: Life) -> str | None:
    """Why this adapter cannot be merged, None if it can."""
    if life.config.mergeable is not True:
        assert isinstance(life.config.mergeable, str)
        return life.config.mergeable
    if life.method == "ssf" and any(leaf.bias is None for leaf in life.model.sites.leaves()):
        return "has no parameter to hold its shift"
    if life.method == "repadapter" and any(
        leaf.bias is None
        for leaf in life.model.sites.leaves()
        if leaf.role in ("q", "k", "v", "up", "gate") and ".cross." not in leaf.name
    ):
        return "has no parameter to hold its shift"
    return None


@each_life
def test_samples_give_the_same_alone_as_in_a_batch(life: Life) -> None:
    args, kwargs = life.inputs
    compared = 0
    for index in range(2):
        with torch.no_grad():
            alone = life.model(*part(args, index), **part(kwargs, index))
        for single, batch in zip(tensors(alone), life.trained, strict=True):
            # Losses and scores of every image for every text have no row of one sample.
            if batch.dim() and batch.shape[0] == 2 and single.shape[1:] == batch.shape[1:]:
                assert distance([single], [batch[index : index + 1]]) <= 1e-5
                compared += 1
    assert compared >= 2


def part(value: Any, index: int) -> Any:
    """Inputs of one sample of a batch of two."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and value.shape[0] == 2 else value
    if isinstance(value, dict):
        return {key: part(item, index) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(part(item, index) for item in value)
    return value


@each_copied_life
def test_detached_encoder_has_no_trace_of_the_adapter(life: Life) -> None:
    encoder = copy.deepcopy(life.model).detach()
    assert Trace.of(encoder) == life.before
    assert same_state(encoder, life.weights)
    assert equal(run(encoder, life.family), bare_outputs(life.family, frozen=False))


@each_copied_life
def test_saved_adapter_gives_equal_output_in_a_fresh_model(life: Life, tmp_path: Path) -> None:
    life.model.save_adapter(tmp_path / "a", "a")
    other = mmadapters.init(bare(life.family))
    other.load_adapter(tmp_path / "a")
    assert equal(run(other, life.family), life.bare)
    other.set_active_adapters("a")
    assert equal(run(other, life.family), life.trained)


@each_copied_life
def test_pickled_model_gives_equal_output(life: Life) -> None:
    if any(is_parametrized(module) for module in life.backbone.modules()):
        # torch pickles no module with a parametrized weight, here the convolution over positions.
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(bare(life.family))
        return
    assert equal(run(pickle.loads(pickle.dumps(life.model)), life.family), life.trained)


@each_copied_life
def test_training_a_copy_leaves_the_original_alone(life: Life) -> None:
    twin = copy.deepcopy(life.model)
    assert equal(run(twin, life.family), life.trained)
    train(twin, life.inputs, steps=1)
    assert not equal(run(twin, life.family), life.trained)
    assert equal(life.outputs(), life.trained)


@each_copied_life
def test_training_in_bfloat16_leaves_the_encoder_bit_for_bit(life: Life) -> None:
    backbone = bare(life.family).to(torch.bfloat16)
    before = state(backbone)
    model = mmadapters.init(backbone)
    model.add_adapter("a", life.config)
    own = list(model.adapter("a").parameters())
    assert {parameter.dtype for parameter in own} == {torch.bfloat16}
    fresh = [parameter.detach().clone() for parameter in own]
    train(model, in_bfloat16(life.inputs), steps=2)
    assert not all(map(torch.equal, own, fresh))
    assert all(bool(parameter.isfinite().all()) for parameter in own)
    assert same_state(backbone, before)


def in_bfloat16(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_bfloat16(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_bfloat16(item) for item in value)
    return value


@pytest.mark.parametrize("refused", REFUSED_HERE, ids=pair_id)
def test_refused_method_says_what_would_do_and_leaves_no_trace(
    refused: tuple[Family, str],
) -> None:
    family, method = refused
    backbone = bare(family)
    trace, weights = Trace.of(backbone), state(backbone)
    model = mmadapters.init(backbone)
    with pytest.raises(ValueError, match=refusal(family, method) or "") as error:
        model.add_adapter("a", METHODS[method])
    assert "\n" not in str(error.value)
    assert model.adapter_names == ()
    assert equal(run(model, family), bare_outputs(family))
    encoder = model.detach()
    assert Trace.of(encoder) == trace
    assert same_state(encoder, weights)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_detach_gives_the_very_module_back(family: Family) -> None:
    backbone = bare(family)
    trace = Trace.of(backbone)
    model = mmadapters.init(backbone)
    taken = [method for method in EACH_ONCE if refusal(family, method) is None]
    for method in taken:
        model.add_adapter(method, config_for(family, method))
    model.set_active_adapters(taken)
    identity = all(METHODS[method].identity for method in taken)
    assert equal(run(model, family), bare_outputs(family)) is identity
    model.train_adapter(taken)
    assert model.detach() is backbone
    assert Trace.of(backbone) == trace
    assert equal(run(backbone, family), bare_outputs(family, frozen=False))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_deleting_the_last_adapter_leaves_no_hook(family: Family) -> None:
    backbone = bare(family)
    hooks, classes = Trace.of(backbone).hooks, Trace.of(backbone).classes
    model = adapted(family, METHODS["lora"])
    model.add_adapter("b", METHODS["bottleneck-after"])
    for name in ("a", "b"):
        model.delete_adapter(name)
    assert Trace.of(model.backbone).hooks == hooks
    assert Trace.of(model.backbone).classes == classes
