"""RepAdapter against its formula, on fused, plain and raw linear maps, and folded into them."""

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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmadapters import Average, LoRAConfig, RepAdapterConfig, Route, Split, Stack, init
from mmadapters.sites.tables import describe

FAMILIES = families()
# Fused and plain q, k and v; weights of nn.MultiheadAttention and others that are read, not called;
# gated maps, fused and plain; norms behind; two towers and cross-attention; sound.
NAMES = (
    *(
        "timm-vit",
        "timm-vit-post",
        "timm-dinov2-swiglu",
        "timm-eva02",
        "hf-vit",
        "hf-dinov2-swiglu",
    ),
    *("open_clip-clip", "open_clip-own_attention", "hf-clip", "hf-blip-vqa", "hf-bert", "hf-t5"),
    *("hf-wav2vec2", "torchaudio-wavlm"),
)
CONFIG = RepAdapterConfig(size=6, groups=2, scale=0.7)


def key_of(site: str) -> str:
    """The site under which the adapter of a linear map is kept: the first that shares it."""
    sublayer, role = site.rsplit(".", 1)
    return f"{sublayer}.{'q' if role in 'qkv' else 'up'}"


def blocks(up: Array, groups: int) -> Array:
    """B (D, r) from its blocks, (D, r / groups) one below the other."""
    rows, columns = up.shape
    full = np.zeros((rows, columns * groups))
    for row in range(rows):
        group = row // (rows // groups)
        full[row, group * columns : (group + 1) * columns] = up[row]
    return full


class WithRepAdapter(ReferenceViT):
    """W (x + s (B (A x + a) + b)) + b_W"""

    def __init__(self, model: Any, config: RepAdapterConfig, name: str = "a") -> None:
        super().__init__(model.backbone, numbers(model, name))
        self.config = config

    def linear(self, site: str, x: Array) -> Array:
        key = key_of(site)
        if site.rsplit(".", 1)[1] in ("q", "k", "v", "up"):
            p = {name: self.p[f"{key}/{name}"] for name in ("down", "down_bias", "up", "up_bias")}
            inner = x @ p["down"].T + p["down_bias"]
            shift = inner @ blocks(p["up"], self.config.groups).T + p["up_bias"]
            x = x + self.config.scale * shift
        return super().linear(site, x)


@pytest.mark.parametrize(
    "config",
    [
        RepAdapterConfig(),
        RepAdapterConfig(size=6, groups=1, scale=0.3),
        RepAdapterConfig(size=4, groups=4, scale=2.0),
    ],
    ids=str,
)
def test_adapted_model_is_the_written_out_one(config: RepAdapterConfig) -> None:
    model = adapted(config)
    assert_close(output(model), WithRepAdapter(model, config)())
    assert_acts(model)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_encoder_with_the_weights_of_the_formula(name: str) -> None:
    """W' = W (I + s B A), b' = b_W + s W (B a + b), written into a bare encoder."""
    family = FAMILIES[name]
    model, twin = init(family.build().double()), family.build().double()
    model.add_adapter("a", CONFIG)
    randomise(model.adapter("a"), std=0.2)
    p = numbers(model)
    reached = set()
    for leaf in describe(twin)[0].leaves():
        key = key_of(leaf.name)
        if leaf.role not in ("q", "k", "v", "up", "gate") or f"{key}/down" not in p:
            continue
        reached.add(key)
        assert leaf.weight is not None
        b = blocks(p[f"{key}/up"], CONFIG.groups)
        folded = np.eye(leaf.in_features) + CONFIG.scale * b @ p[f"{key}/down"]
        shift = CONFIG.scale * (b @ p[f"{key}/down_bias"] + p[f"{key}/up_bias"])
        weight = leaf.weight.detach().numpy().copy()
        leaf.weight.data.copy_(torch.from_numpy(weight @ folded))
        extra = torch.from_numpy(weight @ shift)
        if leaf.bias is not None:
            leaf.bias.data.add_(extra)
        else:
            assert not leaf.raw
            leaf.module.register_forward_hook(_adding(extra, leaf.index, leaf.parts))
    assert reached == {key.split("/")[0] for key in p}
    expected = run(twin, name)
    plain = run(model, name)
    model.set_active_adapters("a")
    found = run(model, name)
    assert distance(found, expected) < 1e-9
    assert distance(found, plain) > 1e-5


def _adding(extra: Tensor, index: int, parts: int) -> Any:
    """A hook that adds to one part of a map without a bias."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        pieces = list(output.chunk(parts, dim=-1))
        pieces[index] = pieces[index] + extra
        return torch.cat(pieces, dim=-1)

    return hook


def run(model: nn.Module, name: str) -> list[Tensor]:
    args, kwargs = doubled(FAMILIES[name].inputs())
    with torch.no_grad():
        return [tensor for tensor in tensors(model(*args, **kwargs)) if tensor.dtype != torch.bool]


class Operations(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "open_clip-clip", "timm-dinov2-swiglu"])
def test_merged_it_costs_no_operation_and_leaves_no_module(name: str) -> None:
    family = FAMILIES[name]
    args, kwargs = family.inputs()
    frozen = family.build().requires_grad_(False)
    with torch.no_grad(), Operations() as bare:
        frozen(*args, **kwargs)
    model = init(family.build())
    model.add_adapter("a", CONFIG)
    randomise(model.adapter("a"), std=0.1)
    model.set_active_adapters("a")
    with torch.no_grad():
        acting = tensors(model(*args, **kwargs))
    model.merge_adapter("a")
    encoder = model.detach().requires_grad_(False)
    assert not list(model.adapters.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    with torch.no_grad(), Operations() as merged:
        found = tensors(encoder(*args, **kwargs))
    assert merged.names == bare.names
    for one, other in zip(found, acting, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_one_adapter_serves_the_maps_that_read_the_same() -> None:
    model = init(FAMILIES["timm-dinov2-swiglu"].build())
    model.add_adapter("a", CONFIG)
    by_site = dict(model.adapter("a").entries())
    assert len(by_site) == 10
    for block in ("vision.blocks.0", "vision.blocks.1"):
        q, k, v = (by_site[f"{block}.attn.{role}"] for role in "qkv")
        assert q is k is v
        assert by_site[f"{block}.ffn.up"] is by_site[f"{block}.ffn.gate"] is not q
    assert len({id(module) for module in by_site.values()}) == 4
    each = 32 * 6 + 6 + 32 * 3 + 32
    (row,) = model.adapter_summary()
    assert (row.sites, row.parameters) == (10, 4 * each)


def test_the_file_holds_shared_parameters_once(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    model.save_adapter(tmp_path / "a", "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert {key.split("#")[0] for key in stored} == {
        f"vision.blocks.{index}.{leaf}" for index in (0, 1) for leaf in ("attn.q", "ffn.up")
    }
    other = init(tiny_vit())
    other.load_adapter(tmp_path / "a")
    other.set_active_adapters("a")
    assert_close(output(other), output(model), 1e-15)
    own = dict(other.adapter("a").entries())
    assert own["vision.blocks.0.attn.q"] is own["vision.blocks.0.attn.v"]


@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("twin", twins.TWINS, ids=lambda twin: f"{twin.source}-{twin.target}")
def test_one_file_serves_the_same_weights_in_another_library(
    twin: twins.Twin, back: bool, tmp_path: Path
) -> None:
    twins.assert_alike(*twin.either_way(back=back), tmp_path, CONFIG, std=0.1)


def test_maps_that_sites_leave_out_are_left_alone() -> None:
    model = adapted(RepAdapterConfig(sites=("*.attn.k",)))
    qkv = model.backbone.blocks[0].attn.qkv
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        acting = qkv(x).chunk(3, dim=-1)
        with model.using(None):
            frozen = qkv(x).chunk(3, dim=-1)
    same = [torch.equal(one, other) for one, other in zip(acting, frozen, strict=True)]
    assert same == [True, False, True]


def test_it_adds_to_other_adapters_of_the_same_maps_in_either_order() -> None:
    model = adapted(CONFIG, LoRAConfig(rank=2, targets=("q", "v", "up")))
    p = numbers(model, "b")

    class Both(WithRepAdapter):
        def linear(self, site: str, x: Array) -> Array:
            y = super().linear(site, x)
            return y if f"{site}/a" not in p else y + x @ p[f"{site}/a"].T @ p[f"{site}/b"].T

    expected = Both(model, CONFIG)()
    assert_close(output(model), expected)
    model.set_active_adapters(Stack("b", "a"))
    assert_close(output(model), expected)
    model.merge_adapter("a")
    assert_close(output(model), expected)


def test_compositions_hold_it() -> None:
    model = adapted(CONFIG, CONFIG)
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


def test_sums_of_its_factors_need_weights_of_sum_one() -> None:
    model = adapted(CONFIG, CONFIG)
    with pytest.raises(
        ValueError, match="must sum to 1 where how='linear' sums the factors of rep"
    ):
        model.average_adapter("c", ["a", "b"], (1, 1))
    model.average_adapter("c", ["a", "b"])
    a, b, c = (numbers(model, name) for name in "abc")
    for key, value in c.items():
        assert_close(value, (a[key] + b[key]) / 2, 1e-15)


def test_a_map_without_a_bias_cannot_be_merged() -> None:
    model = init(FAMILIES["timm-vit-avg"].build())
    model.add_adapter("a", CONFIG)
    with pytest.raises(ValueError, match=r"attn\.q has no parameter to hold its shift"):
        model.merge_adapter("a")


def test_a_raw_map_without_a_bias_is_refused_and_can_be_left_out() -> None:
    model = init(FAMILIES["timm-eva"].build())
    with pytest.raises(ValueError, match=r"attn\.k: Eva reads this weight itself .*nothing to shi"):
        model.add_adapter("a", CONFIG)
    model.add_adapter("a", RepAdapterConfig(sites=("*.attn.[qv]", "*.ffn")))
    randomise(model.adapter("a"), std=0.1)
    model.set_active_adapters("a")
    args, kwargs = FAMILIES["timm-eva"].inputs()
    with torch.no_grad():
        acting = model(*args, **kwargs)
        model.merge_adapter("a")
        assert (model(*args, **kwargs) - acting).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a whole number of at least 1"),
        ({"groups": 0}, "groups must be a whole number of at least 1"),
        ({"size": 8, "groups": 3}, "groups 3 does not divide size 8"),
        ({"scale": 0}, "scale must not be 0"),
        ({"scale": "1"}, "scale must be a finite number"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepAdapterConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RepAdapterConfig(size=6, groups=3), "groups 3 does not divide the width 32 that vision.b"),
        (RepAdapterConfig(sites=("*.o",)), "has no linear map q, k, v, up or gate under sites="),
        (RepAdapterConfig(sites=("visoin",)), "did you mean 'vision'"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_encoder_is_refused(config: RepAdapterConfig, message: str) -> None:
    model = init(tiny_vit())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("a", config)
