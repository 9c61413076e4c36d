"""What the processes of one case took, and where their time went."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from benches.common import summary
from benches.job.contenders import CONTEXT, OURS, PLAIN, REST, Contender, ours_says_s
from benches.job.dataset import Dataset
from benches.layers import larger

FIGURES = ("wall_s", "user_s", "system_s", "peak_resident_bytes")


@dataclass
class Processes:
    """One contender's processes of a case, in the order of the rounds; `first` is the one before them."""

    contender: Contender
    first: dict[str, Any] | None = None
    counted: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    worst: float = 0.0

    def add(self, process: dict[str, Any], cached: float, worst: float, *, counts: bool) -> None:
        self.worst = larger(self.worst, worst)
        if not counts:
            self.first = process
            return
        self.counted.append(process)
        self.cached.append(cached)
        if self.contender.parts is not None:
            parts = self.contender.parts(process["output"])
            self.parts.append({**parts, REST: process["wall_s"] - sum(parts.values())})

    @property
    def right(self) -> bool:
        return self.worst <= self.contender.allowed

    def walls(self) -> list[float]:
        return [process["wall_s"] for process in self.counted]

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: summary([float(process[name]) for process in self.counted]) for name in FIGURES}
        found["all_wall_s"] = self.walls()
        found["first_wall_s"] = None if self.first is None else self.first["wall_s"]
        found["status"] = 0  # another one ends the bench
        if self.parts:
            found["parts_s"] = {name: summary([parts[name] for parts in self.parts]) for name in self.parts[0]}
            found |= {"worst_difference": self.worst, "allowed_difference": self.contender.allowed, "right": self.right}
        return found


def summarized(data: Dataset, found: dict[str, Processes]) -> dict[str, Any]:
    """A case as it goes into the report."""
    result: dict[str, Any] = {
        "bytes_in": data.x.stat().st_size,
        "source_cached_share": summary([share for one in found.values() for share in one.cached]),
        "processes": {name: one.as_dict() for name, one in found.items()},
        "right": all(one.right for one in found.values()),
    }
    if OURS in found:
        ours = found[OURS]
        said = [seconds for process in ours.counted if (seconds := ours_says_s(process["output"])) is not None]
        if said:
            result["ours_says_s"] = summary(said)
        if PLAIN in found:
            pairs = zip(found[PLAIN].walls(), ours.walls(), strict=True)
            ratios = [plain / mine for plain, mine in pairs]
            of_medians = statistics.median(found[PLAIN].walls()) / statistics.median(ours.walls())
            result["times_as_fast_as_plain"] = {"of_medians": of_medians, **summary(ratios)}
        if CONTEXT in found:
            beyond = statistics.median(ours.walls()) - statistics.median(found[CONTEXT].walls())
            result["beyond_a_context_s"] = beyond
    return result


def show(title: str, found: dict[str, Any]) -> None:
    """Print a case: a line a contender, and under it where its time went."""
    print(
        f"{title}: {found['bytes_in'] / 1e9:.2f} GB in; {found['source_cached_share']['median']:.0%} of the source in "
        f"the page cache before each process"
    )
    processes = sorted(found["processes"].items(), key=lambda item: item[1]["wall_s"]["median"])
    for name, row in processes:
        wall = row["wall_s"]
        checked = "" if "right" not in row else ", right" if row["right"] else ", WRONG RESULT"
        print(
            f"  {name:30} {wall['median']:7.2f} s ({wall['min']:.2f} to {wall['max']:.2f}; first "
            f"{row['first_wall_s']:.2f}), user {row['user_s']['median']:.1f} s, system "
            f"{row['system_s']['median']:.1f} s, peak {row['peak_resident_bytes']['median'] / 2**20:.0f} MiB{checked}"
        )
        if "parts_s" in row:
            parts = ", ".join(f"{part} {seconds['median']:.2f}" for part, seconds in row["parts_s"].items())
            print(f"      {parts}")
    if "ours_says_s" in found:
        print(f"  {OURS} says that its process took {found['ours_says_s']['median']:.2f} s")
    if "times_as_fast_as_plain" in found:
        ratio = found["times_as_fast_as_plain"]
        print(
            f"  {OURS} is {ratio['of_medians']:.2f} times as fast as the plain script ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f} in the rounds)"
        )
    if "beyond_a_context_s" in found:
        print(f"  {OURS} takes {found['beyond_a_context_s']:.2f} s beyond a bare CUDA context")
