"""An AdapterFusion in a model: what can be fused, deleting, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families.small import hooks, output, randomise, small_vit
from injection.matrix import FAMILIES, Trace, bare, equal, run, same_state, state

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    BottleneckConfig,
    CompacterConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    Fuse,
    FusionConfig,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    ParBnConfig,
    PrefixConfig,
    Route,
    SeqBnConfig,
    Stack,
    init,
)

SIZES = {"a": 4, "b": 6, "c": 3}


def three(seed: int = 0) -> AdapterModel:
    """A small vision transformer with random bottlenecks a, b and c."""
    model = init(small_vit(seed))
    for name, size in SIZES.items():
        model.add_adapter(name, SeqBnConfig(size=size))
        randomise(model.adapter(name))
    return model


def fused() -> AdapterModel:
    """The three with a random fusion of a and b."""
    model = three()
    model.add_adapter_fusion(["a", "b"])
    randomise(model.fusions)
    return model


def test_fusion_is_idle_frozen_and_listed_by_its_members() -> None:
    model = three()
    plain = output(model)
    assert model.fusion_names == ()
    assert model.add_adapter_fusion(["b", "a"]) == "b,a"
    assert model.add_adapter_fusion(Fuse("a", "b")) == "a,b"
    assert model.fusion_names == ("b,a", "a,b")
    assert model.active_adapters is None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(output(model), plain)
    with pytest.raises(ValueError, match=r"there is an AdapterFusion of 'a,b' already"):
        model.add_adapter_fusion(["a", "b"])


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2),
        IA3Config(),
        PrefixConfig(length=2),
        ConfigUnion(SeqBnConfig(size=4), LoRAConfig(rank=2)),
    ],
    ids=lambda config: config.method,
)
def test_what_is_no_bottleneck_cannot_be_fused(config: MethodConfig) -> None:
    model = three()
    model.add_adapter("other", config)
    before = hooks(model.backbone)
    message = rf"adapter 'other', a {config.method}, cannot be fused: .* use Average or Stack"
    with pytest.raises(ValueError, match=message):
        model.add_adapter_fusion(["a", "other"])
    assert model.fusion_names == ()
    assert hooks(model.backbone) == before


@pytest.mark.parametrize("config", [CompacterConfig(size=4), ParBnConfig(size=4)], ids=str)
def test_every_bottleneck_can_be_fused(config: MethodConfig) -> None:
    model = three()
    model.add_adapter("other", config)
    randomise(model.adapter("other"))
    model.add_adapter_fusion(["a", "other"])
    given = {}
    for setup in ("a", "other", Fuse("a", "other")):
        with model.using(setup):
            given[setup] = output(model)
    assert not any(torch.equal(given[Fuse("a", "other")], given[name]) for name in ("a", "other"))


def test_fusion_of_unknown_members_and_unknown_fusions_raise() -> None:
    model = fused()
    with pytest.raises(ValueError, match=r"no adapter is called 'd'; there are 'a', 'b', 'c'"):
        model.add_adapter_fusion(["a", "d"])
    for act in (model.set_active_adapters, model.train_adapter_fusion, model.train_adapter):
        with pytest.raises(ValueError, match=r"no AdapterFusion of 'b,c': .*there are 'a,b'"):
            act(Fuse("b", "c"))
    with pytest.raises(ValueError, match=r"no AdapterFusion 'a,c'.*'a,b'"):
        model.delete_adapter_fusion("a,c")
    with pytest.raises(ValueError, match="Fuse needs at least 2 members"):
        model.add_adapter_fusion(["a"])


def test_member_stays_until_its_fusion_is_deleted() -> None:
    model = fused()
    before = hooks(model.backbone)
    model.set_active_adapters(Fuse("a", "b"))
    acting = output(model)
    with pytest.raises(
        ValueError, match=r"member of the AdapterFusion 'a,b'; call delete_adapter_f"
    ):
        model.delete_adapter("a")
    assert torch.equal(output(model), acting)
    model.delete_adapter("c")
    assert torch.equal(output(model), acting)
    model.delete_adapter_fusion("a,b")
    assert model.active_adapters is None
    assert hooks(model.backbone) == before
    for name in ("a", "b"):
        model.delete_adapter(name)
    assert hooks(model.backbone) == 0


@pytest.mark.parametrize(
    "setup", [Fuse("a", "b"), Stack("c", Fuse("a", "b")), Route([Fuse("a", "b"), "base"])], ids=str
)
def test_deleted_fusion_acts_nowhere_any_more(setup: mmadapters.Stack) -> None:
    model = fused()
    plain = output(model)
    model.set_active_adapters(setup)
    assert not torch.equal(output(model), plain)
    with model.using(setup):
        model.delete_adapter_fusion(Fuse("a", "b"))
        assert torch.equal(output(model), plain)
    assert model.active_adapters is None
    assert torch.equal(output(model), plain)
    with pytest.raises(ValueError, match="no AdapterFusion of 'a,b'"):
        model.set_active_adapters(setup)


def test_deleting_a_fusion_leaves_what_acts_without_it() -> None:
    model = fused()
    model.set_active_adapters(Average("a", "b"))
    acting = output(model)
    model.delete_adapter_fusion("a,b")
    assert model.active_adapters == Average("a", "b")
    assert torch.equal(output(model), acting)


@pytest.mark.parametrize("name", ["timm-vit", "hf-wav2vec2"])
def test_saved_fusion_gives_the_same_bits_in_a_fresh_model(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    models = [mmadapters.init(bare(family)) for _ in range(2)]
    composition = Fuse("a", Stack("b", "c"))
    for adapter, size in SIZES.items():
        models[0].add_adapter(adapter, DoubleSeqBnConfig(size=size))
        randomise(models[0].adapter(adapter))
        models[0].save_adapter(tmp_path / adapter, adapter)
        models[1].load_adapter(tmp_path / adapter)
    models[0].add_adapter_fusion(composition, FusionConfig(dropout=0.1, regularization=0.2))
    randomise(models[0].fusions)
    models[0].save_adapter_fusion(tmp_path / "fusion", composition)
    assert models[1].load_adapter_fusion(tmp_path / "fusion") == "a,b>c"
    assert models[1].fusion_names == ("a,b>c",)
    assert models[1].active_adapters is None
    given = []
    for model in models:
        with model.using(composition):
            given.append(run(model, family))
        model.train_adapter_fusion(composition)
        assert model.fusion_penalty() > 0
        given[-1].append(model.fusion_penalty().detach())
        assert not torch.equal(*(run(model, family)[0] for _ in range(2)))  # The dropout.
    assert equal(*given)


def fusion_directory(tmp_path: Path) -> Path:
    model = fused()
    for name in SIZES:
        model.save_adapter(tmp_path / name, name)
    model.save_adapter_fusion(tmp_path / "fusion", "a,b")
    return tmp_path / "fusion"


def without_b(tmp_path: Path) -> AdapterModel:
    model = init(small_vit())
    model.load_adapter(tmp_path / "a")
    return model


def with_other_values(tmp_path: Path) -> AdapterModel:
    model = whole(tmp_path)
    with torch.no_grad():
        next(model.adapter("b").parameters()).view(-1)[0] += 1e-6
    return model


def with_swapped_names(tmp_path: Path) -> AdapterModel:
    model = init(small_vit())
    model.load_adapter(tmp_path / "a", "b")
    model.load_adapter(tmp_path / "b", "a")
    return model


def of_another_encoder(tmp_path: Path) -> AdapterModel:
    model = init(small_vit(seed=1))
    for name in ("a", "b"):
        model.load_adapter(tmp_path / name, allow_different_weights=True)
    return model


def of_another_width(tmp_path: Path) -> AdapterModel:
    model = init(small_vit(embed_dim=16))
    for name in ("a", "b"):
        model.add_adapter(name, SeqBnConfig(size=SIZES[name]))
    return model


def with_the_fusion(tmp_path: Path) -> AdapterModel:
    model = whole(tmp_path)
    model.load_adapter_fusion(tmp_path / "fusion")
    return model


def whole(tmp_path: Path) -> AdapterModel:
    model = init(small_vit())
    for name in ("a", "b"):
        model.load_adapter(tmp_path / name)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_b, r"fuses adapter 'b', which is not here: load it first"),
        (with_other_values, r"fuses an adapter 'b' with other values than the one that is here"),
        (with_swapped_names, r"fuses an adapter 'a' with other values than the one that is here"),
        (of_another_encoder, r"with other weights in tower 'vision'"),
        (of_another_width, r"of width 32 in tower 'vision'; this VisionTransformer has 16"),
        (with_the_fusion, r"there is an AdapterFusion of 'a,b' already"),
    ],
)
def test_fusion_that_does_not_fit_is_refused_and_changes_nothing(
    make: Callable[[Path], AdapterModel], message: str, tmp_path: Path
) -> None:
    directory = fusion_directory(tmp_path)
    model = make(tmp_path)
    weights, trace, names = state(model), Trace.of(model.backbone), model.fusion_names
    with pytest.raises(ValueError, match=message):
        model.load_adapter_fusion(directory)
    assert model.fusion_names == names
    assert same_state(model, weights)
    assert Trace.of(model.backbone) == trace
    assert model.active_adapters is None


def test_fusions_and_adapters_are_not_taken_for_each_other(tmp_path: Path) -> None:
    directory = fusion_directory(tmp_path)
    model = whole(tmp_path)
    weights = state(model)
    with pytest.raises(
        ValueError, match=r"holds an AdapterFusion: load it with load_adapter_fusion"
    ):
        model.load_adapter(directory)
    with pytest.raises(
        ValueError, match=r"holds an adapter, not an AdapterFusion: use load_adapter"
    ):
        model.load_adapter_fusion(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="is not an adapter directory"):
        model.load_adapter_fusion(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"there is no AdapterFusion 'a,c'; did you mean 'a,b'"):
        with_the_fusion(tmp_path).save_adapter_fusion(tmp_path / "other", "a,c")
    assert not (tmp_path / "other").exists()
    assert same_state(model, weights)


def test_merged_member_cannot_be_fused_into_an_output(tmp_path: Path) -> None:
    model = fused()
    model.set_active_adapters(Fuse("a", "b"))
    with pytest.raises(ValueError, match="adapter 'a' cannot be merged"):
        model.merge_adapter("a")
    assert model.active_adapters == Fuse("a", "b")
    assert BottleneckConfig.mergeable is not True
