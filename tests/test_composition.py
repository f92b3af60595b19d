"""Compositions as values: written, compared, refused, and to plain data and back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from families.small import small_vit

import mmadapters
from mmadapters import Average, BatchSplit, Fuse, LoRAConfig, Parallel, Route, Split, Stack, init
from mmadapters.composition import KINDS, Composition, from_data, parse

FUSE = Fuse("a", Stack("b", "c"))
EVERY: dict[str, Composition] = {
    "Stack('a', 'b')": Stack("a", "b"),
    "Fuse('a', Stack('b', 'c'))": FUSE,
    "Average('a', 'b')": Average("a", "b"),
    "Average('a', 'base', weights=(3, 1))": Average("a", None, weights=[3, 1]),
    "Split('a', 'base', splits=(4,))": Split("a", "base", splits=[4]),
    "Split('a', 'b', splits=(4, 0))": Split("a", "b", splits=(4, 0)),
    "BatchSplit('a', 'base', batch_sizes=(2, 6))": BatchSplit("a", None, batch_sizes=(2, 6)),
    "Route(['a', 'base', 'b', 'a'])": Route(["a", None, "b", "a"]),
    "Parallel('a', 'base', 'b')": Parallel("a", None, "b"),
    "Stack('d', Fuse('a', Stack('b', 'c')))": Stack("d", FUSE),
    "Stack('b', Split('a', 'base', splits=(4,)))": Stack("b", Split("a", None, splits=(4,))),
    "Stack('b', Route(['a', 'base']))": Stack("b", Route(["a", "base"])),
    "Average(Stack('a', 'd'), Fuse('b', 'c'), weights=(0.5, -2.0))": Average(
        Stack("a", "d"), Fuse("b", "c"), weights=(0.5, -2.0)
    ),
    "Route([Fuse('a', Stack('b', 'c')), 'base', Average('a', 'base')])": Route(
        [FUSE, "base", Average("a", "base")]
    ),
    "Parallel(Stack('a', 'b'), Split('a', Fuse('b', 'c'), splits=(2,)))": Parallel(
        Stack("a", "b"), Split("a", Fuse("b", "c"), splits=(2,))
    ),
}
each = pytest.mark.parametrize(("text", "value"), EVERY.items(), ids=EVERY)


@each
def test_composition_reads_as_it_is_written(text: str, value: Composition) -> None:
    assert repr(value) == text
    assert eval(text, vars(mmadapters) | {kind.__name__: kind for kind in KINDS.values()}) == value


@each
def test_composition_is_equal_to_its_equals_alone(text: str, value: Composition) -> None:
    twin = copy.deepcopy(value)
    assert twin == value
    assert hash(twin) == hash(value)
    assert pickle.loads(pickle.dumps(value)) == value
    assert [other for other in EVERY.values() if other == value] == [value]
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.members = ()  # type: ignore[misc]


def test_compositions_of_equal_members_differ_by_kind_order_and_option() -> None:
    values = [
        *(Stack("a", "b"), Stack("b", "a"), Fuse("a", "b"), Parallel("a", "b"), Route(["a", "b"])),
        *(Average("a", "b"), Average("a", "b", weights=(1, 2)), Average("b", "a", weights=(1, 2))),
        *(Split("a", "b", splits=(1,)), Split("a", "b", splits=(2,))),
        BatchSplit("a", "b", batch_sizes=(1, 1)),
    ]
    assert len(set(values)) == len(values)


@each
@pytest.mark.parametrize(
    "through",
    [
        lambda data: data,
        lambda data: json.loads(json.dumps(data)),
        lambda data: yaml.safe_load(yaml.safe_dump(data)),
    ],
    ids=["plain", "json", "yaml"],
)
def test_composition_comes_back_from_plain_data(
    text: str, value: Composition, through: Callable
) -> None:
    found = from_data(through(value.to_data()))
    assert found == value
    assert repr(found) == text
    assert parse(through(value.to_data())) == value


def test_plain_data_is_what_a_person_would_write() -> None:
    text = """
        route:
          - fr
          - fuse: [a, {stack: [b, c]}]
          - null
          - average: [fr, de]
            weights: [3, 1]
    """
    expected = Route(["fr", FUSE, "base", Average("fr", "de", weights=(3, 1))])
    assert from_data(yaml.safe_load(text)) == expected
    assert FUSE.to_data() == {"fuse": ["a", {"stack": ["b", "c"]}]}
    assert Average("a", "b").to_data() == {"average": ["a", "b"]}
    assert Split("a", None, splits=(4,)).to_data() == {"split": ["a", "base"], "splits": [4]}
    assert Stack("a").to_data() == "a"


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (None, None),
        ("base", None),
        ("a", Stack("a")),
        (["a", "b"], Stack("a", "b")),
        (("a",), Stack("a")),
        ({"fuse": ["a", "b"]}, Fuse("a", "b")),
        (FUSE, FUSE),
        (Route(["base"]), Route([None])),
    ],
    ids=repr,
)
def test_whatever_names_adapters_is_understood(setup: Any, expected: Composition | None) -> None:
    assert parse(setup) == expected


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (Stack("b", "a"), ["b", "a"]),
        (Route(["b", "base", "a", "b"]), ["b", "a"]),
        (Parallel(None, Stack("c", "a")), ["c", "a"]),
        (Average(Fuse("c", "a"), Stack("a", "b")), ["c", "a", "b"]),
        (Route(["base", None]), []),
    ],
    ids=repr,
)
def test_names_are_each_adapter_once_in_order(value: Composition, names: list[str]) -> None:
    assert list(value.names()) == names


@pytest.mark.parametrize(
    ("value", "shares"),
    [
        (Average("a", "b"), (0.5, 0.5)),
        (Average("a", "b", None, weights=(1, 2, 5)), (0.125, 0.25, 0.625)),
        (Average("a", "b", weights=(3, -1)), (1.5, -0.5)),
    ],
    ids=repr,
)
def test_shares_are_the_weights_over_their_sum(value: Average, shares: tuple) -> None:
    assert value.shares() == pytest.approx(shares)
    assert sum(value.shares()) == pytest.approx(1)


def test_fusions_are_called_by_their_members() -> None:
    assert Fuse("a", "b").name == "a,b"
    assert Fuse("b", "a").name == "b,a"
    assert FUSE.name == "a,b>c"


INSIDE: dict[str, Callable[[Any], Composition]] = {
    "Stack": lambda inner: Stack("z", inner),
    "Fuse": lambda inner: Fuse("z", inner),
    "Average": lambda inner: Average("z", inner),
    "Split": lambda inner: Split("z", inner, splits=(1,)),
    "BatchSplit": lambda inner: BatchSplit("z", inner, batch_sizes=(1, 1)),
    "Route": lambda inner: Route(["z", inner]),
    "Parallel": lambda inner: Parallel("z", inner),
}
INNER: dict[str, Composition] = {
    "Stack": Stack("a", "b"),
    "Fuse": Fuse("a", "b"),
    "Average": Average("a", "b"),
    "Split": Split("a", "b", splits=(1,)),
    "BatchSplit": BatchSplit("a", "b", batch_sizes=(1, 1)),
    "Route": Route(["a", "b"]),
    "Parallel": Parallel("a", "b"),
}
# Each row: what may stand in it.
NESTS: dict[str, set[str]] = {
    "Stack": {"Stack", "Fuse", "Average", "Split", "BatchSplit", "Route"},
    "Fuse": {"Stack"},
    "Average": {"Stack", "Fuse", "Average", "Split"},
    "Split": {"Stack", "Fuse", "Average"},
    "BatchSplit": {"Stack", "Fuse", "Average", "Split"},
    "Route": {"Stack", "Fuse", "Average", "Split"},
    "Parallel": {"Stack", "Fuse", "Average", "Split"},
}
ADVICE = {
    "Fuse": "it fuses adapters of one place; put a Stack or names there",
    "Average": "put it around, or use Stack",
    "Split": "splits of tokens do not nest; put it outermost, or below Stack, Average or Route",
    "BatchSplit": "it deals out the batch; put it outermost, or below Stack",
    "Route": "it deals out the batch; put it outermost, or below Stack",
    "Parallel": "it multiplies the batch; put it outermost, with Stacks inside",
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", INSIDE)
def test_wrong_nesting_raises_when_it_is_written(outer: str, inner: str) -> None:
    write = INSIDE[outer]
    if inner in NESTS[outer]:
        assert INNER[inner] in write(INNER[inner]).members
        return
    with pytest.raises(ValueError) as error:
        write(INNER[inner])
    assert str(error.value) == f"{inner} cannot stand inside {outer}: {ADVICE[inner]}"
    if "Stack" in NESTS[outer] and outer != "Stack" and inner in NESTS["Stack"]:
        with pytest.raises(ValueError, match=f"{inner} cannot stand inside {outer}"):
            write(Stack("y", INNER[inner]))  # Nor deeper inside.


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda: Stack(), "Stack needs at least one adapter"),
        (lambda: Route([]), "Route needs at least one adapter"),
        (lambda: Fuse("a"), "Fuse needs at least 2 members"),
        (lambda: Parallel("a"), "Parallel needs at least 2 members"),
        (lambda: Stack("a", None), "'base' is the encoder without adapters: Stack cannot hold it"),
        (lambda: Fuse("a", "base"), "'base' is the encoder without adapters: Fuse cannot hold it"),
        (lambda: Stack("a", 3), "Stack holds adapter names and compositions, not 3"),
        (lambda: Route("fr"), "Route takes a list with a member for each sample, not 'fr'"),
        (lambda: Route(Stack("a")), "a list with a member for each sample, not Stack('a')"),
        (lambda: Stack("a", "a"), "adapter 'a' stands twice in one Stack"),
        (lambda: Stack("a", Fuse("a", "b")), "adapter 'a' stands twice in one Stack"),
        (lambda: Fuse("a", "b", "a"), "adapter 'a' stands twice in one Fuse"),
        (lambda: Average("a", "b", "a"), "adapter 'a' stands twice in one Average"),
        (lambda: Average(FUSE, FUSE), f"{FUSE!r} stands twice in one Average"),
        (lambda: Average("a", "b", weights=(1,)), "Average has 2 members and 1 weights"),
        (lambda: Average("a", "b", weights=(1, -1)), "weights add up to 0, so that no mean"),
        (lambda: Average("a", "b", weights=(1, float("nan"))), "weights must be finite, not nan"),
        (lambda: Average("a", "b", weights=(1, "2")), "weights must be numbers, not '2'"),
        (lambda: Average("a", "b", weights=(True, 2)), "weights must be numbers, not True"),
        (lambda: Split("a", "b", "c", splits=(1,)), "Split has 3 members and 1 splits"),
        (lambda: Split("a", "b", splits=(1, 2, 3)), "Split has 2 members and 3 splits"),
        (lambda: Split("a", "b", splits=(-1,)), "splits must be whole numbers of at least 0"),
        (lambda: Split("a", "b", splits=(1.5,)), "splits must be whole numbers of at least 0"),
        (lambda: BatchSplit("a", "b", batch_sizes=(2,)), "2 members and 1 batch_sizes: give one"),
        (lambda: BatchSplit("a", "b", batch_sizes=(2, -2)), "batch_sizes must be whole numbers"),
        (lambda: BatchSplit("a", "b", batch_sizes=(2, True)), "of at least 0, not True"),
        (lambda: parse(3), "adapters are given by name, not as 3"),
        (lambda: parse([]), "Stack needs at least one adapter"),
        (lambda: from_data(["a", "b"]), "a composition is a name or a mapping such as {stack:"),
        (lambda: from_data({}), "this one has nothing"),
        (lambda: from_data({"fuze": ["a", "b"]}), "did you mean 'fuse'"),
        (lambda: from_data({"fuse": ["a", "b"], "stack": ["a"]}), "this one has fuse, stack"),
        (lambda: from_data({"average": ["a", "b"], "weight": [1, 2]}), "did you mean 'weights'"),
        (lambda: from_data({"stack": ["a"], "splits": [1]}), "stack has no option 'splits'"),
        (lambda: from_data({"stack": "a"}), "stack takes a list of members, not 'a'"),
        (lambda: from_data({"stack": None}), "stack takes a list of members, not None"),
        (lambda: from_data({"fuse": ["a", {"route": ["b"]}]}), "Route cannot stand inside Fuse"),
        (lambda: from_data({"fuse": ["a", {"stak": ["b"]}]}), "did you mean 'stack'"),
        (lambda: from_data({"split": ["a", "b"]}), "split needs splits, a list with a number for"),
        (lambda: from_data({"batch_split": ["a", "b"]}), "batch_split needs batch_sizes, a list"),
        (lambda: from_data({"split": ["a", "b"], "splits": 2}), "splits takes a list of num"),
        (lambda: from_data({"average": ["a", "b"], "weights": "1"}), "weights takes a list of "),
    ],
)  # fmt: skip
def test_mistake_raises_when_it_is_written_and_says_what_is_wrong(
    write: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        write()
    assert message in str(error.value)


def test_adapter_cannot_be_called_base() -> None:
    model = init(small_vit())
    with pytest.raises(ValueError, match=r"'base' means the encoder without adapters: choose"):
        model.add_adapter("base", LoRAConfig(rank=2))
    model.add_adapter("bases", LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"'base' means the encoder"):
        model.average_adapter("base", ["bases"])
    assert model.adapter_names == ("bases",)
    model.set_active_adapters("base")
    assert model.active_adapters is None
