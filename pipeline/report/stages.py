"""What each stage of a run did, over all its devices: totals, rates, shares of the measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.instrument import STAGES, Ceilings, Recorder
from pipeline.report.timeline import DeviceUse, causes_text


@dataclass(frozen=True)
class StageStats:
    """One stage over all devices of a run. `busy_s` counts overlapping operations of a device once.

    Rates and shares are over the time in which rows moved (`Stats.run_s`), without set-up and finishing. `rate` is
    GB/s, for the kernel TFLOP/s; `ceiling` is the same of the measured ceilings of all devices together. It is None
    where a device has none, and where the run was faster: what a run beats was measured too low. Where that run was
    large enough to be a measurement, it has raised the ceiling already (`Tuning.raise_to`); a smaller one has no
    ceiling to compare with. So no share is more than 1. `waiting_for` gives the shares of the waiting time by cause
    (fill, bus, kernel, drain, host), from the operations that were kept.
    """

    count: int
    bytes: int
    busy_s: float
    busy_share: float  # averaged over the devices
    waiting_s: float = 0.0
    waiting_for: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    ceiling: float | None = None
    ceiling_share: float | None = None


def stage_table(stages: Mapping[str, StageStats]) -> list[str]:
    """The stages as lines of text."""
    out = [f"{'stage':<8}{'count':>8}{'GB':>9}{'busy s':>9}{'busy':>6}{'wait':>6}{'rate':>14}{'ceiling':>9}  waits for"]
    for name, stage in stages.items():
        share = stage.ceiling_share
        out.append(
            f"{name:<8}{stage.count:>8}{stage.bytes / 1e9:>9.2f}{stage.busy_s:>9.3f}"
            f"{stage.busy_share:>6.0%}{1 - stage.busy_share if stage.count else 0:>6.0%}"
            f"{rate_text(name, stage.rate):>14}"
            f"{'-' if share is None else f'{share:.0%}':>9}  {causes_text(stage.waiting_for)}"
        )
    return out


def rate_text(stage: str, rate: float) -> str:
    """A stage's rate with its unit."""
    return f"{rate:{'.1f' if rate >= 10 else '.2f'}} {'TFLOP/s' if stage == 'kernel' else 'GB/s'}"


def stage_stats(
    recorders: Sequence[Recorder],
    run_s: float,
    uses: Sequence[DeviceUse] = (),
    ceilings: Mapping[str, Ceilings] | None = None,
    flop: float = 0.0,
) -> dict[str, StageStats]:
    """Totals of each stage over the devices' records of a run in which rows moved for `run_s` seconds and kernels did
    `flop` operations."""
    stages = {}
    known = [(ceilings or {}).get(recorder.device) for recorder in recorders]
    for name in STAGES:
        totals = [recorder.totals[name] for recorder in recorders]
        count, n_bytes = sum(total.count for total in totals), sum(total.bytes for total in totals)
        # NOTE: a GPU's clock is tied to the host's to within some microseconds. By the host's clock all of it was seen
        # to be done while rows moved.
        busy_s = sum(min(total.busy_s, run_s) for total in totals)
        available_s = run_s * len(recorders)
        each = [None if found is None else found.of(name) for found in known]
        ceiling = sum(value for value in each if value is not None) if each and None not in each else None
        rate = (flop / 1e12 if name == "kernel" else n_bytes / 1e9) / run_s if run_s > 0 else 0.0
        if ceiling is not None and rate > ceiling:
            ceiling = None
        stages[name] = StageStats(
            count,
            n_bytes,
            busy_s,
            busy_share=min(1.0, busy_s / available_s) if available_s > 0 else 0.0,  # a sum of parts may round up
            waiting_s=max(0.0, available_s - busy_s) if count else 0.0,
            waiting_for=_causes(uses, name) if count else {},
            rate=rate,
            ceiling=ceiling,
            ceiling_share=rate / ceiling if ceiling and count else None,
        )
    return stages


def _causes(uses: Sequence[DeviceUse], stage: str) -> dict[str, float]:
    waiting_s = sum(use.lanes[stage].waiting_s for use in uses)
    causes: dict[str, float] = {}
    for use in uses:
        for cause, seconds in use.lanes[stage].waiting_for.items():
            causes[cause] = causes.get(cause, 0.0) + seconds / waiting_s
    return causes


def nearness(stage: StageStats) -> float:
    """How near a stage came to its limit while rows moved: the share of that time that it was busy or, where that is
    more, of its measured ceiling. Fills and drains share the copy workers, whose ceiling is for both at once: they can
    be the limit while each is busy half of the time."""
    return max(stage.busy_share, stage.ceiling_share or 0.0)
