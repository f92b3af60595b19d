"""AdapterDrop: the lowest blocks run without adapters (Rücklé et al. 2021)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import Family, tensors
from families.small import output, randomise, small_vit
from injection.matrix import FAMILIES, METHODS, bare, bare_outputs, equal, loss_of, run, towers
from injection.test_graph import results_before
from torch import nn

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    DoubleSeqBnConfig,
    Fuse,
    LoRAConfig,
    MethodConfig,
    Parallel,
    Route,
    SeqBnConfig,
    Stack,
    init,
)

NAMES = ("timm-vit", "timm-siglip", "hf-vit", "hf-clip", "open_clip-clip", "hf-wav2vec2") + (
    "torchaudio-wav2vec2-prenorm",
    "hf-blip-vqa",
    "hf-bert",
    "hf-t5",
)
each_family = pytest.mark.parametrize("name", NAMES)
DEPTH = 4


def deep(*configs: MethodConfig) -> AdapterModel:
    """Four blocks with random adapters a, b, .. of these configs."""
    model = init(small_vit(depth=DEPTH))
    for name, config in zip("abcd", configs, strict=False):
        model.add_adapter(name, config)
        randomise(model.adapter(name))
    return model


@pytest.mark.parametrize(
    "method", ["double_seq_bn", "par_bn", "lora", "ia3", "ssf", "prefix", "union"]
)
@pytest.mark.parametrize("drop", range(DEPTH + 1))
def test_dropped_adapter_is_one_built_on_the_upper_blocks_alone(method: str, drop: int) -> None:
    model = deep(METHODS[method])
    whole = model.adapter("a")
    with model.using("a", drop=drop):
        dropped = output(model)
    upper = init(small_vit(depth=DEPTH))
    sites = tuple(
        site
        for site, _ in whole.entries()
        if not any(site.startswith(f"vision.blocks.{index}.") for index in range(drop))
    )
    if sites:
        upper.add_adapter("a", within(METHODS[method], sites))
        tensors = whole.tensors()
        own = upper.adapter("a").tensors()
        assert set(own) <= set(tensors)
        assert (len(own) == len(tensors)) is (drop == 0)
        upper.adapter("a").load({key: tensors[key] for key in own}, "the whole adapter")
        upper.set_active_adapters("a")
    assert torch.equal(dropped, output(upper))
    model.set_active_adapters("a", drop=drop)
    assert torch.equal(output(model), dropped)
    model.set_active_adapters("a")
    assert torch.equal(output(model), dropped) is (drop == 0)


def within(config: MethodConfig, sites: tuple[str, ...]) -> MethodConfig:
    """The config on these sites only, in all of its parts."""
    twin = copy.copy(config)
    object.__setattr__(twin, "sites", sites)
    for name, value in list(vars(twin).items()):
        if isinstance(value, MethodConfig):
            object.__setattr__(twin, name, within(value, sites))
        elif isinstance(value, tuple) and value and isinstance(value[0], MethodConfig):
            object.__setattr__(twin, name, tuple(within(part, sites) for part in value))
    return twin


@each_family
def test_dropping_every_block_leaves_the_bare_encoder(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family))
    model.add_adapter("a", DoubleSeqBnConfig(size=4, sites=("*.blocks.*",)))
    model.add_adapter("b", LoRAConfig(rank=2, sites=("*.blocks.*",)))
    model.add_adapter("c", SeqBnConfig(size=4, sites=("*.blocks.*",)))
    model.add_adapter_fusion(["a", "c"])
    randomise(model.adapters)
    deepest = max(len(tower.blocks) for tower in model.sites.towers.values())
    assert deepest == 2
    for setup in ("a", Stack("a", "b"), Fuse("a", "c"), Route(["a", "base"]), Average("a", "c")):
        given = {}
        for drop in range(deepest + 1):
            model.set_active_adapters(setup, drop=drop)
            given[drop] = run(model, family)
        model.set_active_adapters(setup)
        assert equal(given[0], run(model, family))
        assert equal(given[2], bare_outputs(family))
        assert not equal(given[1], given[0])
        assert not equal(given[1], given[2])


def test_what_stands_behind_the_blocks_is_not_dropped_with_them() -> None:
    model = deep(METHODS["ssf"])
    with model.using(None):
        plain = output(model)
    with model.using("a", drop=DEPTH):
        assert not torch.equal(output(model), plain)


def test_parallel_multiplies_the_batch_where_the_first_adapter_is_left() -> None:
    model = deep(SeqBnConfig(size=4), SeqBnConfig(size=6))
    sizes: list[int] = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    for drop in range(DEPTH + 1):
        single = []
        for name in ("a", "b"):
            with model.using(name, drop=drop):
                single.append(output(model))
        sizes.clear()
        with model.using(Parallel("a", "b"), drop=drop):
            torch.testing.assert_close(output(model), torch.cat(single))
        # Where no adapter is left the copies are made before the last block.
        assert sizes == [2] * min(drop, DEPTH - 1) + [4] * max(DEPTH - drop, 1)
    with model.using(Parallel("base", "base")):
        assert len(output(model)) == 4


@each_family
@pytest.mark.parametrize("method", ["double_seq_bn", "lora"])
def test_nothing_below_the_first_adapter_left_builds_a_graph(name: str, method: str) -> None:
    family = FAMILIES[name]
    for tower in towers(family):
        model = mmadapters.init(bare(family))
        base = METHODS[method]
        model.add_adapter("a", within(base, (f"{tower}.blocks.*",)))
        model.train_adapter("a", drop=1)
        block = model.sites.towers[tower].blocks[1].module
        before = results_before(model, block, family.inputs())
        assert len(before) > 5
        assert [module for module, in_graph in before if in_graph] == []


@each_family
def test_training_with_a_drop_gives_gradients_above_it_alone(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family))
    model.add_adapter("a", DoubleSeqBnConfig(size=4))
    randomise(model.adapters)
    model.train_adapter("a", drop=1)
    backward(model, family)
    for site, module in model.adapter("a").entries():
        reached = any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        assert reached is (".blocks.0." not in site), site


def backward(model: nn.Module, family: Family) -> None:
    args, kwargs = family.inputs()
    loss_of(t for t in tensors(model(*args, **kwargs)) if t.requires_grad).backward()


def test_random_drop_draws_every_value_in_training_and_none_in_eval() -> None:
    model = deep(DoubleSeqBnConfig(size=4))
    given = {}
    for drop in range(DEPTH + 1):
        with model.using("a", drop=drop):
            given[drop] = output(model)
    model.train_adapter("a", drop=(0, 2))
    assert model.active_adapters == Stack("a")

    def drawn(seed: int) -> int:
        torch.manual_seed(seed)
        found = output(model)
        (drop,) = (drop for drop, right in given.items() if torch.equal(found, right))
        return drop

    seen = [drawn(seed) for seed in range(40)]
    assert [drawn(seed) for seed in range(40)] == seen
    assert set(seen) == {0, 1, 2}
    assert min(map(seen.count, {0, 1, 2})) >= 5
    model.eval()
    assert all(torch.equal(output(model), given[0]) for _ in range(10))
    model.train()
    model.set_active_adapters("a", drop=1)  # What is set last holds.
    assert all(torch.equal(output(model), given[1]) for _ in range(10))


def test_random_drop_of_one_forward_stays_the_same_within_a_block_of_calls() -> None:
    model = deep(DoubleSeqBnConfig(size=4))
    model.train_adapter("a", drop=(0, DEPTH))
    seen = set()
    for _ in range(40):
        with model.randomly_dropped() as drop:
            first = output(model)
            assert torch.equal(output(model), first)
            seen.add(drop)
        with model.using("a", drop=drop):
            assert torch.equal(output(model), first)
    assert seen == set(range(DEPTH + 1))


def test_random_drop_of_a_fusion_trains_it() -> None:
    model = deep(SeqBnConfig(size=4), SeqBnConfig(size=5))
    model.add_adapter_fusion(["a", "b"])
    model.train_adapter_fusion(["a", "b"], drop=(0, 2))
    given = {output(model).sum().item() for _ in range(30)}
    assert len(given) == 3
    model.train_adapter("a", drop=(1, 1))
    assert len({output(model).sum().item() for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (-1, r"drop must be a number of blocks from 0 to 4, not -1"),
        (5, r"drop must be a number of blocks from 0 to 4, not 5"),
        (1.0, r"drop must be a number of blocks from 0 to 4, not 1\.0"),
        (True, r"drop must be a number of blocks from 0 to 4, not True"),
        ("1", r"drop must be a number of blocks from 0 to 4, not '1'"),
    ],
)
def test_bad_drop_is_refused_and_changes_nothing(drop: Any, message: str) -> None:
    model = deep(SeqBnConfig(size=4), SeqBnConfig(size=5))
    model.set_active_adapters("b", drop=1)
    before = output(model)
    acts = [
        model.set_active_adapters,
        model.train_adapter,
        lambda n, drop: model.using(n, drop=drop).__enter__(),
    ]
    for act in acts:
        with pytest.raises(ValueError, match=message):
            act("a", drop=drop)
    with pytest.raises(ValueError, match=message):
        model.train_adapter("a", drop=(0, drop) if drop != -1 else (drop, 0))
    assert model.active_adapters == Stack("b")
    assert torch.equal(output(model), before)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("drop", [(2, 1), (1,), (0, 1, 2), [3, 0], ()], ids=repr)
def test_bad_range_is_refused(drop: Any) -> None:
    model = deep(SeqBnConfig(size=4))
    with pytest.raises(ValueError, match=r"drop is a number or a pair \(least, most\), not"):
        model.train_adapter("a", drop=drop)
    assert model.active_adapters is None


def test_adapter_added_later_keeps_the_drop() -> None:
    model = deep(SeqBnConfig(size=4))
    model.set_active_adapters("a", drop=2)
    before = output(model)
    model.add_adapter("b", LoRAConfig(rank=2))
    model.delete_adapter("b")
    assert torch.equal(output(model), before)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), before)
