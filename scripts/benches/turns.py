"""Contenders take turns, so that clocks, power limits and other users of the machine hit all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def turns(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The number of the round and the contender whose turn it is, each round in a random order of its own.

    NOTE: a GPU's power limit works over tens of milliseconds: whoever follows a slow contender, which draws less, runs
    up to 10% faster (docs/measuring.md). A fixed order would give that to the same one each time.
    """
    order = list(names)
    for n in range(rounds):
        random.shuffle(order)
        for name in order:
            yield n, name


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
