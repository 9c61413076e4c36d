"""A timeline as a picture: some chunks from the middle of a run on every lane. Drawn with Matplotlib (extra "plot")."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.instrument import STAGE_COLORS, STAGES, Interval
from pipeline.report.advice import bound_text
from pipeline.report.record import Ends, Parts
from pipeline.report.stages import StageStats
from pipeline.report.timeline import DeviceUse, Timeline, device_use, lanes_of

COLORS = {stage: f"#{color:06X}" for stage, color in STAGE_COLORS.items()}
NOTHING = "No operations were recorded: the run had no rows."
CHUNKS = 10


@dataclass(frozen=True)
class DrawnLane:
    """One lane to draw: `rows` without overlaps share the height from `low` to `high`. The first lane is on top."""

    device: str
    stage: str
    low: float
    high: float
    rows: list[list[Interval]]

    def boxes(self) -> Iterator[tuple[Interval, float, float]]:
        """Each operation with its bottom and its top."""
        height = (self.high - self.low) / len(self.rows)
        for number, row in enumerate(self.rows):
            for interval in row:
                top = self.high - number * height
                yield interval, top - height, top


def drawn_lanes(devices: dict[str, list[Interval]]) -> list[DrawnLane]:
    """The lanes of all devices from top to bottom, with room between devices."""
    lanes, y = [], 0.0
    for device, operations in devices.items():
        for stage in STAGES:
            rows = lanes_of(operations, stage)
            if rows:
                lanes.append(DrawnLane(device, stage, y - 0.9, y - 0.1, rows))
                y -= 1.0
        y -= 0.4
    return lanes


def within(timeline: Timeline, start_s: float, end_s: float) -> dict[str, list[Interval]]:
    """Each device's operations that touch the window."""
    return {
        device: [i for i in operations if i.end_s > start_s and i.start_s < end_s]
        for device, operations in timeline.devices.items()
    }


def uses_of(timeline: Timeline) -> dict[str, DeviceUse]:
    """How each device that did something was used in its steady window."""
    return {device: device_use(operations) for device, operations in timeline.devices.items() if operations}


def headline(timeline: Timeline, stats: dict[str, Any] | None) -> str:
    """What the run reached, or where no figures came along, what it ran on."""
    if stats is None:
        return ", ".join(f"{device} {timeline.hardware.get(device, '')}".strip() for device in timeline.devices)
    return (
        f"{stats['rows']:,} rows in {stats['seconds']:.3f} s: {stats['gb_per_s_in']:.1f} GB/s in, "
        f"{stats['gb_per_s_out']:.1f} GB/s out, {stats['tflops']:.1f} TFLOP/s"
    )


def verdict(stats: dict[str, Any] | None) -> str:
    """The bound against its ceiling, and the advice."""
    if stats is None or not stats["advice"]:
        return ""
    stages = {name: StageStats(**stage) for name, stage in stats["stages"].items()}
    text = bound_text(stats["bound"], stages, _parts(stats), Ends(**stats.get("ends", {})))
    return f"{text[0].upper()}{text[1:]}. To go faster: {stats['advice']}."


def parts_text(stats: dict[str, Any] | None) -> str:
    """Set-up, run and finish, where they matter."""
    return "" if stats is None else _parts(stats).text()


def _parts(stats: dict[str, Any]) -> Parts:
    """Of the figures in a trace. Older ones have no set-up: their seconds count from the first chunk on."""
    run_s = stats.get("run_s", stats["seconds"] - stats["finish_s"])
    return Parts(stats.get("setup_s", 0.0), run_s, stats["finish_s"])


def excerpt(operations: list[Interval], chunks: int = CHUNKS) -> tuple[float, float]:
    """A window in the middle of the run that about `chunks` chunks pass through.

    Raises:
        ValueError: no operations.
    """
    starts: dict[int, float] = {}
    for interval in operations:
        starts[interval.chunk] = min(interval.start_s, starts.get(interval.chunk, interval.start_s))
    times = sorted(starts.values())
    if len(times) <= chunks:
        return min(i.start_s for i in operations), max(i.end_s for i in operations)
    first = (len(times) - chunks) // 2
    return times[first], times[first + chunks]


def draw_png(path: Path, timeline: Timeline, stats: dict[str, Any] | None) -> None:
    """A picture: some chunks from the middle of the run on every lane, and each lane's use over the steady window."""
    from matplotlib.figure import Figure

    uses = uses_of(timeline)
    if not uses:
        figure = Figure(figsize=(6, 1))
        figure.text(0.5, 0.5, NOTHING, ha="center")
        figure.savefig(path, format="png")
        return
    start_s, end_s = excerpt(timeline.devices[next(iter(uses))])
    lanes = drawn_lanes(within(timeline, start_s, end_s))
    bottom = lanes[-1].low
    figure = Figure(figsize=(13, 2.1 - 0.55 * bottom), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=[5.2, 1], sharey=True)
    span = end_s - start_s
    for lane in lanes:
        for interval, low, high in lane.boxes():
            left, right = max(interval.start_s, start_s), min(interval.end_s, end_s)
            axes.broken_barh(
                [((left - start_s) * 1e3, (right - left) * 1e3)],
                (low, high - low),
                facecolor=COLORS[lane.stage],
                alpha=1.0 if interval.chunk % 2 else 0.62,
                edgecolor="white",
                linewidth=0.4,
            )
            if right - left > 0.025 * span and high - low > 0.5:
                middle = ((left + right) / 2 - start_s) * 1e3
                dark = lane.stage == "D2H" and interval.chunk % 2
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if dark else "black"}
                axes.text(middle, (low + high) / 2, str(interval.chunk), **style)
        use = uses[lane.device].lanes[lane.stage]
        bars.barh((lane.low + lane.high) / 2, 1, lane.high - lane.low, color="#EEEEEE")
        bars.barh((lane.low + lane.high) / 2, use.busy_share, lane.high - lane.low, color=COLORS[lane.stage])
        bars.text(1.04, (lane.low + lane.high) / 2, f"{use.busy_share:.0%}", va="center", fontsize=9)
    many = len(uses) > 1
    names = [f"{lane.device} {lane.stage}" if many else lane.stage for lane in lanes]
    axes.set_yticks([(lane.low + lane.high) / 2 for lane in lanes], names)
    axes.set_ylim(bottom - 0.15, 0.05)
    axes.set_xlim(0, span * 1e3)
    axes.set_xlabel(f"ms from {start_s * 1e3:,.1f} ms into the run; numbers are chunks, neighbours differ in shade")
    bars.set_xlim(0, 1.3)
    bars.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    bars.set_xlabel("busy, steady window")
    bars.tick_params(left=False, labelleft=False)
    for each in (axes, bars):
        each.spines[["top", "right", "left"]].set_visible(False)
        each.tick_params(axis="y", length=0)
    title = [headline(timeline, stats), parts_text(stats), verdict(stats)]
    first = next(iter(uses.values()))
    if first.kernel_hidden_share is not None:
        title.append(
            f"Kernel time hidden behind copies: {first.kernel_hidden_share:.1%}; copy time behind kernels: "
            f"{first.copy_hidden_share or 0:.1%}. Read from the {timeline.origin}."
        )
    lines = [line for text in filter(None, title) for line in textwrap.wrap(text, 150)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, format="png", dpi=110)
