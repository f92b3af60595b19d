"""The pairs that `make test` runs show of every method and every family what they must show."""

from __future__ import annotations

import pytest
from injection import selection
from injection.matrix import COPIED, FAMILIES, METHODS, REFUSED, TAKEN
from injection.selection import KINDS, MECHANISM, MECHANISMS, facts_of_copies, kind, select

SELECTED = select(TAKEN, scope="cover")
ON_OLDEST = select(TAKEN, scope="mechanisms")
COPIES = select(COPIED, facts_of_copies, first=SELECTED, scope="cover")


def test_every_method_has_one_mechanism_and_every_family_one_kind() -> None:
    named = [method for methods in MECHANISMS.values() for method in methods]
    assert sorted(named) == sorted(METHODS)
    assert {kind(name) for name in FAMILIES} == set(KINDS)
    assert len(FAMILIES) == 55


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_tried_on_two_families_of_each_kind_that_takes_it(method: str) -> None:
    for name in KINDS:
        takers = [f for f, m in TAKEN if m == method and kind(f.name) == name]
        tried = [f for f, m in SELECTED if m == method and kind(f.name) == name]
        assert len(tried) >= min(2, len(takers)), name
        copied = [f for f, m in COPIED if m == method and kind(f.name) == name]
        tried = [f for f, m in COPIES if m == method and kind(f.name) == name]
        assert len(tried) >= min(1, len(copied)), name


@pytest.mark.parametrize("scope", ["cover", "mechanisms"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_tried_with_each_mechanism_that_it_takes(name: str, scope: str) -> None:
    takes = {MECHANISM[method] for family, method in TAKEN if family.name == name}
    pairs = {"cover": SELECTED, "mechanisms": ON_OLDEST}[scope]
    assert {MECHANISM[method] for family, method in pairs if family.name == name} == takes
    assert {"branch at a sublayer", "low-rank change of a map"} <= takes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_copied_saved_and_pickled_with_two_methods(name: str) -> None:
    assert sum(family.name == name for family, _ in COPIES) >= 2


def test_every_method_is_refused_by_one_family_of_each_kind_that_refuses_it() -> None:
    refused = {(kind(family.name), method) for family, method in REFUSED}
    selected = select(REFUSED, facts_of_copies, scope="cover")
    assert {(kind(family.name), method) for family, method in selected} == refused


def test_everything_is_the_product() -> None:
    assert select(TAKEN, scope="all") == TAKEN
    assert len(TAKEN) + len(REFUSED) == len(FAMILIES) * len(METHODS)
    assert len(SELECTED) < len(TAKEN) / 2


def test_a_cover_is_the_same_each_time_and_keeps_the_order() -> None:
    assert select(TAKEN, scope="cover") == SELECTED
    assert [pair for pair in TAKEN if pair in set(SELECTED)] == SELECTED


def test_a_cover_shows_each_fact_as_often_as_it_should_and_can() -> None:
    pairs = ["ab", "bc", "ac", "d"]
    assert selection.cover(pairs, lambda pair: dict.fromkeys(pair, 1)) == ["ab", "bc", "d"]
    twice = selection.cover(pairs, lambda pair: dict.fromkeys(pair, 2))
    assert twice == pairs
    preferred = selection.cover(pairs, lambda pair: dict.fromkeys(pair, 1), first=["ac"])
    assert preferred == ["ab", "ac", "d"]
