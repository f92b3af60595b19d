"""Unions of methods, plain and gated, against models in which each part is written out."""

from __future__ import annotations

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
    sigmoid,
    tiny_vit,
)
from torch import Tensor
from torch.func import functional_call

from mmadapters import (
    BottleneckConfig,
    ConfigUnion,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    ParallelPlacement,
    ParBnConfig,
    PrefixConfig,
    PromptConfig,
    SeqBnConfig,
    SequentialPlacement,
    UniPELTConfig,
    init,
)
from mmadapters.methods.union import GatedBranch, GatedDelta, GatedPrefix
from mmadapters.sites.acting import Context
from mmadapters.sites.tables import describe


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def bottleneck(p: dict[str, Array], at: str, h: Array) -> Array:
    hidden = relu(h @ p[f"{at}down.weight"].T + p[f"{at}down.bias"])
    return hidden @ p[f"{at}up.weight"].T + p[f"{at}up.bias"]


def prepended(prefix: Array, x: Array) -> Array:
    """prefix (P, D), x (B, N, D)"""
    return np.concatenate([np.broadcast_to(prefix, (len(x), *prefix.shape)), x], axis=1)


class WithUnion(ReferenceViT):
    """LoRA on v, then a Pfeiffer bottleneck, then a second LoRA on up."""

    def linear(self, site: str, x: Array) -> Array:
        y = super().linear(site, x)
        if f"{site}/a" in self.p:
            y = y + x @ self.p[f"{site}/a"].T @ self.p[f"{site}/b"].T
        return y

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        return u + bottleneck(self.p, f"{site}/", x + u) if site.endswith("ffn") else u


class WithMAM(ReferenceViT):
    def keys_values(self, site: str, n: Array, k: Array, v: Array) -> tuple[Array, Array]:
        p = {key.split("/")[1]: value for key, value in self.p.items() if key.startswith(site)}
        hidden = np.tanh(p["embedding"] @ p["inner.weight"].T + p["inner.bias"])
        keys, values = np.split(hidden @ p["outer.weight"].T + p["outer.bias"], 2, axis=1)
        return prepended(keys, k), prepended(values, v)

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        return u + 4 * bottleneck(self.p, f"{site}/", x) if site.endswith("ffn") else u


class WithUniPELT(ReferenceViT):
    """Each part's change times sigmoid(w h + b), h what its site reads."""

    def gate(self, site: str, h: Array) -> Array:
        return sigmoid(h @ self.p[f"{site}/gate.weight"].T + self.p[f"{site}/gate.bias"])

    def linear(self, site: str, x: Array) -> Array:
        y = super().linear(site, x)
        if f"{site}/inner.a" in self.p:
            change = x @ self.p[f"{site}/inner.a"].T @ self.p[f"{site}/inner.b"].T
            y = y + self.gate(site, x) * change
        return y

    def keys_values(self, site: str, n: Array, k: Array, v: Array) -> tuple[Array, Array]:
        keys, values = (self.p[f"{site}/inner.{kind}"] for kind in ("keys", "values"))
        return prepended(keys, k), prepended(values, v)

    def shares(self, site: str, n: Array, scores: Array) -> Array:
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        powers[..., : len(self.p[f"{site}/inner.keys"])] *= self.gate(site, n)[:, None]
        return powers / powers.sum(axis=-1, keepdims=True)

    def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
        if not site.endswith("ffn"):
            return u
        return u + self.gate(site, n) * bottleneck(self.p, f"{site}/inner.", x + u)


@pytest.mark.parametrize(
    ("config", "written_out"),
    [
        (
            ConfigUnion(
                LoRAConfig(rank=2, targets=("v",)),
                SeqBnConfig(size=4),
                LoRAConfig(rank=3, targets=("up",)),
            ),
            WithUnion,
        ),
        (MAMConfig(PrefixConfig(length=3, reparametrise=5), ParBnConfig(size=6)), WithMAM),
        (
            UniPELTConfig(PrefixConfig(length=3), LoRAConfig(rank=2), SeqBnConfig(size=4)),
            WithUniPELT,
        ),
    ],
    ids=["union", "mam", "unipelt"],
)
def test_adapted_model_is_the_written_out_one(config: Any, written_out: type) -> None:
    model = adapted(config)
    assert_close(output(model), written_out(model.backbone, numbers(model))())
    assert_acts(model)


def test_presets_hold_the_methods_of_their_papers() -> None:
    prefix, bottleneck = MAMConfig().configs
    assert prefix == PrefixConfig(length=30, reparametrise=512)
    assert bottleneck == ParBnConfig()
    assert [config.method for config in UniPELTConfig().configs] == ["prefix", "lora", "seq_bn"]


@pytest.mark.parametrize(
    "placement",
    [SequentialPlacement(), ParallelPlacement(input="residual"), ParallelPlacement(input="normed")],
    ids=["before", "residual", "normed"],
)
def test_gate_reads_the_input_of_the_sublayer_wherever_the_bottleneck_reads(
    placement: SequentialPlacement | ParallelPlacement,
) -> None:
    config = UniPELTConfig(
        LoRAConfig(rank=2), BottleneckConfig(size=4, placement=placement, sites=("*.ffn",))
    )
    model = adapted(config)

    class Written(WithUniPELT):
        def keys_values(self, site: str, n: Array, k: Array, v: Array) -> tuple[Array, Array]:
            return k, v

        def shares(self, site: str, n: Array, scores: Array) -> Array:
            return ReferenceViT.shares(self, site, n, scores)

        def branch(self, site: str, u: Array, x: Array, n: Array) -> Array:
            if not site.endswith("ffn"):
                return u
            h = u
            if isinstance(placement, ParallelPlacement):
                h = x if placement.input == "residual" else n
            return u + self.gate(site, n) * bottleneck(self.p, f"{site}/inner.", h)

    assert_close(output(model), Written(model.backbone, numbers(model))())


def test_gate_shut_leaves_the_frozen_output_and_gate_open_the_whole_change() -> None:
    inner = LoRAConfig(rank=2), SeqBnConfig(size=4)
    model = adapted(UniPELTConfig(*inner))
    gates = [module.gate for _, module in model.adapter("a").entries()]
    with model.using(None):
        plain = output(model)
    for bias, expected in ((-60.0, plain), (60.0, None)):
        with torch.no_grad():
            for gate in gates:
                gate.weight.zero_()
                gate.bias.fill_(bias)
        if expected is None:
            ungated = adapted(ConfigUnion(*inner))
            with torch.no_grad():
                values = (p for m in gated_inners(model) for p in m.parameters())
                for own, value in zip(ungated.adapter("a").parameters(), values, strict=True):
                    own.copy_(value)
            expected = output(ungated)
            assert np.abs(expected - plain).max() > 1e-4
        assert_close(output(model), expected, 1e-12)


def gated_inners(model: Any) -> list[torch.nn.Module]:
    return [module.inner for _, module in model.adapter("a").entries()]


@pytest.mark.parametrize("kind", [GatedBranch, GatedDelta, GatedPrefix])
def test_gradients_of_gated_modules_are_right(kind: type) -> None:
    sites = describe(tiny_vit())[0]
    leaves = {leaf.name: leaf for leaf in sites.leaves()}
    config = UniPELTConfig(
        PrefixConfig(length=2), LoRAConfig(rank=2), SeqBnConfig(size=3, activation="tanh")
    )
    built = [item for _, part in config.parts() for item in part.build(sites).items()]
    site, module = next(item for item in built if type(item[1]) is kind)
    randomise(module)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    given = [torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(first: Tensor, second: Tensor, third: Tensor, *parameters: Tensor) -> Any:
        named = dict(zip(names, parameters, strict=True))
        if kind is GatedPrefix:
            return functional_call(module, named, (first,))
        if kind is GatedDelta:
            return functional_call(module, named, (first, second, leaves[site]))
        return functional_call(module, named, (first, Context(second, third)))

    used = given[: {GatedBranch: 3, GatedDelta: 2, GatedPrefix: 1}[kind]]
    rest = [tensor.detach() for tensor in given[len(used) :]]
    assert torch.autograd.gradcheck(call, (*used, *rest, *values), fast_mode=True)


def test_fresh_gates_stand_in_the_middle_of_their_range() -> None:
    model = init(tiny_vit())
    model.add_adapter("a", UniPELTConfig())
    for _, module in model.adapter("a").entries():
        assert module.gate.weight.shape == (1, 32)
        assert module.gate.weight.abs().max() < 1


def test_union_is_identity_and_mergeable_only_if_every_part_is() -> None:
    assert ConfigUnion(LoRAConfig(), IA3Config()).identity
    assert ConfigUnion(LoRAConfig(), IA3Config()).mergeable is True
    assert not ConfigUnion(LoRAConfig(), PrefixConfig()).identity
    assert "no weight can hold" in str(ConfigUnion(LoRAConfig(), PrefixConfig()).mergeable)
    assert "non-linearity" in str(ConfigUnion(SeqBnConfig(), LoRAConfig()).mergeable)
    assert "depend on the input" in str(UniPELTConfig(LoRAConfig(), DoRAConfig()).mergeable)


def test_union_of_one_method_twice_keeps_both_apart() -> None:
    union = ConfigUnion(LoRAConfig(rank=2), LoRAConfig(rank=3), LoRAConfig(rank=4))
    assert [key for key, _ in union.parts()] == ["lora", "lora.1", "lora.2"]
    model = init(tiny_vit())
    model.add_adapter("a", union)
    shapes = {
        key: tensor.shape
        for key, tensor in model.adapter("a").tensors().items()
        if key.startswith("vision.blocks.0.attn.q") and key.endswith("/a")
    }
    assert shapes == {
        "vision.blocks.0.attn.q#lora/a": (2, 32),
        "vision.blocks.0.attn.q#lora.1/a": (3, 32),
        "vision.blocks.0.attn.q#lora.2/a": (4, 32),
    }


def test_merged_union_computes_the_same_and_is_reset_to_the_bit() -> None:
    model = adapted(ConfigUnion(LoRAConfig(rank=2, targets=("k", "down")), IA3Config()))
    acting = output(model)
    with model.using(None):
        plain = output(model)
    model.merge_adapter("a")
    assert_close(output(model), acting)
    model.reset_adapter("a")
    model.set_active_adapters(None)
    assert np.array_equal(output(model), plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfigUnion(), "at least two methods"),
        (lambda: ConfigUnion(LoRAConfig()), "at least two methods"),
        (lambda: ConfigUnion(LoRAConfig(), "ia3"), "a ConfigUnion holds single methods, not 'ia3'"),
        (lambda: ConfigUnion(LoRAConfig(), MAMConfig()), "a ConfigUnion holds single methods"),
        (lambda: UniPELTConfig(LoRAConfig(), IA3Config()), "UniPELT gates prefix, LoRA and bottle"),
        (lambda: UniPELTConfig(PromptConfig(), LoRAConfig()), "UniPELT gates prefix, LoRA and"),
        (lambda: MAMConfig(LoRAConfig()), "a MAMConfig takes a PrefixConfig"),
        (lambda: MAMConfig(bottleneck=LoRAConfig()), "a MAMConfig takes .* a BottleneckConfig"),
    ],
    ids=["none", "one", "name", "nested", "ia3", "prompt", "mam-prefix", "mam-bottleneck"],
)
def test_union_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
