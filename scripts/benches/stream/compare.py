"""Contenders that move the same bytes, in turns, each checked, beside the bus's bare ceiling."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benches.common import summary
from benches.layers import ALLOWED, ALLOWED_CUBLAS
from benches.stream.rows import Rows
from benches.turns import timed, turns

ALLOWED_BF16 = ALLOWED["bfloat16"]
LONG_S = 3  # a contender that takes longer has fewer turns
COPY_WORKERS = "copy workers, array to array"


@dataclass(frozen=True)
class Contender:
    """One way to move the rows. `run` writes y, or returns it where that is None."""

    run: Callable[[], object]
    y: Any = None
    allowed: float | None = None
    """How far its results may be from float64; None: as far as the layer's precision explains."""


@dataclass
class _Found:
    """What one contender's turns gave."""

    seconds: list[float] = field(default_factory=list)
    again_seconds: list[float] = field(default_factory=list)
    worst: float = 0.0


def _take_turn(contender: Contender, found: _Found, rows: Rows, first_round: bool) -> None:
    """Run a contender, which counts, and at once again, which is told apart, unless that takes long.

    The processor's clocks, and threads that have rested for seconds, take a while to come up: the second run shows how
    much of the first that was.
    """
    import torch

    if first_round and contender.y is not None:
        contender.y.fill_(torch.nan)
    took_s, result = timed(contender.run)
    found.seconds.append(took_s)
    if first_round:
        found.worst = rows.worst_difference(contender.y if contender.y is not None else result)
    del result
    if took_s < LONG_S:
        found.again_seconds.append(timed(contender.run)[0])


def compare(
    rows: Rows, contenders: dict[str, Contender], rounds: int, alone: Mapping[str, Callable[[], float]] | None = None
) -> dict[str, Any]:
    """Time the contenders in turns and check what each of them wrote.

    `alone` are rates, in GB/s, that are measured once a round with nothing else going on.
    """
    found = {name: _Found() for name in contenders}
    ceilings: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in alone or {}}
    measured_round = -1
    for n, name in turns(contenders, rounds):
        if n > measured_round:
            for what, rate in (alone or {}).items():
                rates[what].append(rate())
            measured_round = n
        if n >= 2 and statistics.median(found[name].seconds) > LONG_S:
            continue  # two rounds tell enough of what takes seconds
        rows.ceiling_s()
        ceilings.append(rows.ceiling_s())
        _take_turn(contenders[name], found[name], rows, first_round=n == 0)
    bytes_in, bytes_out = int(rows.x.nbytes), int(rows.y.nbytes)
    ceiling = statistics.median(ceilings)

    def as_dict(name: str, one: _Found) -> dict[str, Any]:
        limit = contenders[name].allowed
        if limit is None:
            limit = (ALLOWED if name.startswith("pipeline") else ALLOWED_CUBLAS)[rows.precision]
        return {
            "seconds": summary(one.seconds),
            "again_seconds": summary(one.again_seconds) if one.again_seconds else None,
            "rounds": len(one.seconds),
            "gb_per_s_in": bytes_in / statistics.median(one.seconds) / 1e9,
            "gb_per_s_out": bytes_out / statistics.median(one.seconds) / 1e9,
            "of_ceiling": ceiling / statistics.median(one.seconds),
            "again_of_ceiling": ceiling / statistics.median(one.again_seconds) if one.again_seconds else None,
            "worst_difference": one.worst,
            "allowed_difference": limit,
            "right": bool(one.worst <= limit),
        }

    return {
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "ceiling_s": summary(ceilings),
        "alone_gb_per_s": {name: summary(found_rates) for name, found_rates in rates.items()},
        "contenders": {name: as_dict(name, one) for name, one in found.items()},
    }


def all_right(results: dict[str, Any]) -> bool:
    """Whether every contender's result was right, in all the comparisons of a case."""
    comparisons = [found for found in results.values() if isinstance(found, dict)]
    return all(row["right"] for found in comparisons for row in found.get("contenders", {}).values())


def show(title: str, found: dict[str, Any]) -> None:
    gb = max(found["bytes_in"], found["bytes_out"]) / 1e9
    ceiling = found["ceiling_s"]
    print(
        f"{title}: {found['bytes_in'] / 1e9:.2f} GB in, {found['bytes_out'] / 1e9:.2f} GB out; bare copies "
        f"{gb / ceiling['median']:.1f} GB/s ({gb / ceiling['max']:.1f} to {gb / ceiling['min']:.1f})"
    )
    for name, rate in found["alone_gb_per_s"].items():
        print(f"  {name}, alone: {rate['median']:.1f} GB/s ({rate['min']:.1f} to {rate['max']:.1f})")
    for name, row in sorted(found["contenders"].items(), key=lambda item: item[1]["seconds"]["median"]):
        seconds = row["seconds"]
        right = "right" if row["right"] else "WRONG RESULT"
        again = "" if row["again_seconds"] is None else f"; run again at once {row['again_of_ceiling']:.3f}"
        print(
            f"  {name:34} {gb / seconds['median']:6.2f} GB/s ({gb / seconds['max']:.2f} to {gb / seconds['min']:.2f}), "
            f"{row['of_ceiling']:.3f} of the ceiling{again}; worst "
            f"difference {row['worst_difference']:.1e}, {right}",
            flush=True,
        )
