"""FacT, in both of its forms, against the factorised tensor written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import families, tensors, twins
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
from safetensors.torch import load_file

from mmadapters import Average, FacTConfig, LoRAConfig, Route, Split, Stack, init
from mmadapters.sites.sitemap import Leaf

FAMILIES = families()
ALL = ("q", "k", "v", "o", "up", "down")
CONFIGS = {
    "tt": FacTConfig(rank=3, scale=0.7),
    "tk": FacTConfig(rank=3, core=2, scale=0.7),
}
each_form = pytest.mark.parametrize("form", CONFIGS)
NAMES = (
    *("timm-vit", "timm-eva", "timm-eva02-packed", "timm-beit", "hf-vit", "open_clip-clip"),
    *("open_clip-own_attention", "hf-clip", "hf-blip-vqa", "hf-t5", "hf-wavlm"),
)


class WithFacT(ReferenceViT):
    """W_l + s sum_ij V[:, i] C_l[i, j] U[j, :], with U and V by the width that they meet."""

    def __init__(self, model: Any, config: FacTConfig, name: str = "a") -> None:
        super().__init__(model.backbone, numbers(model, name))
        self.config = config
        self.shared: dict[tuple[str, int], Array] = {}
        for key, value in self.p.items():
            parameter = key.split("/")[1]
            if parameter in ("u", "v"):
                width = value.shape[1 if parameter == "u" else 0]
                assert (parameter, width) not in self.shared
                self.shared[parameter, width] = value

    def linear(self, site: str, x: Array) -> Array:
        weight = self.weight[site]
        if site.rsplit(".", 1)[1] in self.config.targets:
            weight = weight + self.config.scale * self.change(site, *weight.shape)
        return x @ weight.T + self.bias[site]

    def change(self, site: str, out: int, into: int) -> Array:
        u, v, c = self.shared["u", into], self.shared["v", out], self.middle(site)
        total = np.zeros((out, into))
        for i in range(self.config.rank):
            for j in range(self.config.rank):
                total += c[i, j] * np.outer(v[:, i], u[j])
        return total

    def middle(self, site: str) -> Array:
        if self.config.core is None:
            return self.p[f"{site}/c"]
        (core,) = (value for key, value in self.p.items() if key.endswith("/core"))
        return sum(p * k for p, k in zip(self.p[f"{site}/p"], core, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS.values(),
        FacTConfig(rank=1, targets=("v",)),
        FacTConfig(rank=5, core=4, targets=("up", "down")),
        FacTConfig(rank=4, scale=-2.0, targets=("q", "o", "down")),
    ],
    ids=str,
)
def test_adapted_model_is_the_written_out_one(config: FacTConfig) -> None:
    model = adapted(config)
    assert_close(output(model), WithFacT(model, config)())
    assert_acts(model)


@each_form
@pytest.mark.parametrize("name", NAMES)
def test_merged_it_gives_the_same_to_every_library(name: str, form: str) -> None:
    family = FAMILIES[name]
    args, kwargs = doubled(family.inputs())
    model = init(family.build().double())
    model.add_adapter("a", CONFIGS[form])
    randomise(model.adapter("a"), std=0.5)
    with torch.no_grad():
        plain = tensors(model(*args, **kwargs))
        model.set_active_adapters("a")
        acting = tensors(model(*args, **kwargs))
        model.merge_adapter("a")
        encoder = model.detach()
        merged = tensors(encoder(*args, **kwargs))
    assert not any("_mmadapters" in m.__dict__ for m in encoder.modules())
    assert distance(merged, acting) < 1e-9
    assert distance(acting, plain) > 1e-5


@each_form
def test_all_layers_share_what_meets_the_same_width(form: str) -> None:
    model = init(tiny_vit())
    model.add_adapter("a", CONFIGS[form])
    modules = dict(model.adapter("a").entries())
    leaves: dict[str, Leaf] = {leaf.name: leaf for leaf in model.sites.leaves()}
    assert len(modules) == 12
    shared = {}
    for site, module in modules.items():
        leaf = leaves[site]
        for key, tensor in (
            (("u", leaf.in_features), module.u),
            (("v", leaf.out_features), module.v),
        ):
            assert shared.setdefault(key, tensor) is tensor
    assert set(shared) == {("u", 32), ("u", 64), ("v", 32), ("v", 64)}
    own = 12 * 9 if form == "tt" else 12 * 2 + 2 * 9
    (row,) = model.adapter_summary()
    assert (row.sites, row.parameters) == (12, 3 * 2 * (32 + 64) + own)


def test_towers_of_one_width_share_nothing() -> None:
    model = init(FAMILIES["hf-clip"].build())
    model.add_adapter("a", CONFIGS["tk"])
    modules = dict(model.adapter("a").entries())
    vision, text = (modules[f"{tower}.blocks.0.attn.q"] for tower in ("vision", "text"))
    assert vision.u.shape == text.u.shape
    for name in ("u", "v", "core"):
        assert getattr(vision, name) is not getattr(text, name)


@each_form
def test_the_file_holds_shared_parameters_once(form: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[form])
    model.save_adapter(tmp_path / "a", "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        p.numel() for p in model.adapter("a").parameters()
    )
    other = init(tiny_vit())
    other.load_adapter(tmp_path / "a")
    other.set_active_adapters("a")
    assert_close(output(other), output(model), 1e-15)


@each_form
@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("twin", twins.TWINS, ids=lambda twin: f"{twin.source}-{twin.target}")
def test_one_file_serves_the_same_weights_in_another_library(
    twin: twins.Twin, back: bool, form: str, tmp_path: Path
) -> None:
    twins.assert_alike(*twin.either_way(back=back), tmp_path, CONFIGS[form], std=0.2)


@each_form
def test_a_fresh_one_learns_all_that_it_has(form: str) -> None:
    """V starts at zero and gets a gradient; the others get theirs as soon as it has moved."""
    model = init(tiny_vit())
    model.add_adapter("a", CONFIGS[form])
    module = dict(model.adapter("a").entries())["vision.blocks.0.attn.q"]
    assert not module.v.any()
    assert all(p.any() for name, p in module.named_parameters() if name != "v")
    model.train_adapter("a")
    optimizer = torch.optim.SGD(model.adapter("a").parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 16, 16, dtype=torch.float64)) ** 2).mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.adapter("a").parameters())


def test_compositions_hold_it() -> None:
    model = adapted(CONFIGS["tt"], CONFIGS["tk"], LoRAConfig(rank=2))
    alone = {}
    for name in ("a", "b", "base"):
        with model.using(name):
            alone[name] = output(model)
    with model.using(Route(["b", "base"])):
        assert_close(output(model), np.stack([alone["b"][0], alone["base"][1]]))
    with model.using(Split("a", "b", splits=(5, 0))):
        assert_close(output(model), alone["a"])
    with model.using(Average("a", "b", weights=(0, 1))):
        assert_close(output(model), alone["b"])
    with model.using(Stack("a", "b", "c")):
        forth = output(model)
    with model.using(Stack("c", "b", "a")):
        assert_close(output(model), forth)


def test_sums_of_its_factors_need_weights_of_sum_one() -> None:
    model = adapted(CONFIGS["tt"], CONFIGS["tt"])
    with pytest.raises(
        ValueError, match="must sum to 1 where how='linear' sums the factors of fact"
    ):
        model.average_adapter("c", ["a", "b"], (1, -1))
    model.average_adapter("c", ["a", "b"], (2, -1))
    a, b, c = (numbers(model, name) for name in "abc")
    for key, value in c.items():
        assert_close(value, 2 * a[key] - b[key], 1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"core": 0}, "core must be a whole number of at least 1"),
        ({"scale": 0.0}, "scale must not be 0"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": "q"}, r"targets=\('q',\)"),
        ({"targets": ("quer",)}, "targets must be one of .* not 'quer'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FacTConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            FacTConfig(rank=33),
            r"rank 33 is larger than vision.blocks.0.attn.q is wide \(32 -> 32\)",
        ),
        (FacTConfig(targets=("gate",)), "has no linear map 'gate' under sites="),
        (FacTConfig(sites=("*.ffn",)), "has no linear map 'q' under sites="),
    ],
    ids=str,
)
def test_what_does_not_fit_the_encoder_is_refused(config: FacTConfig, message: str) -> None:
    model = init(tiny_vit())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config)
