"""Compacter: bottlenecks whose projections are sums of Kronecker products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from methods.reference import (
    FFN_SITES,
    Array,
    ReferenceViT,
    adapted,
    assert_acts,
    assert_close,
    gelu,
    numbers,
    output,
    randomise,
    tiny_vit,
)
from torch import nn
from torch.func import functional_call

from mmadapters import CompacterConfig, ParallelPlacement, init
from mmadapters.methods.compacter import KroneckerLinear
from mmadapters.sites.acting import Context
from mmadapters.sites.tables import describe

LIKE = {"dtype": torch.float64, "device": torch.device("cpu")}


def written_out(rule: Array, left: Array, right: Array) -> Array:
    """sum_i A_i (x) (s_i t_i^T) with np.kron, (in, out)."""
    return sum(np.kron(rule[i], left[i] @ right[i]) for i in range(len(rule)))


class WithCompacter(ReferenceViT):
    def projected(self, place: str, h: Array) -> Array:
        weight = written_out(self.rule(), self.p[f"{place}.left"], self.p[f"{place}.right"])
        return h @ weight + self.p[f"{place}.bias"]

    def rule(self) -> Array:
        (rule,) = (value for key, value in self.p.items() if key.endswith(".rule"))
        return rule

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        return u + self.projected(f"{site}/up", gelu(self.projected(f"{site}/down", u)))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("n", "into", "out"), [(4, 32, 8), (2, 6, 4), (1, 5, 3), (3, 9, 12)])
def test_projection_is_the_sum_of_kronecker_products(
    n: int, into: int, out: int, rank: int
) -> None:
    rule = nn.Parameter(torch.randn(n, n, n, dtype=torch.float64))
    module = KroneckerLinear(into, out, rule, rank=rank, like=LIKE)
    randomise(module)
    x = torch.randn(2, 5, into, dtype=torch.float64)
    weight = written_out(*(t.detach().numpy() for t in (rule, module.left, module.right)))
    assert weight.shape == (into, out)
    with torch.no_grad():
        assert_close(module(x).numpy(), x.numpy() @ weight + module.bias.numpy(), 1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_adapted_model_is_the_written_out_one(rank: int) -> None:
    model = adapted(CompacterConfig(reduction_factor=8, phm_rank=rank))
    randomise(model.adapter("a"), std=0.7)
    assert_close(output(model), WithCompacter(model.backbone, numbers(model))())
    assert_acts(model)


def test_gradients_of_input_and_parameters_are_right() -> None:
    rule = nn.Parameter(torch.randn(2, 2, 2, dtype=torch.float64))
    module = KroneckerLinear(4, 6, rule, rank=2, like=LIKE)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_one_rule_serves_every_site_and_is_counted_once() -> None:
    model = init(tiny_vit())
    model.add_adapter("a", CompacterConfig(reduction_factor=8, placement=ParallelPlacement()))
    modules = [module for _, module in model.adapter("a").entries()]
    assert len({id(m.down.rule) for m in modules} | {id(m.up.rule) for m in modules}) == 1
    # Each projection has n (in/n + out/n) = in + out numbers and its bias.
    own = len(FFN_SITES) * ((32 + 4) + 4 + (4 + 32) + 32)
    assert sum(p.numel() for p in model.adapter("a").parameters()) == own + 4**3
    assert sum("rule" in key for key in model.adapter("a").tensors()) == 1


def test_fresh_up_projection_is_zero_and_can_learn() -> None:
    model = init(tiny_vit())
    model.add_adapter("a", CompacterConfig(reduction_factor=8))
    for _, module in model.adapter("a").entries():
        assert not module.up.left.any()
        assert all(p.any() for p in (module.up.right, module.down.left, module.down.right))
        assert module.down.rule.any()


def test_rule_follows_blocks_of_different_dtypes() -> None:
    vit = tiny_vit().float()
    sites = describe(vit)[0]
    vit.blocks[1].bfloat16()
    modules = CompacterConfig(reduction_factor=8).build(sites)
    module = modules["vision.blocks.1.ffn"]
    assert module.down.left.dtype == torch.bfloat16
    branch = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    assert module(branch, Context()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phm_dim": 0}, "phm_dim must be a whole number"),
        ({"phm_dim": 2.0}, "phm_dim must be a whole number"),
        ({"phm_rank": -1}, "phm_rank must be a whole number"),
        ({"size": 8, "reduction_factor": 4}, "not as both"),
        ({"activation": "swish"}, "activation must be one of"),
    ],
    ids=str,
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompacterConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CompacterConfig(), "phm_dim 4 does not divide the bottleneck 1 of vision.blocks.0.attn"),
        (CompacterConfig(size=6), "phm_dim 4 does not divide the bottleneck 6"),
        (CompacterConfig(size=10, phm_dim=5), "phm_dim 5 does not divide the width 32"),
    ],
    ids=["factor", "size", "width"],
)
def test_indivisible_sizes_are_refused_and_nothing_is_added(
    config: CompacterConfig, message: str
) -> None:
    model = init(tiny_vit())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config)
    assert model.adapter_names == ()
