"""The order of the tests of injection."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a life come one after another, so that it is lived once."""
    places = [place for place, item in enumerate(items) if "life" in _parameters(item)]
    lives: dict[str, int] = {}
    for place in places:
        lives.setdefault(_pair(items[place]), len(lives))
    ordered = sorted((items[place] for place in places), key=lambda item: lives[_pair(item)])
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _pair(item: pytest.Item) -> str:
    return item.callspec.id  # type: ignore[attr-defined]
