"""What a run reports, made from its record alone: rates, each stage's use, shares of ceilings, bound and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.instrument import Ceilings
from pipeline.report.advice import advice, bound
from pipeline.report.record import Ends, Record
from pipeline.report.stages import StageStats, rate_text, stage_stats, stage_table
from pipeline.report.timeline import device_use


@dataclass(frozen=True)
class Stats:
    """The figures of one run. Seconds are wall time, GB/s are 1e9 bytes per second."""

    rows: int
    seconds: float  # until the result is complete
    finish_s: float  # their part after the last row was stored: a file is synced and gets its name
    rows_per_s: float
    bytes_in: int
    bytes_out: int
    gb_per_s_in: float
    gb_per_s_out: float
    tflops: float
    stages: dict[str, StageStats]
    bound: str  # the stage nearest to its limit, or "disk" (see `bound`); "none" for an empty run
    advice: str  # one sentence: what would make the run faster; "" for an empty run
    ceilings: dict[str, Ceilings]  # those devices have some whose buses were measured
    kernel_hidden_share: float | None  # the part of the kernels' time while a copy ran as well
    copy_hidden_share: float | None  # the part of the copies' time, either way, while a kernel ran as well
    devices: dict[str, str]  # name: hardware
    kernel: str
    precision: str  # that was asked for
    runs_as: str  # that ran
    exact_rows: int  # in "fp32", rows whose range asked for exact fp32 ("ieee")
    wire: str  # the element type that crossed the bus on the way in
    chunk_rows: int
    num_streams: int
    chunks: int
    copy_workers: str
    piece_bytes: int  # the pinned rings have so many, of rows as they cross the bus
    ring_pieces: int
    staging_origin: str  # where these two and the number of copy workers come from
    pinned_bytes: int
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report as text: a summary, a table of the stages, the bound and what to do about it."""
        out = [
            f"{self.rows:,} rows in {self.seconds:.3f} s: {self.rows_per_s:,.0f} rows/s, "
            f"{self.gb_per_s_in:.2f} GB/s in, {self.gb_per_s_out:.2f} GB/s out",
            f"on {', '.join(f'{name} ({hardware})' for name, hardware in self.devices.items())}",
            f"{self.kernel}; precision {self.precision}, ran as {self.runs_as}"
            + (f", {self.exact_rows:,} rows in exact fp32" if self.exact_rows else ""),
            f"chunks: {self.chunks} of up to {self.chunk_rows} rows; streams: {self.num_streams}; "
            f"{self.pinned_bytes / 2**20:.0f} MiB pinned",
            f"{self.copy_workers}; ring: {self.ring_pieces} pieces of {self.piece_bytes / 2**20:g} MiB each way; "
            f"{self.staging_origin}",
            *stage_table(self.stages),
        ]
        if self.finish_s > 0.01 * self.seconds:
            out.append(f"completing the result took {self.finish_s:.3f} s after its last row was stored")
        if self.bound != "none":
            out.append(self.bound_line())
            out.append(f"to go faster: {self.advice}")
        if self.kernel_hidden_share is not None:
            out.append(f"{self.kernel_hidden_share:.0%} of the kernels' time was hidden behind copies")
        return out

    def bound_line(self) -> str:
        """The bound, its use, and how near it came to its measured ceiling."""
        if self.bound == "disk":
            return (
                f"bound by disk: {self.finish_s / self.seconds:.0%} of the time went by after the last row was stored"
            )
        stage = self.stages[self.bound]
        text = f"bound by {self.bound}: busy {stage.busy_share:.0%} of the time"
        if stage.ceiling is not None and stage.ceiling_share is not None:
            origin = next((f" ({c.origin})" for c in self.ceilings.values() if c.origin), "")
            text += f", at {stage.ceiling_share:.0%} of its ceiling of {rate_text(self.bound, stage.ceiling)}{origin}"
        return text


def stats_of(record: Record) -> Stats:
    """The figures of a run. That may take as long as a short run did."""
    setup, rows, seconds = record.setup, record.rows, record.seconds
    ends = setup.ends
    finish_share = record.finish_s / seconds if seconds and ends.target == "file" else 0.0
    ceilings = {name: comparable(found, ends) for name, found in setup.ceilings.items()}
    bytes_in, bytes_out = rows * setup.in_row_bytes, rows * setup.out_row_bytes
    flop = 2 * rows * setup.in_features * setup.out_features
    uses = [device_use(operations) for operations in record.timeline().devices.values()]
    stages = stage_stats(record.recorders, seconds, uses, ceilings, flop)
    return Stats(
        rows=rows,
        seconds=seconds,
        finish_s=record.finish_s,
        rows_per_s=rows / seconds if seconds else 0.0,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        gb_per_s_in=bytes_in / seconds / 1e9 if seconds else 0.0,
        gb_per_s_out=bytes_out / seconds / 1e9 if seconds else 0.0,
        tflops=flop / seconds / 1e12 if seconds else 0.0,
        stages=stages,
        bound=bound(stages, finish_share),
        advice=advice(stages, setup.runs_as, next(iter(setup.devices)) == "cpu", ends, finish_share),
        ceilings=ceilings,
        kernel_hidden_share=mean_share([use.kernel_hidden_share for use in uses]),
        copy_hidden_share=mean_share([use.copy_hidden_share for use in uses]),
        devices=setup.devices,
        kernel=setup.kernel,
        precision=setup.precision,
        runs_as=setup.runs_as,
        exact_rows=record.exact_rows,
        wire=setup.wire,
        chunk_rows=setup.chunk_rows,
        num_streams=setup.num_streams,
        chunks=stages["kernel"].count,
        copy_workers=setup.copy_workers,
        piece_bytes=setup.staging.piece_bytes,
        ring_pieces=setup.staging.ring_pieces,
        staging_origin=setup.staging.origin,
        pinned_bytes=setup.pinned_bytes,
        source=setup.source,
    )


def comparable(found: Ceilings, ends: Ends) -> Ceilings:
    """The ceilings that a run between these ends can be compared with: those of fills and drains are of memory."""
    return replace(
        found,
        fill_gb_per_s=None if ends.source == "file" else found.fill_gb_per_s,
        drain_gb_per_s=None if ends.target == "file" else found.drain_gb_per_s,
    )


def ceiling_rows_per_s(
    ceilings: Mapping[str, Ceilings], devices: Sequence[str], in_row_bytes: int, out_row_bytes: int, row_flop: int
) -> float | None:
    """Rows per second that the buses and kernels of all `devices` allow; None where one has no measured bus."""
    total = 0.0
    for device in devices:
        found = ceilings.get(device)
        if found is None or found.h2d_gb_per_s is None or found.d2h_gb_per_s is None:
            return None
        limits = [found.h2d_gb_per_s * 1e9 / in_row_bytes, found.d2h_gb_per_s * 1e9 / out_row_bytes]
        if found.kernel_tflops is not None:
            limits.append(found.kernel_tflops * 1e12 / row_flop)
        total += min(limits)
    return total or None


def mean_share(shares: Sequence[float | None]) -> float | None:
    """The mean over the devices that have one."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
