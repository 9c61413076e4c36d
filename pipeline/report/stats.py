"""What a run reports, made from its record alone: rates, each stage's use, shares of ceilings, bound and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.instrument import Ceilings
from pipeline.report.advice import advice, bound, bound_text
from pipeline.report.record import Ends, Parts, Record
from pipeline.report.stages import StageStats, stage_stats, stage_table
from pipeline.report.timeline import device_use


@dataclass(frozen=True)
class Stats:
    """The figures of one run. Seconds are wall time, GB/s are 1e9 bytes per second.

    `seconds` count from the call until the result is complete. They are the sum of `setup_s`, `run_s` and `finish_s`
    (see `Parts`), which a simulated device counts on its own clock, without what came before the device. Rates of the
    run (`rows_per_s`, `gb_per_s_in`, `gb_per_s_out`, `tflops`) are over `seconds`; busy and waiting times, rates and
    ceiling shares of `stages` are over `run_s`.

    `bound` is the part of the run that is at its limit: a stage, "set-up", "disk" (finishing a file) or "finish" (any
    other result). It is "none" where no part is, and for an empty run (see `bound` in pipeline/report/advice.py).
    """

    rows: int
    seconds: float
    setup_s: float  # until the first row began to move
    run_s: float  # rows moved
    finish_s: float  # after the last row was stored: a file is synced and gets its name
    rows_per_s: float
    bytes_in: int
    bytes_out: int
    gb_per_s_in: float
    gb_per_s_out: float
    tflops: float
    stages: dict[str, StageStats]
    bound: str
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
    ends: Ends  # where rows came from and went to

    @property
    def parts(self) -> Parts:
        """The seconds by what went on in them."""
        return Parts(self.setup_s, self.run_s, self.finish_s)

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
        if self.parts.text():
            out.append(self.parts.text())
        if self.advice:
            out.append(self.bound_line())
            out.append(f"to go faster: {self.advice}")
        if self.kernel_hidden_share is not None:
            out.append(f"{self.kernel_hidden_share:.0%} of the kernels' time was hidden behind copies")
        return out

    def bound_line(self) -> str:
        """The bound, its use, and how near it came to its measured ceiling (`bound_text`)."""
        origin = next((found.origin for found in self.ceilings.values() if found.origin), "")
        return bound_text(self.bound, self.stages, self.parts, self.ends, origin)


def stats_of(record: Record) -> Stats:
    """The figures of a run. That may take as long as a short run did."""
    setup, rows, parts = record.setup, record.rows, record.parts
    ends, seconds = setup.ends, parts.seconds
    ceilings = {name: comparable(found, ends) for name, found in setup.ceilings.items()}
    bytes_in, bytes_out = rows * setup.in_row_bytes, rows * setup.out_row_bytes
    flop = 2 * rows * setup.in_features * setup.out_features
    uses = [device_use(operations) for operations in record.timeline().devices.values()]
    stages = stage_stats(record.recorders, parts.run_s, uses, ceilings, flop)
    return Stats(
        rows=rows,
        seconds=seconds,
        setup_s=parts.setup_s,
        run_s=parts.run_s,
        finish_s=parts.finish_s,
        rows_per_s=rows / seconds if seconds else 0.0,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        gb_per_s_in=bytes_in / seconds / 1e9 if seconds else 0.0,
        gb_per_s_out=bytes_out / seconds / 1e9 if seconds else 0.0,
        tflops=flop / seconds / 1e12 if seconds else 0.0,
        stages=stages,
        bound=bound(stages, parts, ends),
        advice=advice(stages, parts, setup.runs_as, next(iter(setup.devices)) == "cpu", ends),
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
        ends=ends,
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
