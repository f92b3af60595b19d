"""IA3, SSF and BitFit against their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import families, tensors
from injection.composing import doubled
from injection.matrix import distance
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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from mmadapters import BitFitConfig, IA3Config, MethodConfig, SSFConfig, Stack, init
from mmadapters.methods import Delta
from mmadapters.sites.sitemap import Leaf
from mmadapters.sites.tables import describe

FAMILIES = families()

LEAVES = (*(f"attn.{leaf}" for leaf in "qkvo"), "ffn.up", "ffn.down", "attn.norm", "ffn.norm")
EVERY_LEAF = {f"vision.blocks.{i}.{leaf}" for i in (0, 1) for leaf in LEAVES} | {"vision.norm"}


class WithIA3(ReferenceViT):
    """l * (W x + b) behind every map but down; W (l * x) + b there."""

    def linear(self, site: str, x: Array) -> Array:
        scale = self.p.get(f"{site}/scale")
        if scale is None:
            return super().linear(site, x)
        if site.endswith("down"):
            return super().linear(site, scale * x)
        return scale * super().linear(site, x)


class WithSSF(ReferenceViT):
    def linear(self, site: str, x: Array) -> Array:
        return self.p[f"{site}/scale"] * super().linear(site, x) + self.p[f"{site}/shift"]

    def norm(self, site: str, x: Array) -> Array:
        return self.p[f"{site}/scale"] * super().norm(site, x) + self.p[f"{site}/shift"]


class WithBitFit(ReferenceViT):
    def linear(self, site: str, x: Array) -> Array:
        y = super().linear(site, x)
        # A bias of keys shifts all scores of a query alike; this one would show if it did not.
        return y + (1.5 if site.endswith(".k") else self.p[f"{site}/bias"])

    def norm(self, site: str, x: Array) -> Array:
        return super().norm(site, x) + self.p[f"{site}/bias"]


@pytest.mark.parametrize(
    ("config", "written_out"),
    [
        (IA3Config(), WithIA3),
        *((IA3Config(targets=(target,)), WithIA3) for target in ("q", "k", "v", "o", "up", "down")),
        (SSFConfig(), WithSSF),
        (BitFitConfig(), WithBitFit),
    ],
    ids=str,
)
def test_adapted_model_is_the_written_out_one(config: MethodConfig, written_out: type) -> None:
    model = adapted(config)
    assert_close(output(model), written_out(model.backbone, numbers(model))())
    assert_acts(model)


def leaf_named(name: str) -> Leaf:
    return next(leaf for leaf in describe(tiny_vit())[0].leaves() if leaf.name == name)


MODULES = [
    (IA3Config(), "vision.blocks.0.attn.k"),
    (IA3Config(), "vision.blocks.0.ffn.down"),
    (SSFConfig(), "vision.blocks.0.attn.v"),
    (SSFConfig(), "vision.blocks.0.ffn.norm"),
    (BitFitConfig(), "vision.blocks.0.attn.q"),
    (BitFitConfig(), "vision.norm"),
]


def module_at(config: MethodConfig, site: str) -> Delta:
    module = config.build(describe(tiny_vit())[0])[site]
    assert isinstance(module, Delta)
    randomise(module)
    return module


def through(leaf: Leaf, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if leaf.kind == "norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)
    assert weight is not None
    return F.linear(x, weight, bias)


@pytest.mark.parametrize(("config", "site"), MODULES, ids=str)
def test_module_means_the_same_on_activations_and_as_a_weight(
    config: MethodConfig, site: str
) -> None:
    leaf, module = leaf_named(site), module_at(config, site)
    x = torch.randn(2, 5, leaf.in_features, dtype=torch.float64)
    assert leaf.weight is not None
    with torch.no_grad():
        entered = module.enter(x)
        acting = module(through(leaf, entered, leaf.weight, leaf.bias), entered, leaf)
        as_weight = through(leaf, x, *module.effective(leaf.weight, leaf.bias, leaf))
    assert_close(acting.numpy(), as_weight.numpy(), 1e-12)
    assert not torch.equal(acting, through(leaf, x, leaf.weight, leaf.bias))


@pytest.mark.parametrize(("config", "site"), MODULES, ids=str)
def test_gradients_of_input_and_parameters_are_right(config: MethodConfig, site: str) -> None:
    leaf, module = leaf_named(site), module_at(config, site)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(2, leaf.in_features, dtype=torch.float64, requires_grad=True)

    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.delta = module

        def forward(self, x: Tensor) -> Tensor:
            entered = self.delta.enter(x)
            y = through(leaf, entered, leaf.weight, leaf.bias)
            return self.delta(y, entered, leaf)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"delta.{name}": p for name, p in zip(names, parameters, strict=True)}
        return functional_call(Applied(), named, (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


IA3_LEAVES = ("attn.k", "attn.v", "ffn.down")


@pytest.mark.parametrize(
    ("config", "sites"),
    [
        (SSFConfig(), EVERY_LEAF),
        (BitFitConfig(), {site for site in EVERY_LEAF if not site.endswith(".k")}),
        (IA3Config(), {f"vision.blocks.{i}.{leaf}" for i in (0, 1) for leaf in IA3_LEAVES}),
        (SSFConfig(sites=("vision.norm",)), {"vision.norm"}),
        (BitFitConfig(sites=("*.1.ffn.u*",)), {"vision.blocks.1.ffn.up"}),
    ],
    ids=["ssf", "bitfit", "ia3", "ssf-final-norm", "bitfit-up"],
)
def test_method_stands_at_every_site_of_its_paper_within_its_bounds(
    config: MethodConfig, sites: set[str]
) -> None:
    assert set(config.build(describe(tiny_vit())[0])) == sites


def test_fresh_scales_are_one_and_shifts_zero() -> None:
    for config in (IA3Config(), SSFConfig(), BitFitConfig()):
        model = init(tiny_vit())
        model.add_adapter("a", config)
        found = numbers(model)
        assert found
        for key, value in found.items():
            assert (value == float(key.endswith("scale"))).all(), key


def test_biases_that_are_not_there_are_passed_over_or_refused() -> None:
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, qkv_bias=False
    )
    assert not {"vision.blocks.0.attn.q", "vision.blocks.0.attn.k"} & set(
        BitFitConfig().build(describe(vit)[0])
    )
    with pytest.raises(ValueError, match="VisionTransformer has no bias under sites="):
        BitFitConfig(sites=("*.q", "*.k", "*.v")).build(describe(vit)[0])


def test_ssf_shifts_a_linear_map_that_has_no_bias_but_cannot_be_merged_there() -> None:
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, qkv_bias=False
    )
    model = init(vit)
    model.add_adapter("a", SSFConfig(sites=("*.q",)))
    randomise(model.adapter("a"))
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(ValueError, match=r"vision\.blocks\.0\.attn\.q has no parameter to hold"):
        model.merge_adapter("a")
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-post", "hf-vit", "open_clip-clip"])
def test_ssf_merges_into_norms_and_linear_maps_alike(name: str) -> None:
    """W' = diag(g) W, b' = g b + t; a norm's weight is the diagonal of its W."""
    family = FAMILIES[name]
    args, kwargs = doubled(family.inputs())
    model = init(family.build().double())
    model.add_adapter("a", SSFConfig())
    randomise(model.adapter("a"))
    model.set_active_adapters("a")
    p = numbers(model)
    expected = {}
    for leaf in model.sites.leaves():
        assert leaf.weight is not None
        assert leaf.bias is not None
        weight, bias = leaf.weight.detach().numpy(), leaf.bias.detach().numpy()
        scale, shift = p[f"{leaf.name}/scale"], p[f"{leaf.name}/shift"]
        rows = scale if leaf.kind == "norm" else scale[:, None]
        expected[leaf.name] = rows * weight, scale * bias + shift
    with torch.no_grad():
        acting = tensors(model(*args, **kwargs))
        model.merge_adapter("a")
        encoder = model.detach()
        merged = tensors(encoder(*args, **kwargs))
    assert distance(merged, acting) < 1e-9
    leaves = list(describe(encoder)[0].leaves())
    assert {leaf.kind for leaf in leaves} == {"linear", "norm"}
    for leaf in leaves:
        assert_close(leaf.weight.detach().numpy(), expected[leaf.name][0], 1e-12)
        assert_close(leaf.bias.detach().numpy(), expected[leaf.name][1], 1e-12)
    assert not any(m._forward_hooks or "_mmadapters" in m.__dict__ for m in encoder.modules())


def test_stack_of_scale_and_shift_acts_in_its_order() -> None:
    model = adapted(SSFConfig(), BitFitConfig())
    ssf, bitfit = numbers(model, "a"), numbers(model, "b")

    class ShiftThenScale(ReferenceViT):
        def _then(self, site: str, y: Array) -> Array:
            shifted = y + bitfit.get(f"{site}/bias", 0)
            return ssf[f"{site}/scale"] * shifted + ssf[f"{site}/shift"]

        def linear(self, site: str, x: Array) -> Array:
            return self._then(site, super().linear(site, x))

        def norm(self, site: str, x: Array) -> Array:
            return self._then(site, super().norm(site, x))

    forth = output(model)
    model.set_active_adapters(Stack("b", "a"))
    assert_close(output(model), ShiftThenScale(model.backbone)())
    assert np.abs(output(model) - forth).max() > 1e-4


def test_input_and_output_changes_of_one_map_multiply_the_right_sides() -> None:
    """IA3 scales what enters `down` also where LoRA-like changes of the same map are active."""
    model = adapted(IA3Config(targets=("down",)), SSFConfig(sites=("*.down",)))
    ia3, ssf = numbers(model, "a"), numbers(model, "b")

    class Both(ReferenceViT):
        def linear(self, site: str, x: Array) -> Array:
            if not site.endswith("down"):
                return super().linear(site, x)
            y = super().linear(site, ia3[f"{site}/scale"] * x)
            return ssf[f"{site}/scale"] * y + ssf[f"{site}/shift"]

    expected = Both(model.backbone)()
    assert_close(output(model), expected)
    model.set_active_adapters(Stack("b", "a"))
    assert_close(output(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ()}, "targets is empty"),
        ({"targets": "down"}, r"targets=\('down',\)"),
        ({"targets": ("norm",)}, "targets must be one of .* not 'norm'"),
    ],
    ids=str,
)
def test_ia3_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IA3Config(**options)


@pytest.mark.parametrize("cls", [IA3Config, SSFConfig, BitFitConfig])
def test_sites_must_be_patterns(cls: type) -> None:
    with pytest.raises(ValueError, match=r"sites=\('vision',\)"):
        cls(sites="vision")
    with pytest.raises(ValueError, match="sites is empty"):
        cls(sites=())
