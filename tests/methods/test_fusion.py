"""AdapterFusion against the formulas of Pfeiffer et al. 2021, section 3.2, and its life."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families.small import randomise
from injection.matrix import loss_of, same_state, state
from methods.reference import (
    ACTIVATIONS,
    ATTN_SITES,
    FFN_SITES,
    Array,
    ReferenceViT,
    adapted,
    assert_acts,
    assert_close,
    images,
    numbers,
    output,
    softmax,
)

from mmadapters import (
    AdapterModel,
    Average,
    BottleneckConfig,
    Fuse,
    FusionConfig,
    ParallelPlacement,
    SeqBnConfig,
    SequentialPlacement,
    Stack,
)

AFTER = SequentialPlacement(residual="after")
MIXES: dict[str, tuple[BottleneckConfig, ...]] = {
    "equal": (BottleneckConfig(size=4), BottleneckConfig(size=4)),
    "sizes": (BottleneckConfig(size=3), BottleneckConfig(size=7), BottleneckConfig(size=4)),
    "after": (BottleneckConfig(size=4, placement=AFTER), BottleneckConfig(size=5, placement=AFTER)),
    "scales": (
        BottleneckConfig(size=4, scale=2.5),
        BottleneckConfig(size=3, learn_scale="scalar"),
        BottleneckConfig(size=5, learn_scale="channel"),
    ),
    "placements": (
        BottleneckConfig(size=4),
        BottleneckConfig(size=3, placement=AFTER),
        BottleneckConfig(
            size=5, placement=ParallelPlacement(at=("attn", "ffn"), input="residual"), scale=0.5
        ),
    ),
    "activations": (BottleneckConfig(size=4, activation="gelu"), BottleneckConfig(size=4)),
    "one-absent": (BottleneckConfig(size=4), SeqBnConfig(size=5)),
    "one-site": (
        BottleneckConfig(size=4, sites=("vision.blocks.1.ffn",)),
        BottleneckConfig(size=6, sites=("vision.blocks.1.ffn",)),
    ),
}  # fmt: skip
FOLDED = {"equal", "sizes", "after", "scales", "one-site"}
each_mix = pytest.mark.parametrize("mix", MIXES)


class FusedViT(ReferenceViT):
    """Q, K and V for every adapter on its own, as the paper writes them."""

    def __init__(self, model: AdapterModel, members: str) -> None:
        super().__init__(model.backbone)
        self.members = [(model.adapter(name).config, numbers(model, name)) for name in members]
        (fusion,) = model.fusion_names
        self.attention_ = {
            key.replace("#fusion", ""): tensor.detach().numpy()
            for key, tensor in model.fusions._modules[fusion].tensors().items()  # type: ignore[union-attr, operator]
        }
        self.seen: dict[str, Array] = {}

    def change(self, config: Any, p: dict[str, Array], site: str, u: Array, x: Array) -> Array:
        if isinstance(config.placement, ParallelPlacement):
            h = x
        else:
            h = x + u if config.placement.residual == "after" else u
        h = ACTIVATIONS[config.activation](h @ p[f"{site}/down.weight"].T + p[f"{site}/down.bias"])
        return (h @ p[f"{site}/up.weight"].T + p[f"{site}/up.bias"]) * p.get(
            f"{site}/scale", config.scale
        )

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        present = [(c, p) for c, p in self.members if f"{site}/down.weight" in p]
        if not present:
            return u
        z = np.stack([self.change(c, p, site, u, x) for c, p in present], axis=2)  # (B, N, n, D)
        a = {key: self.attention_[f"{site}/{key}"] for key in ("query.weight", "query.bias")}
        query = (x + u) @ a["query.weight"].T + a["query.bias"]
        key = z @ self.attention_[f"{site}/key.weight"].T
        value = z @ self.attention_[f"{site}/value.weight"].T
        weights = softmax(np.einsum("bnd,bnkd->bnk", query, key))
        self.seen[site] = weights.mean(axis=(0, 1))
        return u + np.einsum("bnk,bnkd->bnd", weights, value)


def fused(mix: str) -> AdapterModel:
    """The reference's model in float64 with random members a, b, .. fused and active."""
    model = adapted(*MIXES[mix])
    model.add_adapter_fusion(list(model.adapter_names))
    randomise(model.fusions, 0.2)
    model.set_active_adapters(Fuse(*model.adapter_names))
    return model


@each_mix
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_fusion_is_the_papers(mix: str, grad: bool) -> None:
    model = fused(mix)
    expected = FusedViT(model, "".join(model.adapter_names))()
    with torch.set_grad_enabled(grad):
        found = model(images()).detach().numpy()
    assert_close(found, expected)
    assert_acts(model)
    with model.using(Average(*model.adapter_names)):
        assert np.abs(output(model) - expected).max() > 1e-4


@each_mix
def test_inference_multiplies_no_matrix_as_wide_as_the_encoder_where_it_folds(mix: str) -> None:
    """What folds never calls the fusion's own maps."""
    model = fused(mix)
    calls: list[Any] = []
    for module in model.fusions.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    output(model)
    assert (len(calls) == 0) is (mix in FOLDED)
    model(images())
    assert len(calls) > 0


def test_stack_hands_the_fusion_what_its_first_member_left() -> None:
    model = adapted(*(BottleneckConfig(size=size) for size in (3, 4, 5)))
    model.add_adapter_fusion(["b", "c"])
    randomise(model.fusions, 0.2)
    first = numbers(model, "a")

    class Forth(FusedViT):
        def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
            config = BottleneckConfig(size=3)
            return super().branch(site, u + self.change(config, first, site, u, x), x, n)

    class Back(FusedViT):
        def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
            u = super().branch(site, u, x, n)
            return u + self.change(BottleneckConfig(size=3), first, site, u, x)

    forth, back = Forth(model, "bc")(), Back(model, "bc")()
    assert np.abs(forth - back).max() > 1e-4
    model.set_active_adapters(Stack("a", Fuse("b", "c")))
    assert_close(output(model), forth)
    model.set_active_adapters(Stack(Fuse("b", "c"), "a"))
    assert_close(output(model), back)


def test_fused_stack_is_one_member_that_adds_what_all_of_it_adds() -> None:
    model = adapted(*(BottleneckConfig(size=size) for size in (3, 4, 5)))
    composition = Fuse("a", Stack("b", "c"))
    assert model.add_adapter_fusion(composition) == "a,b>c"
    # Fresh keys and queries set to zero give equal weights, and the value matrix is the identity.
    for name, parameter in model.fusions.named_parameters():
        if "value" not in name:
            torch.nn.init.zeros_(parameter)
    with model.using(composition):
        found = output(model)
    with model.using(Average("a", Stack("b", "c"))):
        assert_close(found, output(model))


@pytest.mark.parametrize("mix", ["equal", "placements"])
def test_fresh_fusion_averages_what_its_members_add_but_for_its_small_scores(mix: str) -> None:
    model = adapted(*MIXES[mix])
    name = model.add_adapter_fusion(list(model.adapter_names))
    for site, module in model.fusions._modules[name].entries():  # type: ignore[union-attr, operator]
        assert torch.equal(module.value.weight, torch.eye(32, dtype=torch.float64)), site
        assert not module.query.bias.any()
        for linear in (module.query, module.key):
            assert 0.015 < float(linear.weight.std()) < 0.025
    with model.using(Average(*model.adapter_names)):
        mean = output(model)
    with model.using(Fuse(*model.adapter_names)):
        assert np.abs(output(model) - mean).max() < 0.05


@each_mix
def test_recorded_weights_are_the_papers_and_add_up_to_one(mix: str) -> None:
    model = fused(mix)
    reference = FusedViT(model, "".join(model.adapter_names))
    reference()
    for grad in (False, True):
        with model.recorded_fusion() as record, torch.set_grad_enabled(grad):
            assert dict(record) == {}
            model(images())
            model(images())
        (weights,) = record.values()
        assert set(weights) == set(reference.seen)
        for site, found in weights.items():
            present = [
                any(key.startswith(f"{site}/") for key in numbers(model, name))
                for name in model.adapter_names
            ]
            assert found.isnan().tolist() == [not here for here in present]
            assert float(found.nansum()) == pytest.approx(1, abs=1e-6)
            seen = found[~found.isnan()].double().numpy()
            assert_close(seen, reference.seen[site], 1e-6)
    with model.recorded_fusion() as record, model.using("a"):
        model(images())
    assert dict(record) == {}


def test_one_absent_member_is_unknown_where_only_the_other_acts() -> None:
    model = fused("one-absent")
    with model.recorded_fusion() as record:
        output(model)
    assert all(record["a,b"][site].isnan().tolist() == [False, True] for site in ATTN_SITES)
    assert not any(record["a,b"][site].isnan().any() for site in FFN_SITES)


@pytest.mark.parametrize("mix", ["sizes", "placements"])
def test_training_a_fusion_moves_its_three_maps_and_nothing_else(mix: str) -> None:
    model = fused(mix)
    randomise(model.fusions, 0.1)
    members, trunk = state(model.adapters), state(model.backbone)
    before = state(model.fusions)
    model.train_adapter_fusion(list(model.adapter_names))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == {f"fusions.{name}" for name, _ in model.fusions.named_parameters()}
    assert {name.split("/")[-1].split(".", 1)[1] for name in wanted} == {
        "query.weight", "query.bias", "key.weight", "value.weight",
    }  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of([model(images())]) + model.fusion_penalty()).backward()
        optimizer.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == wanted
    assert same_state(model.adapters, members)
    assert same_state(model.backbone, trunk)
    now = state(model.fusions)
    assert not any(torch.equal(now[key], value) for key, value in before.items())
    model.train_adapter("a")
    assert not any(p.requires_grad for p in model.fusions.parameters())


def test_penalty_is_the_squared_distance_of_the_value_maps_from_the_identity() -> None:
    model = adapted(*MIXES["equal"], BottleneckConfig(size=3))
    model.add_adapter_fusion(["a", "b"], FusionConfig(regularization=0.5))
    model.add_adapter_fusion(["b", "c"])
    assert model.fusion_penalty().item() == 0
    randomise(model.fusions, 0.2)
    for members, factor in ((("a", "b"), 0.5), (("b", "c"), 0.01)):
        model.train_adapter_fusion(members)
        values = [
            p.detach().numpy()
            for name, p in model.fusions.named_parameters()
            if "value" in name and p.requires_grad
        ]
        assert len(values) == 4
        expected = factor * sum(((value - np.eye(32)) ** 2).sum() for value in values)
        assert model.fusion_penalty().item() == pytest.approx(float(expected), rel=1e-5)
        model.fusion_penalty().backward()
        assert all(
            (p.grad is not None) is (p.requires_grad and "value" in name)
            for name, p in model.fusions.named_parameters()
        )
        model.zero_grad()
    model.train_adapter("a")
    assert model.fusion_penalty().item() == 0


def test_dropout_acts_on_the_weights_in_training_alone() -> None:
    model = adapted(*MIXES["equal"])
    model.add_adapter_fusion(["a", "b"], FusionConfig(dropout=0.5))
    model.train_adapter_fusion(["a", "b"])
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


@pytest.mark.parametrize("what", ["a.down", "b.up", "query", "key", "value"])
def test_folded_fusion_follows_every_change_of_a_parameter(what: str) -> None:
    model = fused("equal")
    before = output(model)
    *owner, part = what.split(".")
    held = model.adapter(owner[0]) if owner else model.fusions
    changed = [p for key, p in held.named_parameters() if part in key]
    with torch.no_grad():
        for parameter in changed:
            parameter.mul_(1.5)
    assert np.abs(output(model) - before).max() > 1e-6
    assert_close(output(model), FusedViT(model, "ab")())
    for parameter in changed:  # Another memory, as after `.to` or `load_state_dict(assign=True)`.
        parameter.data = 0.5 * parameter.data
    assert_close(output(model), FusedViT(model, "ab")())


def test_folded_fusion_follows_the_dtype() -> None:
    model = fused("sizes")
    before = output(model)
    model.to(torch.float32)
    with torch.no_grad():
        single = model(images().float())
    assert single.dtype == torch.float32
    assert_close(single.double().numpy(), before, 1e-4)
    model.to(torch.float64)
    # The bits that float32 took do not come back.
    assert 1e-12 < np.abs(output(model) - before).max() < 1e-4
    assert_close(output(model), FusedViT(model, "abc")())
    with torch.inference_mode():
        assert_close(model(images()).numpy(), output(model), 1e-12)
