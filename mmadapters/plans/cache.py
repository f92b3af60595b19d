"""The plans of a model, made when a composition is first asked for and kept for the next time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from ..composition import Composition
from ..injectors.plan import Plan

# A plan is a few hundred references. Routes of ever new batches must not pile up all the same.
_KEPT = 256
Key = tuple[Composition, int]


class Plans:
    """Plans by composition and number of dropped blocks; any thread may ask.

    `alive` are all that someone still holds, kept here or not: a `using` block may run on one that
    had to make room for others.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, Plan] = {}
        self._alive: weakref.WeakSet[Plan] = weakref.WeakSet()
        self._lock = threading.RLock()

    def get(self, key: Key, make: Callable[[], Plan]) -> Plan:
        """The plan of `key`, from `make` if there is none yet."""
        known = self._kept.get(key)
        if known is not None:
            return known
        with self._lock:
            if key not in self._kept:
                plan = make()
                plan.stands_for = key[0]
                while len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = plan
                self._alive.add(plan)
            return self._kept[key]

    def forget(self, concerns: Callable[[Composition], bool]) -> list[Plan]:
        """Keeps the plans that `concerns` is true of no longer, and returns all that are in use."""
        with self._lock:
            self._kept = {key: plan for key, plan in self._kept.items() if not concerns(key[0])}
            found = [plan for plan in list(self._alive) if plan.stands_for is not None]
            return [plan for plan in found if concerns(plan.stands_for)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": self._kept, "_alive": list(self._alive)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept = state["_kept"]
        self._alive = weakref.WeakSet(state["_alive"])
        self._lock = threading.RLock()
