"""What a workload would reach on given hardware, and what would bound it: the executor's loop on the simulated device.

One GPU's share of the rows runs through the real executor, on a virtual clock, with the measured rates of a machine and
without touching data. What GPUs and hosts share (bus, host memory, disks, storage, network) limits those rates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import GIB
from pipeline.instrument import bus_rates
from pipeline.plan.machine import Machine, of_gpus
from pipeline.plan.memory import memory_of, problems
from pipeline.plan.simulate import StageRates, simulate
from pipeline.plan.workload import Workload, check
from pipeline.report.advice import NEAR, NONE


@dataclass(frozen=True)
class Prediction:
    """What a workload would reach. `limits` are rows per second that each part alone would allow, all GPUs together;
    `lowest` names the lowest of them, and `lowest_share` is how much of it is reached. That limit is the `bound` where
    it is nearly reached (75%, as in the reports of runs); else nothing is, "none": the lanes aren't kept full.

    Rates and seconds are None where the chunks don't fit a GPU: nothing was simulated.
    """

    rows_per_s: float | None
    gb_per_s_in: float | None
    gb_per_s_out: float | None
    seconds: float | None
    bound: str
    lowest: str
    lowest_share: float | None
    limits: dict[str, float]
    busy_shares: dict[str, float]  # one GPU's lanes, before storage and network limit them
    chunk_rows: int
    gpu_memory_bytes: int  # one GPU's weights and slots
    pinned_bytes: int  # one GPU's rings
    host_memory_bytes: int  # one host's rings, and the arrays
    problems: list[str]  # why it wouldn't run at all
    notes: list[str]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The prediction as text."""
        limits = ", ".join(f"{name} {rows:,.0f}" for name, rows in sorted(self.limits.items(), key=lambda x: x[1]))
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in self.busy_shares.items() if share > 0)
        lines = [f"it would not run: {problem}" for problem in self.problems]
        if self.rows_per_s is not None and self.seconds is not None and self.lowest_share is not None:
            reached = f"at {self.lowest_share:.0%} of what it allows"
            if self.bound == NONE:
                reached = (
                    f"at {self.lowest_share:.0%} of the lowest limit, {self.lowest}; the lanes are empty for "
                    f"much of the time: the job is short, or its chunks are few and large"
                )
            lines += [
                f"{self.rows_per_s:,.0f} rows/s, {self.gb_per_s_in:.1f} GB/s in, {self.gb_per_s_out:.1f} GB/s out, "
                f"{_duration(self.seconds)} in all, without start-up",
                f"bound by {self.bound}, {reached}",
                f"a GPU's lanes: {busy}; chunks of {self.chunk_rows:,} rows",
            ]
        return [
            *lines,
            f"rows/s that each part alone allows: {limits}",
            f"memory: {self.gpu_memory_bytes / GIB:,.2f} GiB on each GPU, {self.pinned_bytes / GIB:,.2f} GiB pinned "
            f"for each, {self.host_memory_bytes / GIB:,.1f} GiB on each host",
            *self.notes,
            f"hardware: {self.machine}",
        ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def predict(work: Workload, machine: Machine) -> Prediction:
    """What the workload would reach on hosts of this kind.

    Raises:
        OptionError, DTypeError: the machine has no rate for this precision, GPUs and hosts don't divide, or a
            value can't be.
    """
    check(work, machine)
    options, rows_each = work.options, -(-work.rows // work.gpus)
    most = options.most_chunk_rows(max(work.wire_row_bytes))
    chunk_rows = options.rows_per_chunk(-(-work.rows // work.hosts), work.gpus_per_host, most)
    limits = _limits(work, machine)
    lowest = min(limits, key=lambda name: limits[name])
    memory = memory_of(work, chunk_rows)
    rate = seconds = None
    busy_shares: dict[str, float] = {}
    if memory.gpu_bytes <= machine.gpu_memory_bytes:
        simulated = simulate(
            _stage_rates(work, machine, limits),
            work.wire,
            rows_each,
            staged_in=work.staged_in,
            staged_out=work.staged_out,
            chunk_rows=chunk_rows,
            num_streams=options.streams,
        )
        busy_shares = simulated.busy_shares
        stages_s = simulated.seconds + (rows_each - simulated.rows) / simulated.steady_rows_per_s
        run_us = machine.staged_run_us if work.staged_in or work.staged_out else machine.pinned_run_us
        seconds = max(stages_s, work.rows / limits[lowest]) + run_us * 1e-6
        rate = work.rows / seconds
    share = None if rate is None else rate / limits[lowest]
    return Prediction(
        rows_per_s=rate,
        gb_per_s_in=None if rate is None else rate * work.in_row_bytes / 1e9,
        gb_per_s_out=None if rate is None else rate * work.out_row_bytes / 1e9,
        seconds=seconds,
        bound=lowest if share is not None and share >= NEAR else NONE,
        lowest=lowest,
        lowest_share=share,
        limits=limits,
        busy_shares=busy_shares,
        chunk_rows=chunk_rows,
        gpu_memory_bytes=memory.gpu_bytes,
        pinned_bytes=memory.pinned_bytes,
        host_memory_bytes=memory.host_bytes,
        problems=problems(work, machine, memory, chunk_rows),
        notes=_notes(work, machine),
        machine=f"{work.gpus} x {machine.gpu} on {work.hosts} host{'s' if work.hosts > 1 else ''} ({machine.origin})",
    )


def _limits(work: Workload, machine: Machine) -> dict[str, float]:
    """Rows per second that each part alone would allow, all GPUs and hosts together."""
    each = work.gpus_per_host
    in_wire_bytes, out_wire_bytes = work.wire_row_bytes
    bus = (machine.h2d_gb_per_s, machine.d2h_gb_per_s, machine.duplex_gb_per_s)
    h2d, d2h = bus_rates(in_wire_bytes, out_wire_bytes, *(of_gpus(measured, each) for measured in bus))
    gb = 1e9
    limits = {
        "H2D": work.hosts * h2d * gb / in_wire_bytes,
        "kernel": work.gpus * machine.kernel_tflops[work.runs_as] * 1e12 / (2 * work.in_features * work.out_features),
        "D2H": work.hosts * d2h * gb / out_wire_bytes,
    }
    if work.staged_in:
        limits["fill"] = work.gpus * machine.fill_gb_per_s * gb / work.in_row_bytes
    if work.out == "fresh":
        limits["drain"] = work.hosts * machine.fresh_gb_per_s * gb / work.out_row_bytes
    elif work.staged_out:
        limits["drain"] = work.gpus * machine.drain_gb_per_s * gb / work.out_row_bytes
    if work.staged_in or work.staged_out:
        limits["host memory"] = work.hosts * of_gpus(machine.copy_gb_per_s, each) * gb / sum(_staged_bytes(work))

    in_file_bytes = work.in_row_bytes if work.source == "file" else 0
    out_file_bytes = work.out_row_bytes if work.out == "file" else 0
    if not in_file_bytes + out_file_bytes:
        return limits
    if work.storage_gb_per_s is not None:
        limits["storage"] = work.storage_gb_per_s * gb / (in_file_bytes + out_file_bytes)
    if work.network_gb_per_s is not None:
        limits["network"] = work.hosts * work.network_gb_per_s * gb / max(in_file_bytes, out_file_bytes)
    if work.storage_gb_per_s is None and work.network_gb_per_s is None:
        if in_file_bytes and _is_cached(work, machine):
            limits["page cache"] = work.hosts * machine.cached_read_gb_per_s * gb / in_file_bytes
        elif in_file_bytes:
            limits["disk read"] = work.hosts * machine.disk_read_gb_per_s * gb / in_file_bytes
        if out_file_bytes:
            limits["disk write"] = work.hosts * machine.disk_write_gb_per_s * gb / out_file_bytes
    return limits


def _staged_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of a row that copy workers read from the source, and that they write to the result."""
    return work.in_row_bytes if work.staged_in else 0, work.out_row_bytes if work.staged_out else 0


def _is_cached(work: Workload, machine: Machine) -> bool:
    """Whether each host's memory can hold its part of the source's file."""
    return -(-work.rows // work.hosts) * work.in_row_bytes <= machine.host_memory_bytes


def _stage_rates(work: Workload, machine: Machine, limits: dict[str, float]) -> StageRates:
    """What each stage of one GPU would move, with all GPUs at work."""

    def lowest(*names: str) -> float:
        return min(limits.get(name, math.inf) for name in names) / work.gpus

    fill_bytes, drain_bytes = _staged_bytes(work)
    return StageRates(
        fill=lowest("fill", "page cache", "disk read"),
        h2d=lowest("H2D"),
        kernel=lowest("kernel"),
        d2h=lowest("D2H"),
        drain=lowest("drain", "disk write"),
        memory=lowest("host memory"),
        fill_share=fill_bytes / max(1, fill_bytes + drain_bytes),
        pause_s=machine.copy_pause_us * 1e-6,
    )


def _notes(work: Workload, machine: Machine) -> list[str]:
    """What a reader should know of how the limits were found."""
    notes, each = [], work.gpus_per_host
    together, alone = (of_gpus(machine.duplex_gb_per_s, n) for n in (each, 1))
    if together < 0.99 * each * alone:
        notes.append(
            f"the {each} GPUs of a host share its bus: {together:.1f} GB/s each way together, one alone {alone:.1f}"
        )
    if "file" in (work.source, work.out):
        if work.storage_gb_per_s is not None or work.network_gb_per_s is not None:
            notes.append("files are taken to lie on shared storage: the hosts' own disks don't count")
        elif work.source == "file":
            where = "its host's page cache" if _is_cached(work, machine) else "the disk, as memory can't hold it"
            notes.append(f"the source's file is taken to be read from {where}")
    elif work.storage_gb_per_s is not None or work.network_gb_per_s is not None:
        notes.append("storage and network don't count: neither end is a file")
    return notes
