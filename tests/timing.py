"""Time bounds that hold on a busy machine: both sides are measured in turn, in the same process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]


def seconds(act: Callable[[], Any], *, clock: Clock = time.perf_counter) -> float:
    """Returns what one call takes."""
    start = clock()
    act()
    return clock() - start


def ratio(
    act: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    repeats: int,
    clock: Clock = time.perf_counter,
    after: Callable[[], Any] = lambda: None,
) -> float:
    """Returns how many times as long as `reference` a call of `act` takes.

    The two take turns, and the least of each counts: whatever else runs on the machine only adds.
    `after` follows each `act` and is not timed.
    """
    ours, theirs = [], []
    for _ in range(repeats):
        theirs.append(seconds(reference, clock=clock))
        ours.append(seconds(act, clock=clock))
        after()
    return min(ours) / min(theirs)
