"""A model holds hundreds of adapters: each verb about one of them costs the same however many."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families.small import output, randomise, small_vit

from mmadapters import AdapterModel, LoRAConfig, SeqBnConfig, Stack, init
from mmadapters.suggest import listing

HELD = 400


@pytest.fixture(scope="module")
def crowded() -> Iterator[tuple[AdapterModel, AdapterModel]]:
    """A model with many adapters, and one with few."""
    models = init(small_vit()), init(small_vit())
    for model, count in zip(models, (HELD, 10), strict=True):
        for number in range(count):
            model.add_adapter(f"a{number}", SeqBnConfig() if number % 2 else LoRAConfig(rank=2))
    gc.collect()
    gc.freeze()
    yield models
    gc.unfreeze()


def seconds(call: Callable[[], object]) -> float:
    """Processor time: the machine may be busy."""
    start = time.process_time()
    call()
    return time.process_time() - start


def ratio(many: Callable[[], object], few: Callable[[], object]) -> float:
    """The time of a call on many adapters over that on few, of the fastest of five calls each."""
    pairs = [(seconds(many), seconds(few)) for _ in range(5)]
    return min(a for a, _ in pairs) / min(b for _, b in pairs)


def added(model: AdapterModel) -> None:
    model.add_adapter("new", SeqBnConfig())
    model.delete_adapter("new")


def added_together(model: AdapterModel) -> None:
    names = ["x", "y", "z"]
    model.add_adapters(names, SeqBnConfig(), sharing="half_down")
    for name in names:
        model.delete_adapter(name)


def switched(model: AdapterModel) -> None:
    for number in range(8):
        model.set_active_adapters(f"a{number}")
        model.set_active_adapters(Stack("a1", f"a{number + 1 if number else 5}"))
        with model.using(f"a{number}"):
            pass
        model.store.forget(f"a{number}")
    model.set_active_adapters(None)


def fused(model: AdapterModel) -> None:
    model.delete_adapter_fusion(model.add_adapter_fusion(["a1", "a3"]))


@pytest.mark.parametrize("verb", [added, added_together, switched, fused])
def test_a_verb_takes_as_long_with_many_adapters_as_with_few(
    crowded: tuple[AdapterModel, AdapterModel], verb: Callable[[AdapterModel], None]
) -> None:
    many, few = crowded
    verb(few), verb(many)
    # With work for each adapter held the quotient is above 10.
    assert ratio(lambda: verb(many), lambda: verb(few)) < 3


def test_loading_takes_as_long_with_many_adapters_as_with_few(
    crowded: tuple[AdapterModel, AdapterModel], tmp_path: Path
) -> None:
    many, few = crowded
    few.save_adapter(tmp_path / "a", "a1")

    def loaded(model: AdapterModel) -> None:
        model.load_adapter(tmp_path / "a", "new")
        model.delete_adapter("new")

    loaded(few), loaded(many)
    assert ratio(lambda: loaded(many), lambda: loaded(few)) < 3


def test_a_first_adapter_of_a_kind_is_checked_without_a_walk_over_the_others(
    crowded: tuple[AdapterModel, AdapterModel],
) -> None:
    many, few = crowded

    def checked(model: AdapterModel) -> None:
        model.store._verified.clear()
        added(model)

    assert ratio(lambda: checked(many), lambda: checked(few)) < 3


def test_training_one_of_many_freezes_all_others(
    crowded: tuple[AdapterModel, AdapterModel],
) -> None:
    many, _ = crowded
    many.adapter("a7").requires_grad_(True)
    next(many.adapter("a9").parameters()).requires_grad_(True)
    many.adapter("a300").eval()
    many.train_adapter("a5")
    trainable = {name.split(".")[1] for name, p in many.named_parameters() if p.requires_grad}
    assert trainable == {"a5"}
    assert all(part.training for part in many.adapters.modules())
    many.eval()
    assert not any(part.training for part in many.adapters.modules())


@torch.no_grad()
def test_hooks_are_there_as_long_as_one_adapter_needs_them() -> None:
    backbone = small_vit()
    hooks = lambda: sum(len(part._forward_hooks) for part in backbone.modules())  # noqa: E731
    model = init(backbone)
    bare, before = output(model), hooks()
    model.add_adapters(["a", "b"], SeqBnConfig())
    with_two = hooks()
    assert with_two > before
    randomise(model.adapter("b"))
    model.set_active_adapters("b")
    changed = output(model)
    model.delete_adapter("a")
    assert hooks() == with_two
    assert torch.equal(output(model), changed)
    model.delete_adapter("b")
    assert hooks() == before
    assert torch.equal(output(model), bare)


def test_summary_names_who_shares_with_whom(capsys: pytest.CaptureFixture[str]) -> None:
    model = init(small_vit())
    model.add_adapter("alone", SeqBnConfig())
    model.add_adapters(["a", "b", "c"], SeqBnConfig(), sharing="half_down")
    rows = {row.name: row.shares for row in model.adapter_summary()}
    assert rows == {"alone": (), "a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b")}


def test_an_unknown_name_is_told_with_some_of_many(
    crowded: tuple[AdapterModel, AdapterModel],
) -> None:
    many, _ = crowded
    with pytest.raises(ValueError, match=r"there are 'a0', .*'a19' and 380 more$"):
        many.adapter("b")
    assert listing([]) == "none yet"
    assert listing(["a", "b"]) == "'a', 'b'"
