"""Sums and averages of adapters' parameters against dense sums of what they do to the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from families.small import randomise, small_vit
from injection.matrix import (
    EVERYWHERE,
    FAMILIES,
    METHODS,
    bare,
    bare_outputs,
    distance,
    home,
    run,
)
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmadapters
from mmadapters import (
    AdapterModel,
    BitFitConfig,
    ConfigUnion,
    DoRAConfig,
    FacTConfig,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    PrefixConfig,
    RepAdapterConfig,
    SeqBnConfig,
    SSFConfig,
    UniPELTConfig,
)
from mmadapters.adapters.arithmetic import combined
from mmadapters.adapters.merging import merged_tensors

Array = NDArray[np.float64]

# Plain and fused maps, convolutions before them, two towers, cross-attention, packed projections.
NAMES = ("timm-vit", "hf-clip", "hf-wav2vec2", "hf-blip-vqa", "open_clip-clip")
# Their effect on weights and biases is linear in what they train.
LINEAR: dict[str, MethodConfig] = {
    "bitfit": BitFitConfig(),
    "ia3": IA3Config(targets=("q", "k", "v", "o", "down")),
    "ssf": SSFConfig(),
}
RANKS: dict[str, MethodConfig] = {
    "a": LoRAConfig(rank=2, alpha=6, targets=EVERYWHERE),
    "b": LoRAConfig(rank=3, targets=EVERYWHERE),
    "c": LoRAConfig(rank=4, rslora=True, targets=EVERYWHERE),
}
WEIGHTS = (0.7, -1.3, 2.0)
# What acts is a product of what they train.
FACTORS = (LoRAConfig, FacTConfig, RepAdapterConfig)


def holding(model: Any, **configs: MethodConfig) -> AdapterModel:
    """A wrapped model with random adapters of these names."""
    model = mmadapters.init(model)
    for name, config in configs.items():
        model.add_adapter(name, config)
        randomise(model.adapter(name))
    return model


def sum_of(model: AdapterModel, names: str, weights: Any, **options: Any) -> Any:
    """`combined` for adapters of one letter each."""
    return combined([model.adapter(name) for name in names], list(names), weights, **options)


def install(model: AdapterModel, name: str, result: tuple[MethodConfig, dict[str, Tensor]]) -> None:
    config, tensors = result
    adapter = model.store.build(name, config)
    adapter.load(tensors, name)
    model.store.insert(name, adapter)


def changes(model: AdapterModel, name: str) -> list[Array]:
    """What an adapter adds to each weight and bias of the encoder."""
    return [
        (new.double() - place.tensor.double()).detach().numpy()
        for place, new in merged_tensors(name, model.adapter(name), model.sites)
    ]


def dense(model: AdapterModel, name: str) -> dict[str, Array]:
    """c B A of a LoRA by site, written out."""
    adapter = model.adapter(name)
    c = adapter.config.scaling  # type: ignore[attr-defined]
    values = {key: value.detach().double().numpy() for key, value in adapter.tensors().items()}
    sites = [key.removesuffix("#lora/a") for key in values if key.endswith("/a")]
    return {site: c * values[f"{site}#lora/b"] @ values[f"{site}#lora/a"] for site in sites}


def dense_sum(model: AdapterModel, names: str, weights: Any) -> dict[str, Array]:
    members = [dense(model, name) for name in names]
    sites = {site for member in members for site in member}
    return {
        site: sum(w * m[site] for w, m in zip(weights, members, strict=True) if site in m)  # type: ignore[misc]
        for site in sites
    }


def assert_same_matrices(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for site, matrix in expected.items():
        np.testing.assert_allclose(found[site], matrix, rtol=0, atol=1e-5, err_msg=site)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("family", NAMES)
def test_weights_change_by_the_weighted_sum_of_changes(family: str, method: str) -> None:
    config = LINEAR[method]
    model = holding(bare(FAMILIES[family]), a=config, b=config, c=config)
    install(model, "sum", sum_of(model, "abc", WEIGHTS))
    members = [changes(model, name) for name in "abc"]
    for found, *deltas in zip(changes(model, "sum"), *members, strict=True):
        expected = sum(w * delta for w, delta in zip(WEIGHTS, deltas, strict=True))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_concat_of_loras_of_any_rank_and_scale_is_the_exact_sum(family: str) -> None:
    model = holding(bare(FAMILIES[family]), **RANKS)
    install(model, "sum", sum_of(model, "abc", WEIGHTS, how="concat"))
    config = model.adapter("sum").config
    assert isinstance(config, LoRAConfig)
    assert (config.rank, config.scaling) == (9, 1.0)
    assert_same_matrices(dense(model, "sum"), dense_sum(model, "abc", WEIGHTS))


@pytest.mark.parametrize("family", NAMES)
def test_concat_gives_the_outputs_of_the_stack(family: str) -> None:
    model = holding(bare(FAMILIES[family]), **RANKS)
    install(model, "sum", sum_of(model, "abc", [1, 1, 1], how="concat"))
    model.set_active_adapters(["a", "b", "c"])
    stacked = run(model, FAMILIES[family])
    model.set_active_adapters("sum")
    assert distance(run(model, FAMILIES[family]), stacked) < 1e-4
    assert distance(stacked, bare_outputs(FAMILIES[family])) > 1e-2


@pytest.mark.parametrize("family", NAMES)
def test_svd_is_off_by_just_the_singular_values_left_out(family: str) -> None:
    """Eckart and Young 1936: no matrix of that rank is nearer."""
    model = holding(bare(FAMILIES[family]), **RANKS)
    install(model, "sum", sum_of(model, "abc", WEIGHTS, how="svd", rank=3))
    found, exact = dense(model, "sum"), dense_sum(model, "abc", WEIGHTS)
    assert found.keys() == exact.keys()
    for site, matrix in exact.items():
        tail = np.linalg.svd(matrix, compute_uv=False)[3:]
        error = matrix - found[site]
        assert np.linalg.norm(error) == pytest.approx(np.linalg.norm(tail), rel=1e-4)
        assert np.linalg.norm(error, 2) == pytest.approx(tail[0], rel=1e-4)


def test_svd_at_the_sum_of_ranks_is_exact_and_by_default_at_the_largest() -> None:
    model = holding(small_vit(), **RANKS)
    config, _ = sum_of(model, "abc", WEIGHTS, how="svd")
    assert (config.rank, config.scaling) == (4, 1.0)
    install(model, "sum", sum_of(model, "abc", WEIGHTS, how="svd", rank=9))
    assert_same_matrices(dense(model, "sum"), dense_sum(model, "abc", WEIGHTS))


def test_svd_splits_singular_values_evenly() -> None:
    model = holding(small_vit(), **RANKS)
    _, tensors = sum_of(model, "ab", [1, -1], how="svd", rank=4)
    site = "vision.blocks.1.ffn.down"
    a, b = tensors[f"{site}#lora/a"], tensors[f"{site}#lora/b"]
    values = np.linalg.svd(dense_sum(model, "ab", [1, -1])[site], compute_uv=False)[:4]
    for gram in (a @ a.T, b.T @ b):
        np.testing.assert_allclose(gram.numpy(), np.diag(values), rtol=0, atol=1e-4)


def test_svd_makes_no_matrix_of_the_size_of_a_weight() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else [out]
            sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
            self.size = max(self.size, *sizes, 0)
            return out

    model = holding(small_vit(), **RANKS)
    with Largest() as largest:
        sum_of(model, "abc", WEIGHTS, how="svd")
    # 32 and 128 wide, ranks of 9 in all.
    assert 0 < largest.size <= 9 * 128 < 32 * 128


def test_maps_that_only_some_have_count_as_unchanged_in_the_others() -> None:
    model = holding(
        small_vit(),
        a=LoRAConfig(rank=2, targets=("q", "v")),
        b=LoRAConfig(rank=3, targets=("v", "down")),
    )
    for how, rank in (("concat", None), ("svd", 5)):
        install(model, how, sum_of(model, "ab", [2, -1], how=how, rank=rank))
        assert_same_matrices(dense(model, how), dense_sum(model, "ab", [2, -1]))


def test_towers_that_only_some_adapt_come_together() -> None:
    model = holding(
        bare(FAMILIES["hf-clip"]),
        a=LoRAConfig(rank=2, sites=("vision",)),
        b=LoRAConfig(rank=3, sites=("text",)),
    )
    install(model, "sum", sum_of(model, "ab", [2, -1], how="concat"))
    assert_same_matrices(dense(model, "sum"), dense_sum(model, "ab", [2, -1]))


@pytest.mark.parametrize("method", METHODS)
def test_average_of_an_adapter_with_itself_has_its_bits(method: str) -> None:
    model = holding(bare(home(method)), a=METHODS[method])
    config, tensors = sum_of(model, "aa", [0.5, 0.5])
    own = model.adapter("a").tensors()
    assert config == METHODS[method]
    assert list(tensors) == list(own)
    assert all(torch.equal(tensors[key], own[key]) for key in own)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert {t.data_ptr() for t in tensors.values()}.isdisjoint(t.data_ptr() for t in own.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_added_and_taken_away_is_gone(method: str) -> None:
    model = holding(bare(home(method)), a=METHODS[method], b=METHODS[method])
    if method == "conformer_adapter":
        with pytest.raises(ValueError, match="a weight is -1, but must be at least 0"):
            sum_of(model, "abb", [1, 1, -1])
        return
    _, tensors = sum_of(model, "abb", [1, 1, -1])
    for key, expected in model.adapter("a").tensors().items():
        torch.testing.assert_close(tensors[key], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["concat", "svd"])
def test_what_is_added_and_taken_away_is_gone_from_the_product(how: Any) -> None:
    model = holding(small_vit(), **RANKS)
    install(
        model, "sum", sum_of(model, "abb", [1, 1, -1], how=how, rank=2 if how == "svd" else None)
    )
    assert_same_matrices(dense(model, "sum"), dense(model, "a"))


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, config in METHODS.items()
        if config.identity and not any(isinstance(part, FACTORS) for _, part in config.parts())
    ],
)
@pytest.mark.parametrize("weights", [[3.0, -0.5], [-1.0, -1.0], [0.0, 0.0]], ids=str)
def test_any_sum_of_fresh_adapters_is_the_identity(method: str, weights: list[float]) -> None:
    family = home(method)
    model = mmadapters.init(bare(family))
    for name in "ab":
        model.add_adapter(name, METHODS[method])
    if method == "conformer_adapter" and min(weights) < 0:
        with pytest.raises(ValueError, match="must be at least 0 for a Conformer adapter"):
            sum_of(model, "ab", weights)
        return
    install(model, "sum", sum_of(model, "ab", weights))
    model.set_active_adapters("sum")
    assert distance(run(model, family), bare_outputs(family)) < 1e-5


LEARNED = SeqBnConfig(size=4, norm="before", learn_scale="scalar", scale=0.5)


@pytest.mark.parametrize(
    "config",
    [LEARNED, ConfigUnion(LEARNED, LEARNED), UniPELTConfig(PrefixConfig(length=2), LEARNED)],
    ids=lambda config: config.method,
)
def test_constants_that_parameters_start_at_are_kept(config: MethodConfig) -> None:
    """A learned scale that starts at 0.5 and the gain of a LayerNorm, which starts at 1."""
    model = holding(small_vit(), a=config, b=config)
    a, b = (model.adapter(name).tensors() for name in "ab")
    _, tensors = sum_of(model, "ab", [2, 3])
    for key, found in tensors.items():
        start = {"scale": 0.5, "norm_before.weight": 1.0}.get(
            key.rsplit("/", 1)[1].removeprefix("inner."), 0.0
        )
        expected = start + 2 * (a[key] - start) + 3 * (b[key] - start)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_negated_ia3_undoes_to_first_order() -> None:
    model = holding(small_vit(), a=IA3Config())
    _, tensors = sum_of(model, "a", [-1])
    for key, scale in model.adapter("a").tensors().items():
        torch.testing.assert_close(tensors[key], 2 - scale)


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), DoRAConfig(rank=2)], ids=["lora", "dora"])
def test_linear_averages_factors_and_magnitudes(config: LoRAConfig) -> None:
    model = holding(small_vit(), a=config, b=config)
    a, b = (model.adapter(name).tensors() for name in "ab")
    _, tensors = sum_of(model, "ab", [0.25, 0.75])
    for key, found in tensors.items():
        torch.testing.assert_close(found, 0.25 * a[key] + 0.75 * b[key])


def test_equal_meanings_may_be_written_differently_and_trained_with_other_dropout() -> None:
    model = holding(
        small_vit(),
        a=LoRAConfig(rank=4, alpha=8, targets=("q", "v"), dropout=0.1),
        b=LoRAConfig(rank=4, alpha=4, rslora=True, targets=("v", "q")),
    )
    config, _ = sum_of(model, "ab", [0.5, 0.5])
    assert config == model.adapter("a").config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["linear", "concat", "svd"])
def test_results_have_the_members_dtype_and_are_rounded_to_it_once(
    how: Any, dtype: torch.dtype
) -> None:
    config, weights = LoRAConfig(rank=2), [0.3, 0.3, 0.4]
    model = holding(small_vit().to(dtype), a=config, b=config, c=config)
    _, tensors = sum_of(model, "abc", weights, how=how, rank=6 if how == "svd" else None)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    members = [model.adapter(name).tensors() for name in "abc"]

    def mean(key: str) -> Tensor:
        pairs = zip(weights, members, strict=True)
        return torch.stack([w * member[key].double() for w, member in pairs]).sum(0)

    for site, exact in dense_sum(model, "abc", weights).items():
        a, b = f"{site}#lora/a", f"{site}#lora/b"
        expected = (mean(b) @ mean(a)).detach().numpy() if how == "linear" else exact
        error = (tensors[b].double() @ tensors[a].double()).numpy() - expected
        # Half a unit in the last place of each factor, and some for the decomposition.
        bound = 1 if dtype.itemsize == 2 else 20
        assert np.linalg.norm(error) < bound * torch.finfo(dtype).eps * np.linalg.norm(expected)


LORA = LoRAConfig(rank=2)
REFUSED: dict[str, tuple[list[MethodConfig], list[Any], dict[str, Any], str]] = {
    "how": ([LORA], [1], {"how": "liner"}, "how must be one of .* did you mean 'linear'"),
    "none": ([], [], {}, "name at least one adapter"),
    "count": ([LORA, LORA], [1], {}, "1 weights are given for 2 adapters"),
    "nan": ([LORA, LORA], [1, math.nan], {}, "the weight of adapter 'b' must be a finite number"),
    "text": ([LORA], ["1"], {}, "the weight of adapter 'a' must be a finite number, not '1'"),
    "rank": ([LORA, LORA], [1, 1], {"how": "concat", "rank": 2}, "rank=2 is for how='svd'"),
    "rank 0": ([LORA], [1], {"how": "svd", "rank": 0}, "rank must be a whole number"),
    "rank 5": (
        [LORA, LORA],
        [1, 1],
        {"how": "svd", "rank": 5},
        r"rank 5 is more than the 4 that a sum of ranks 2 \+ 2 can have; use at most that",
    ),
    "method": (
        [LORA, SSFConfig()],
        [0.5, 0.5],
        {},
        "'a' and 'b' cannot be summed .*: method is 'lora' in 'a' and 'ssf' in 'b'",
    ),
    "ranks": (
        [LORA, LORA, LoRAConfig(rank=3)],
        [1, 1, -1],
        {},
        "'a' and 'c' .*: rank is 2 in 'a' and 3 in 'c'; use how='concat' or how='svd'",
    ),
    "scaling": ([LORA, LoRAConfig(rank=2, alpha=4)], [1, 0], {}, "scaling is 1.0 in 'a' and 2.0"),
    "dora ranks": (
        [DoRAConfig(rank=2), DoRAConfig(rank=3)],
        [0.5, 0.5],
        {},
        "rank is 2 in 'a' and 3 in 'b'; it must be the same in both",
    ),
    "activation": (
        [SeqBnConfig(size=4), SeqBnConfig(size=4, activation="gelu")],
        [0.5, 0.5],
        {},
        "activation is 'relu' in 'a' and 'gelu' in 'b'; it must be the same in both",
    ),
    "sites": (
        [SSFConfig(), SSFConfig(sites=("*.ffn",))],
        [0.5, 0.5],
        {},
        r"sites is \('\*',\) in 'a' and \('\*.ffn',\) in 'b'",
    ),
    "part": (
        [ConfigUnion(LORA, SSFConfig()), ConfigUnion(LoRAConfig(rank=3), SSFConfig())],
        [0.5, 0.5],
        {},
        "rank of lora is 2 in 'a' and 3 in 'b'; it must be the same in both",
    ),
    "parts": (
        [ConfigUnion(LORA, SSFConfig()), ConfigUnion(SSFConfig(), LORA)],
        [0.5, 0.5],
        {},
        "the list of methods is .'lora', 'ssf'. in 'a' and .'ssf', 'lora'. in 'b'",
    ),
    "negated lora": (
        [LORA],
        [-1],
        {},
        "weights sum to -1, but must sum to 1 .*A and B; use how='concat' or how='svd'",
    ),
    "doubled dora": ([DoRAConfig(rank=2)], [2], {}, "sum to 2, but must sum to 1 for DoRA, whose"),
    "doubled union": (
        [UniPELTConfig(LORA, SeqBnConfig(size=4))],
        [2],
        {},
        "weights sum to 2, but must sum to 1 .*; give such weights",
    ),
    "bottleneck": (
        [LORA, SeqBnConfig()],
        [1, 1],
        {"how": "concat"},
        "how='concat' takes LoRA adapters alone, .* 'b' is of method 'seq_bn'; use how='linear'",
    ),
    "dora": ([DoRAConfig(rank=2)], [1], {"how": "svd"}, "'a' is of method 'dora'"),
    "union": ([ConfigUnion(LORA, SSFConfig())], [1], {"how": "svd"}, "'a' is of method 'union'"),
    "too wide": (
        [LoRAConfig(rank=20), LoRAConfig(rank=20)],
        [1, 1],
        {"how": "concat"},
        r"rank 40 is larger than vision.blocks.0.attn.q is wide \(32 -> 32\); use how='svd' with",
    ),
    "leaves": (
        [LoRAConfig(targets=("q",), sites=("*.0",)), LoRAConfig(targets=("v",), sites=("*.1",))],
        [1, 1],
        {"how": "concat"},
        "only one of them acts on vision.blocks.0.attn.q, and no LoRAConfig covers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused(case: str) -> None:
    configs, weights, options, message = REFUSED[case]
    model = holding(small_vit(), **dict(zip("abc", configs, strict=False)))
    with pytest.raises(ValueError, match=message):
        sum_of(model, "abc"[: len(configs)], weights, **options)


@pytest.mark.parametrize("how", ["linear", "concat", "svd"])
@pytest.mark.parametrize("other", [{"embed_dim": 48}, {"depth": 1}], ids=["width", "depth"])
def test_adapters_of_different_encoders_are_refused(how: Any, other: dict[str, int]) -> None:
    models = [holding(small_vit(), a=LORA), holding(small_vit(**other), a=LORA)]
    adapters = [model.adapter("a") for model in models]
    for pair in (adapters, adapters[::-1]):
        with pytest.raises(ValueError, match=r"'a' and 'b' .* as those of different encoders do"):
            combined(pair, ["a", "b"], [0.5, 0.5], how=how)


@pytest.mark.parametrize("how", ["linear", "concat", "svd"])
def test_values_that_are_not_finite_are_refused(how: Any) -> None:
    model = holding(small_vit(), a=LORA, b=LORA)
    with torch.no_grad():
        next(model.adapter("b").parameters())[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"adapter 'b': vision.* holds values that are not finite"):
        sum_of(model, "ab", [0.5, 0.5], how=how)
