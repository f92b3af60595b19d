"""The plans of a model: each is made when its composition is first used, and then kept."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from ..composition import Composition
from ..injectors.plan import Plan

# A plan is a few hundred references, but Routes of ever new batches must not pile up.
_KEPT = 256
Key = tuple[Composition, int]


class Plans:
    """Keeps plans by composition and number of dropped blocks; any thread may use it."""

    def __init__(self) -> None:
        self._kept: dict[Key, Plan] = {}
        # Every plan that is still in use, kept or not: a `using` block may hold one that made room.
        self._alive: weakref.WeakSet[Plan] = weakref.WeakSet()
        self._lock = threading.RLock()

    def get(self, key: Key, make: Callable[[], Plan]) -> Plan:
        """Returns the plan of `key`; `make` builds it if there is none yet."""
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
        """Drops the plans whose composition `concerns` selects; returns those that are in use."""
        with self._lock:
            self._kept = {key: plan for key, plan in self._kept.items() if not concerns(key[0])}
            alive = [plan for plan in list(self._alive) if plan.stands_for is not None]
            return [plan for plan in alive if concerns(plan.stands_for)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": self._kept, "_alive": list(self._alive)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept = state["_kept"]
        self._alive = weakref.WeakSet(state["_alive"])
        self._lock = threading.RLock()
