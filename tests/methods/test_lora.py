"""LoRA, rsLoRA and DoRA against their formulas, on fused and plain linear maps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from methods.reference import (
    Array,
    ReferenceViT,
    adapted,
    assert_acts,
    assert_close,
    numbers,
    output,
    randomise,
    tiny_vit,
)
from torch.func import functional_call

from mmadapters import ConfigUnion, DoRAConfig, IA3Config, LoRAConfig, SSFConfig, Stack, init
from mmadapters.methods.lora import LoRA
from mmadapters.sites.sitemap import Leaf
from mmadapters.sites.tables import describe

ALL = ("q", "k", "v", "o", "up", "down")


def leaf_named(name: str) -> Leaf:
    return next(leaf for leaf in describe(tiny_vit())[0].leaves() if leaf.name == name)


def scaling(config: LoRAConfig) -> float:
    alpha = config.rank if config.alpha is None else config.alpha
    return alpha / np.sqrt(config.rank) if config.rslora else alpha / config.rank


class WithLoRA(ReferenceViT):
    """y = (W + c B A) x + b"""

    def __init__(self, model: Any, config: LoRAConfig, name: str = "a") -> None:
        super().__init__(model.backbone, numbers(model, name))
        self.c = scaling(config)

    def linear(self, site: str, x: Array) -> Array:
        if f"{site}/a" not in self.p:
            return super().linear(site, x)
        return x @ self.changed(site).T + self.bias[site]

    def changed(self, site: str) -> Array:
        return self.weight[site] + self.c * self.p[f"{site}/b"] @ self.p[f"{site}/a"]


class WithDoRA(WithLoRA):
    """y = m (V / ||V||) x + b,  V = W + c B A, one row at a time."""

    def changed(self, site: str) -> Array:
        direction = super().changed(site)
        magnitude = self.p[f"{site}/magnitude"]
        rows = [
            m * row / np.sqrt((row**2).sum()) for m, row in zip(magnitude, direction, strict=True)
        ]
        return np.stack(rows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 8}, 1.0),
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 4, "alpha": 1}, 0.25),
        ({"rank": 16, "rslora": True}, 4.0),
        ({"rank": 16, "alpha": 8, "rslora": True}, 2.0),
    ],
    ids=str,
)
def test_scaling_is_alpha_over_rank_or_over_its_root(options: dict, expected: float) -> None:
    assert LoRAConfig(**options).scaling == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("targets", [*((target,) for target in ALL), ("q", "v"), ALL], ids=str)
@pytest.mark.parametrize("cls", [LoRAConfig, DoRAConfig])
def test_adapted_model_is_the_written_out_one(cls: type, targets: tuple[str, ...]) -> None:
    config = cls(rank=3, alpha=6, targets=targets)
    model = adapted(config)
    written_out = {LoRAConfig: WithLoRA, DoRAConfig: WithDoRA}[cls]
    assert_close(output(model), written_out(model, config)())
    assert_acts(model)


@pytest.mark.parametrize("cls", [LoRAConfig, DoRAConfig])
def test_rslora_scale_is_the_one_that_acts(cls: type) -> None:
    config = cls(rank=4, alpha=3, rslora=True)
    model = adapted(config)
    written_out = {LoRAConfig: WithLoRA, DoRAConfig: WithDoRA}[cls]
    assert_close(output(model), written_out(model, config)())


def test_a_part_of_a_fused_map_leaves_the_other_parts_alone() -> None:
    model = adapted(LoRAConfig(targets=("k",)))
    qkv = model.backbone.blocks[0].attn.qkv
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        acting = qkv(x).chunk(3, dim=-1)
        with model.using(None):
            frozen = qkv(x).chunk(3, dim=-1)
    same = [torch.equal(one, other) for one, other in zip(acting, frozen, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("name", ["vision.blocks.0.attn.k", "vision.blocks.1.ffn.down"])
@pytest.mark.parametrize("cls", [LoRAConfig, DoRAConfig])
def test_module_means_the_same_on_activations_and_as_a_weight(cls: type, name: str) -> None:
    leaf = leaf_named(name)
    module = cls(rank=3, alpha=5).module(leaf)
    randomise(module)
    x = torch.randn(2, 5, leaf.in_features, dtype=torch.float64)
    weight, bias = leaf.weight, leaf.bias
    with torch.no_grad():
        acting = module(torch.nn.functional.linear(x, weight, bias), x, leaf)
        changed, kept = module.effective(weight, bias, leaf)
        assert_close(acting.numpy(), torch.nn.functional.linear(x, changed, kept).numpy(), 1e-12)
    assert torch.equal(kept, bias)


def test_dora_magnitude_starts_as_the_length_of_each_row_of_the_frozen_weight() -> None:
    model = init(tiny_vit())
    model.add_adapter("a", DoRAConfig(targets=ALL))
    weights = ReferenceViT(model.backbone).weight
    found = {key: value for key, value in numbers(model).items() if key.endswith("magnitude")}
    assert len(found) == 2 * len(ALL)
    for key, magnitude in found.items():
        expected = np.sqrt((weights[key.split("/")[0]] ** 2).sum(axis=1))
        assert_close(magnitude, expected, 1e-14)


@pytest.mark.parametrize("cls", [LoRAConfig, DoRAConfig])
def test_fresh_adapter_starts_with_zero_b_and_a_random_within_its_bound(cls: type) -> None:
    module = cls(rank=4).module(leaf_named("vision.blocks.0.ffn.down"))
    assert not module.b.any()
    assert module.a.ne(0).all()
    assert module.a.abs().max() <= 64**-0.5
    assert module.a.abs().max() > 0.8 * 64**-0.5


def call_with(module: LoRA, leaf: Leaf, names: list[str]) -> Any:
    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, leaf.weight, leaf.bias)
        named = dict(zip(names, parameters, strict=True))
        return functional_call(module, named, (y, x, leaf))

    return call


@pytest.mark.parametrize(
    ("cls", "names"), [(LoRAConfig, ["a", "b"]), (DoRAConfig, ["magnitude"])], ids=["lora", "dora"]
)
def test_gradients_of_input_and_parameters_are_right(cls: type, names: list[str]) -> None:
    leaf = leaf_named("vision.blocks.0.attn.v")
    module = cls(rank=2, alpha=3).module(leaf)
    randomise(module)
    values = [getattr(module, name).detach().clone().requires_grad_() for name in names]
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call_with(module, leaf, names), (x, *values), fast_mode=True)


def test_dora_gradients_take_the_row_lengths_as_constant() -> None:
    """Liu et al. 2024, section 4.3."""
    leaf = leaf_named("vision.blocks.0.attn.v")
    module = DoRAConfig(rank=2, alpha=3).module(leaf)
    randomise(module)
    x = torch.randn(3, 32, dtype=torch.float64)
    upstream = torch.randn(3, 32, dtype=torch.float64)
    y = torch.nn.functional.linear(x, leaf.weight, leaf.bias)
    module(y, x, leaf).backward(upstream)
    a, b, m = (getattr(module, name).detach().numpy() for name in ("a", "b", "magnitude"))
    direction = leaf.weight.detach().numpy() + 1.5 * b @ a
    ratio = m / np.sqrt((direction**2).sum(axis=1))
    of_weight = (upstream.numpy() * ratio).T @ x.numpy()
    assert module.b.grad is not None
    assert module.a.grad is not None
    assert_close(module.b.grad.numpy(), 1.5 * of_weight @ a.T, 1e-12)
    assert_close(module.a.grad.numpy(), 1.5 * b.T @ of_weight, 1e-12)


@pytest.mark.parametrize("cls", [LoRAConfig, DoRAConfig])
def test_dropout_acts_in_train_mode_only_and_keeps_the_mean(cls: type) -> None:
    leaf = leaf_named("vision.blocks.0.attn.v")
    module = cls(rank=3, dropout=0.3).module(leaf)
    randomise(module)
    x = torch.randn(1, 32, dtype=torch.float64).expand(40_000, -1)
    with torch.no_grad():
        y = torch.nn.functional.linear(x, leaf.weight, leaf.bias)
        expected = module.eval()(y, x, leaf)
        random = module.train()(y, x, leaf)
    assert torch.allclose(expected, expected[:1].expand_as(expected), rtol=0, atol=1e-12)
    spread = random.std(dim=0)
    assert spread.min() > 0
    assert ((random.mean(dim=0) - expected[0]).abs() < 5 * spread / 40_000**0.5).all()


def test_dropout_makes_a_delta_no_weight_in_train_mode_only() -> None:
    leaf = leaf_named("vision.blocks.0.attn.v")
    for dropout, training in itertools.product((0.0, 0.3), (False, True)):
        module = LoRAConfig(dropout=dropout).module(leaf).train(training)
        assert module.as_weight is not (dropout > 0 and training)


def test_stacked_loras_add_up() -> None:
    first, second = LoRAConfig(rank=2), LoRAConfig(rank=3, targets=("v", "down"), alpha=9)
    model = adapted(first, second)
    b = WithLoRA(model, second, "b")

    class Both(WithLoRA):
        def linear(self, site: str, x: Array) -> Array:
            y = super().linear(site, x)
            if f"{site}/a" in b.p:
                y = y + b.c * x @ b.p[f"{site}/a"].T @ b.p[f"{site}/b"].T
            return y

    assert_close(output(model), Both(model, first)())
    forth = output(model)
    model.set_active_adapters(Stack("b", "a"))
    assert_close(output(model), forth, 1e-12)


@pytest.mark.parametrize(
    "before",
    [LoRAConfig(targets=("k", "down")), IA3Config(), SSFConfig()],
    ids=lambda config: config.method,
)
def test_dora_over_another_method_merges_into_what_it_computes(before: Any) -> None:
    model = adapted(ConfigUnion(before, DoRAConfig(rank=2, targets=("k", "down"))))
    acting = output(model)
    model.merge_adapter("a")
    assert_close(output(model), acting, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": "8"}, "rank must be a whole number"),
        ({"alpha": 0}, "alpha must be above 0, not 0"),
        ({"alpha": -1.0}, "alpha must be above 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": "16"}, "alpha must be a finite number"),
        ({"targets": ()}, "targets is empty: name at least one of q, k, v, o, up, gate, down"),
        ({"targets": "q"}, r"targets=\('q',\)"),
        ({"targets": ("query",)}, "targets must be one of 'q', .* not 'query'"),
        ({"targets": ("q", "norm")}, "targets must be one of .* not 'norm'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dropout": None}, "dropout must be at least 0 and below 1"),
        ({"sites": "vision"}, r"sites=\('vision',\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [LoRAConfig, DoRAConfig])
def test_config_refuses(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(rank=33), "rank 33 is larger than vision.blocks.0.attn.q is wide"),
        (LoRAConfig(targets=("q", "gate")), "VisionTransformer has no linear map 'gate'"),
        (LoRAConfig(targets=("q",), sites=("*.ffn",)), "no linear map 'q' under sites="),
    ],
    ids=["rank", "gate", "sites"],
)
def test_what_the_encoder_cannot_take_is_refused_and_nothing_is_added(
    config: LoRAConfig, message: str
) -> None:
    model = init(tiny_vit())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config)
    assert model.adapter_names == ()
