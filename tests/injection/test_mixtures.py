"""Averages, splits of tokens and parallel passes, each against its parts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import Family, tensors
from families.small import randomise
from injection.composing import NAMES, batch, each_family, held, rows
from injection.matrix import EVERYWHERE, FAMILIES, READS_WEIGHTS, bare, distance, equal, loss_of
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    BottleneckConfig,
    DoubleSeqBnConfig,
    Fuse,
    IA3Config,
    LoRAConfig,
    Parallel,
    Route,
    SeqBnConfig,
    Split,
    Stack,
)

CLIP = tuple(name for name in ("hf-clip", "open_clip-clip") if name in NAMES)


@pytest.fixture
def model(name: str) -> Iterator[AdapterModel]:
    """Shared by tests, so none may change its adapters; nothing is active after each."""
    yield held(name)
    held(name).set_active_adapters(None)


def one_site(name: str) -> tuple[AdapterModel, str]:
    """A model with three bottlenecks and a LoRA in one place each, and the bottlenecks' place."""
    model = mmadapters.init(bare(FAMILIES[name]).double())
    site = [sublayer.name for sublayer in model.sites.sublayers() if sublayer.kind == "ffn"][-1]
    for adapter, size in (("a", 3), ("b", 5), ("c", 4)):
        model.add_adapter(adapter, BottleneckConfig(size=size, sites=(site,)))
    model.add_adapter_fusion(["a", "b"])
    randomise(model)
    return model, site


def branch(model: AdapterModel, site: str, setup: Any, family: Family) -> Tensor:
    """What a sublayer adds to the residual stream, (B, N, D), in the last call of it."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    (sublayer,) = (s for s in model.sites.sublayers() if s.name == site)
    handle = sublayer.output.register_forward_hook(keep)
    try:
        with model.using(setup):
            rows(model, family, batch(family, [0, 1, 1]))
    finally:
        handle.remove()
    return found[-1]


@each_family
def test_average_is_the_weighted_mean_of_what_its_members_give(name: str) -> None:
    model, site = one_site(name)
    family = FAMILIES[name]
    give = {key: branch(model, site, key, family) for key in ("a", "b", "c", "base")}
    stack, fused = (branch(model, site, s, family) for s in (Stack("a", "c"), Fuse("a", "b")))
    cases = {
        Average("a", "b"): (give["a"] + give["b"]) / 2,
        Average("a", "b", "base", weights=(3, 2, 5)): 0.3 * give["a"] + 0.2 * give["b"]
        + 0.5 * give["base"],
        Average("a", "b", weights=(3, -1)): 1.5 * give["a"] - 0.5 * give["b"],
        Average(Stack("a", "c"), "b"): (stack + give["b"]) / 2,
        Average(Fuse("a", "b"), "c", weights=(1, 3)): 0.25 * fused + 0.75 * give["c"],
        Average(Average("a", "b"), "c"): 0.25 * (give["a"] + give["b"]) + 0.5 * give["c"],
    }  # fmt: skip
    for setup, expected in cases.items():
        assert distance([branch(model, site, setup, family)], [expected]) <= 1e-12, setup
        assert distance([expected], [give["a"]]) > 1e-3


@each_family
def test_average_of_low_rank_changes_is_the_average_of_the_weights(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family).double())
    for adapter, rank in (("a", 2), ("b", 3)):
        model.add_adapter(adapter, LoRAConfig(rank=rank, alpha=5, targets=EVERYWHERE))
    randomise(model.adapters, 0.2)
    inputs = batch(family, [0, 1, 1])
    with model.using(Average("a", "b", "base", weights=(2, 1, 1))):
        found = rows(model, family, inputs)
    twin = mmadapters.init(bare(family).double())
    leaves = {leaf.name: leaf for leaf in twin.sites.leaves()}
    with torch.no_grad():
        for adapter, share in (("a", 0.5), ("b", 0.25)):
            for site, lora in model.adapter(adapter).entries():
                leaves[site].weight.add_(share * 5 / len(lora.a) * lora.b @ lora.a)
    assert distance(found, rows(twin, family, inputs)) <= 1e-10
    assert distance(found, rows(model, family, inputs)) > 1e-3


@each_family
def test_average_of_input_and_output_scales_is_the_mean_of_the_leafs_outputs(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family).double())
    down = [leaf for leaf in model.sites.leaves() if leaf.role == "down"][-1]
    model.add_adapter("scaled", IA3Config(targets=("down",), sites=(down.name,)))
    model.add_adapter("lora", LoRAConfig(rank=2, targets=("down",), sites=(down.name,)))
    randomise(model.adapters)
    give: dict[Any, Tensor] = {}
    average = Average("scaled", "lora", weights=(1, 3))
    for setup in ("scaled", "lora", average):
        found: list[Tensor] = []
        handle = down.module.register_forward_hook(lambda _, __, y, found=found: found.append(y))
        with model.using(setup):
            rows(model, family, batch(family, [0, 1]))
        handle.remove()
        give[setup] = found[-1]
    expected = 0.25 * give["scaled"] + 0.75 * give["lora"]
    assert distance([give[average]], [expected]) <= 1e-12
    assert distance([give["scaled"]], [give["lora"]]) > 1e-3


@each_family
def test_split_gives_every_token_what_its_member_gives(name: str) -> None:
    model, site = one_site(name)
    family = FAMILIES[name]
    give = {key: branch(model, site, key, family) for key in ("a", "b", "base", Fuse("a", "b"))}
    tokens = give["a"].shape[1]
    for setup, owners in {
        Split("a", "b", splits=(2,)): ["a"] * 2 + ["b"] * (tokens - 2),
        Split("base", Fuse("a", "b"), "a", splits=(1, 1)): ["base", Fuse("a", "b")]
        + ["a"] * (tokens - 2),
        Split("b", "base", splits=(tokens - 2, 2)): ["b"] * (tokens - 2) + ["base"] * 2,
        Split("b", "a", splits=(0, tokens)): ["a"] * tokens,
    }.items():
        found = branch(model, site, setup, family)
        for token, owner in enumerate(owners):
            row, right = [found[:, token]], [give[owner][:, token]]
            assert equal(row, right) if owner == "base" else distance(row, right) <= 1e-12
    assert distance([give["a"]], [give["b"]]) > 1e-3
    for splits in ((tokens + 1,), (tokens - 1, 2)):
        message = rf"Split deals out {sum(splits)} tokens, but {tokens} reached {site}"
        with pytest.raises(ValueError, match=message):
            branch(model, site, Split("a", "b", splits=splits), family)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hf-wav2vec2", "hf-bert", "hf-t5"])
def test_split_of_low_rank_changes_gives_every_token_its_own(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family).double())
    (*_, up) = (leaf for leaf in model.sites.leaves() if leaf.role == "up")
    for adapter in ("a", "b"):
        model.add_adapter(adapter, LoRAConfig(rank=2, targets=("up",), sites=(up.name,)))
    randomise(model.adapters)
    give: dict[Any, Tensor] = {}
    for setup in ("a", "b", Split("a", "b", splits=(2,))):
        found: list[Tensor] = []
        handle = up.module.register_forward_hook(lambda _, __, y, found=found: found.append(y))
        with model.using(setup):
            rows(model, family, batch(family, [0, 1]))
        handle.remove()
        give[setup] = found[-1]
    expected = torch.cat([give["a"][:, :2], give["b"][:, 2:]], dim=1)
    assert distance([give[Split("a", "b", splits=(2,))]], [expected]) <= 1e-12


def parallel_model(name: str, *, every: bool = False) -> AdapterModel:
    """Adapters of the last block or of all; in CLIP of the image tower, which alone can do it."""
    model = mmadapters.init(bare(FAMILIES[name]).double())
    blocks = "*.blocks.*" if every else "*.blocks.1*"
    sites = (blocks.replace("*", "vision", 1),) if "clip" in name else (blocks,)
    model.add_adapter("a", DoubleSeqBnConfig(size=4, sites=sites))
    model.add_adapter("b", SeqBnConfig(size=6, sites=sites))
    model.add_adapter_fusion(["a", "b"])
    if name not in READS_WEIGHTS:
        model.add_adapter("c", LoRAConfig(rank=2, sites=sites))
    randomise(model.adapters)
    randomise(model.fusions)
    return model


@pytest.mark.parametrize("every", [False, True], ids=["last-block", "every-block"])
@pytest.mark.parametrize("name", [*NAMES, "hf-wavlm", "torchaudio-wavlm", "open_clip-bert"])
def test_parallel_gives_each_member_its_chunk_of_the_batch(name: str, every: bool) -> None:
    family, model = FAMILIES[name], parallel_model(name, every=every)
    inputs = batch(family, [0, 1, 1], labels=False)
    members: list[Any] = ["a", "base", Fuse("a", "b"), Average("a", "b", weights=(2, 1))]
    if name not in READS_WEIGHTS:
        members += ["c", Stack("c", "b")]
    singles = []
    for member in members:
        with model.using(member):
            singles.append(rows(model, family, inputs))
    for chosen in ([0, 1], [2, 0, 1], range(len(members))):
        with model.using(Parallel(*(members[index] for index in chosen))):
            together = rows(model, family, inputs)
        copied = 0
        for place, index in enumerate(chosen):
            for out, single in zip(together, singles[index], strict=True):
                if len(out) == 3:  # A tower without adapters, which nothing multiplies.
                    assert distance([out], [single]) <= 1e-10
                else:
                    assert len(out) == 3 * len(chosen)
                    assert distance([out[3 * place : 3 * place + 3]], [single]) <= 1e-10
                    copied += 1
        assert copied >= len(chosen)
    assert distance(singles[0], singles[1]) > 1e-3


@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-eva", "hf-vit", "hf-wav2vec2", "torchaudio-wav2vec2-prenorm"]
    + ["hf-bert", "hf-t5", *CLIP]
)  # fmt: skip
def test_parallel_runs_blocks_below_the_first_adapted_one_once(name: str) -> None:
    family, model = FAMILIES[name], parallel_model(name)
    tower = next(iter(model.sites.towers.values()))
    seen: list[tuple[int, int]] = []

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            seen.append((index, len(output if isinstance(output, Tensor) else output[0])))

        return hook

    for index, block in enumerate(tower.blocks):
        block.module.register_forward_hook(note(index), with_kwargs=True)
    with model.using(Parallel("a", "b", "base")):
        rows(model, family, batch(family, [0, 1]))
    assert seen == [(0, 2), (1, 6)]


@pytest.mark.parametrize("name", [*CLIP, "open_clip-bert"])
def test_parallel_in_a_text_tower_of_clip_is_refused(name: str, model: AdapterModel) -> None:
    with pytest.raises(
        ValueError, match=r"cannot multiply the batch inside tower 'text'.*BatchSplit"
    ):
        model.set_active_adapters(Parallel("small", "seq"))
    assert model.active_adapters is None


@pytest.mark.parametrize("name", ["hf-vit", "hf-bert", "hf-blip-retrieval", "hf-blip-vqa"])
def test_switched_off_parallel_leaves_output_bitwise_equal(name: str) -> None:
    family, model = FAMILIES[name], parallel_model(name)
    inputs = batch(family, [0, 1], labels=False)
    expected = rows(bare(family).double().requires_grad_(False), family, inputs)
    model.set_active_adapters(Parallel("a", "b"))
    twin = copy.deepcopy(model)
    assert len(rows(model, family, inputs)[0]) == 4
    model.set_active_adapters(None)
    assert equal(rows(model, family, inputs), expected)
    assert len(rows(twin, family, inputs)[0]) == 4
    model.add_adapter("d", SeqBnConfig(size=2))
    assert equal(rows(model, family, inputs), expected)
    model.delete_adapter("d")
    model.set_active_adapters(Parallel("a", "base"))
    assert len(rows(model, family, inputs)[0]) == 4


@pytest.mark.parametrize("name", ["hf-wav2vec2", "torchaudio-wav2vec2-prenorm", "hf-wavlm"])
def test_parallel_and_routes_keep_every_samples_padding(name: str) -> None:
    family, model = FAMILIES[name], parallel_model(name, every=True)
    (waves,), _ = batch(family, [0, 1])
    lengths = torch.tensor([waves.shape[1], 2400])
    if name.startswith("hf"):
        mask = torch.arange(waves.shape[1]) < lengths[:, None]
        call = functools.partial(model, waves, attention_mask=mask.long())
    else:
        call = functools.partial(model, waves, lengths)
    given: dict[Any, Tensor] = {}
    setups: list[Any] = ["a", "b", Parallel("a", "b"), Route(["b", "a"]), Fuse("a", "b")]
    for setup in setups:
        with model.using(setup), torch.no_grad():
            given[setup] = tensors(call())[0]
    expected = torch.cat([given["a"], given["b"]])
    assert distance([given[Parallel("a", "b")]], [expected]) <= 1e-10
    expected = torch.stack([given["b"][0], given["a"][1]])
    assert distance([given[Route(["b", "a"])]], [expected]) <= 1e-10
    with model.using("a"), torch.no_grad():
        unpadded = tensors(model(waves))[0]
    assert distance([unpadded[1:, :3]], [given["a"][1:, :3]]) > 1e-3  # The mask does something.


@pytest.mark.parametrize(
    "setup",
    [
        Fuse("a", "b"),
        Route(["a", "c"]),
        Parallel("a", "base", "c"),
        Split("a", "b", splits=(3,)),
        Average("a", "c"),
    ],
    ids=lambda setup: type(setup).__name__,
)
@pytest.mark.parametrize("name", ["timm-vit", "hf-bert", "torchaudio-wav2vec2-prenorm"])
def test_checkpointed_blocks_act_anew_as_they_did(name: str, setup: Any) -> None:
    """Backward computes blocks again, when other adapters may be active."""
    family, model = FAMILIES[name], parallel_model(name, every=True)
    args, kwargs = batch(family, [0, 1])
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.adapters.requires_grad_(True)
        model.zero_grad()
        with model.using(setup):
            outputs = tensors(model(*args, **kwargs))
        loss_of(outputs).backward()
        found = {n: p.grad for n, p in model.adapters.named_parameters() if p.grad is not None}
        gradients.append({name: grad.clone() for name, grad in found.items()})
    assert {name.split(".")[0] for name in gradients[0]} == set(setup.names())
    assert gradients[0].keys() == gradients[1].keys()
    assert distance(list(gradients[1].values()), list(gradients[0].values())) <= 1e-5
