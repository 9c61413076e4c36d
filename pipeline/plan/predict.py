"""What a job would reach on given hardware, and what would bound it: the executor's own loop on the simulated device.

One GPU's share of the job runs through the real executor, on a virtual clock, with the measured rates of a machine and
without touching data. What GPUs and hosts share (bus, host memory, disks, storage, network) limits those rates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import DEFAULT_STREAMS, GIB, auto_chunk_rows, rows_a_chunk
from pipeline.dtypes import DType, wire_dtypes
from pipeline.errors import OptionError
from pipeline.instrument import bus_rates
from pipeline.plan.machine import Machine, is_rate, of_gpus
from pipeline.plan.simulate import StageRates, ring_bytes, simulate
from pipeline.staging.movers import Wire

SOURCES = ("pinned", "array", "file")
OUTPUTS = (*SOURCES, "fresh")
_MOST = 2**63 - 1  # of rows, features, GPUs and the like
_SHORT = 0.75  # of its bound's rate: a job that reaches less doesn't keep its lanes full


@dataclass(frozen=True)
class Job:
    """A job to be planned. `source` and `out` say where rows are: "pinned" memory, an ordinary "array", or a "file";
    `out` may be "fresh" too, a new array.

    `dtype` is the source's element type, `wire_dtype` and `out_dtype` are as in `Pipeline`. `gpus` are those of all
    hosts together. Files lie on each host's own disk, unless `storage_gb_per_s` (that all hosts together read and
    write) or `network_gb_per_s` (of each host, each way) says that hosts reach them on shared storage.
    """

    rows: int
    in_features: int
    out_features: int
    dtype: DType
    runs_as: str
    source: str = "array"
    out: str = "array"
    gpus: int = 1
    hosts: int = 1
    chunk_rows: int | None = None
    num_streams: int = DEFAULT_STREAMS
    wire_dtype: DType | None = None
    out_dtype: DType | None = None
    storage_gb_per_s: float | None = None
    network_gb_per_s: float | None = None

    @property
    def wire(self) -> Wire:
        """The rows as they cross the bus."""
        return Wire(
            self.in_features, self.out_features, *wire_dtypes(self.dtype, self.wire_dtype, self.out_dtype or self.dtype)
        )

    @property
    def in_row_bytes(self) -> int:
        return self.in_features * self.dtype.itemsize

    @property
    def out_row_bytes(self) -> int:
        return self.out_features * (self.out_dtype or self.dtype).itemsize

    @property
    def staged_in(self) -> bool:
        """Whether rows come through copy workers and a ring."""
        return self.source != "pinned" or self.wire.dtype is not self.dtype

    @property
    def staged_out(self) -> bool:
        return self.out != "pinned" or self.wire.out_dtype is not (self.out_dtype or self.dtype)

    @property
    def gpus_a_host(self) -> int:
        return self.gpus // self.hosts


@dataclass(frozen=True)
class Prediction:
    """What a job would reach. `limits` are rows a second that each part alone would allow, all GPUs together; `bound`
    is the lowest of them, and `bound_share` how much of it the job reaches.

    Rates and seconds are None where the chunks don't fit a GPU: nothing was simulated.
    """

    rows_per_s: float | None
    gb_per_s_in: float | None
    gb_per_s_out: float | None
    seconds: float | None
    bound: str
    bound_share: float | None
    limits: dict[str, float]
    busy_shares: dict[str, float]  # of a GPU's lanes, before what storage and network limit
    chunk_rows: int
    gpu_memory_bytes: int  # of one GPU: weights and slots
    pinned_bytes: int  # of one GPU's rings
    host_memory_bytes: int  # of one host: rings, and the job's arrays
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
        if self.rows_per_s is not None and self.seconds is not None and self.bound_share is not None:
            short = "; its lanes are empty for much of the time: the job is short, or its chunks are few and large"
            lines += [
                f"{self.rows_per_s:,.0f} rows/s, {self.gb_per_s_in:.1f} GB/s in, {self.gb_per_s_out:.1f} GB/s out, "
                f"{_duration(self.seconds)} in all, without start-up",
                f"bound by {self.bound}, at {self.bound_share:.0%} of what it allows"
                + (short if self.bound_share < _SHORT else ""),
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


def predict(job: Job, machine: Machine) -> Prediction:
    """What the job would reach on hosts of this kind.

    Raises:
        OptionError, DTypeError: the machine has no rate for this precision, GPUs and hosts don't divide, or a value of
            the job can't be.
    """
    _check_job(job, machine)
    rows_each = -(-job.rows // job.gpus)
    chunk_rows = job.chunk_rows or rows_a_chunk(
        -(-job.rows // job.hosts), job.gpus_a_host, auto_chunk_rows(max(_wire_bytes(job.wire)))
    )
    limits = _limits(job, machine)
    bound = min(limits, key=lambda name: limits[name])
    memory = _memory(job, chunk_rows)
    rate = seconds = None
    busy_shares: dict[str, float] = {}
    if memory.gpu_bytes <= machine.gpu_memory_bytes:
        simulated = simulate(
            _lanes(job, machine, limits),
            job.wire,
            rows_each,
            staged_in=job.staged_in,
            staged_out=job.staged_out,
            chunk_rows=chunk_rows,
            num_streams=job.num_streams,
        )
        busy_shares = simulated.busy_shares
        lanes_s = simulated.seconds + (rows_each - simulated.rows) / simulated.steady_rows_per_s
        run_us = machine.staged_run_us if job.staged_in or job.staged_out else machine.pinned_run_us
        seconds = max(lanes_s, job.rows / limits[bound]) + run_us * 1e-6
        rate = job.rows / seconds
    return Prediction(
        rows_per_s=rate,
        gb_per_s_in=None if rate is None else rate * job.in_row_bytes / 1e9,
        gb_per_s_out=None if rate is None else rate * job.out_row_bytes / 1e9,
        seconds=seconds,
        bound=bound,
        bound_share=None if rate is None else rate / limits[bound],
        limits=limits,
        busy_shares=busy_shares,
        chunk_rows=chunk_rows,
        gpu_memory_bytes=memory.gpu_bytes,
        pinned_bytes=memory.pinned_bytes,
        host_memory_bytes=memory.host_bytes,
        problems=_problems(job, machine, memory, chunk_rows),
        notes=_notes(job, machine),
        machine=f"{job.gpus} x {machine.gpu} on {job.hosts} host{'s' if job.hosts > 1 else ''} ({machine.origin})",
    )


def _wire_bytes(wire: Wire) -> tuple[int, int]:
    """Bytes of a row on the bus, in and out."""
    return wire.in_features * wire.dtype.itemsize, wire.out_features * wire.out_dtype.itemsize


@dataclass(frozen=True)
class _Memory:
    """What a job takes of a GPU, the part of it for weights, its slots' bytes for a row of a chunk; pinned bytes of a
    GPU's rings; bytes of a host."""

    gpu_bytes: int
    weight_bytes: int
    slot_row_bytes: int
    pinned_bytes: int
    host_bytes: int


def _memory(job: Job, chunk_rows: int) -> _Memory:
    in_wire_bytes, out_wire_bytes = _wire_bytes(job.wire)
    operands = 2 if job.runs_as == "fp32" else 1  # whose rows, of x and of W, are kept split as well
    weight_bytes = operands * (job.in_features + 1) * job.out_features * job.wire.dtype.itemsize
    slot_row_bytes = job.num_streams * (operands * in_wire_bytes + out_wire_bytes)
    pinned_bytes = ring_bytes(in_wire_bytes) if job.staged_in else 0
    pinned_bytes += ring_bytes(out_wire_bytes) if job.staged_out else 0
    arrays = sum(n for n, where in ((job.in_row_bytes, job.source), (job.out_row_bytes, job.out)) if where != "file")
    host_bytes = job.gpus_a_host * pinned_bytes + arrays * -(-job.rows // job.hosts)
    return _Memory(weight_bytes + chunk_rows * slot_row_bytes, weight_bytes, slot_row_bytes, pinned_bytes, host_bytes)


def _problems(job: Job, machine: Machine, memory: _Memory, chunk_rows: int) -> list[str]:
    """Why the job wouldn't run, and what to do."""
    problems = []
    if memory.gpu_bytes > machine.gpu_memory_bytes:
        most = max(0, machine.gpu_memory_bytes - memory.weight_bytes) // memory.slot_row_bytes
        problems.append(
            f"weights and {job.num_streams:,} chunks of {chunk_rows:,} rows need {memory.gpu_bytes / GIB:,.1f} GiB, a "
            f"GPU has {machine.gpu_memory_bytes / GIB:,.1f}; "
            + (f"use chunk_rows of at most {most:,}, or fewer num_streams" if most else "use a narrower layer")
        )
    if memory.host_bytes > machine.host_memory_bytes:
        problems.append(
            f"rows in memory and rings need {memory.host_bytes / GIB:,.1f} GiB, a host has "
            f"{machine.host_memory_bytes / GIB:,.1f}; keep the rows in files, or use more hosts"
        )
    return problems


def _check_job(job: Job, machine: Machine) -> None:
    """Check what a job asks for.

    Raises:
        OptionError: as `predict`.
    """
    for name in ("rows", "in_features", "out_features", "gpus", "hosts", "num_streams", "chunk_rows"):
        count = getattr(job, name)
        if count is not None and not 1 <= count <= _MOST:
            raise OptionError(f"{name} is {count}, expected a whole number from 1 to {_MOST}")
    for name in ("storage_gb_per_s", "network_gb_per_s"):
        rate = getattr(job, name)
        if rate is not None and not is_rate(rate):
            raise OptionError(f"{name} is {rate}, expected a number above 0; leave it out where files lie on own disks")
    for what, where, known in (("source", job.source, SOURCES), ("out", job.out, OUTPUTS)):
        if where not in known:
            raise OptionError(f"{what} is {where!r}, expected one of {', '.join(known)}")
    if job.gpus % job.hosts:
        raise OptionError(f"{job.gpus} GPUs on {job.hosts} hosts: expected a multiple, the same number on each host")
    if job.runs_as not in machine.kernel_tflops:
        raise OptionError(
            f"{machine.name} has no kernel_tflops for {job.runs_as}, it has {', '.join(machine.kernel_tflops)}"
        )


def _limits(job: Job, machine: Machine) -> dict[str, float]:
    """Rows a second that each part alone would allow, all GPUs and hosts together."""
    each, wire = job.gpus_a_host, job.wire
    in_wire_bytes, out_wire_bytes = _wire_bytes(wire)
    bus = (machine.h2d_gb_per_s, machine.d2h_gb_per_s, machine.duplex_gb_per_s)
    h2d, d2h = bus_rates(in_wire_bytes, out_wire_bytes, *(of_gpus(measured, each) for measured in bus))
    gb = 1e9
    limits = {
        "H2D": job.hosts * h2d * gb / in_wire_bytes,
        "kernel": job.gpus * machine.kernel_tflops[job.runs_as] * 1e12 / (2 * job.in_features * job.out_features),
        "D2H": job.hosts * d2h * gb / out_wire_bytes,
    }
    if job.staged_in:
        limits["fill"] = job.gpus * machine.fill_gb_per_s * gb / job.in_row_bytes
    if job.out == "fresh":
        limits["drain"] = job.hosts * machine.fresh_gb_per_s * gb / job.out_row_bytes
    elif job.staged_out:
        limits["drain"] = job.gpus * machine.drain_gb_per_s * gb / job.out_row_bytes
    if job.staged_in or job.staged_out:
        limits["host memory"] = job.hosts * of_gpus(machine.copy_gb_per_s, each) * gb / sum(_staged_bytes(job))

    in_file_bytes = job.in_row_bytes if job.source == "file" else 0
    out_file_bytes = job.out_row_bytes if job.out == "file" else 0
    if not in_file_bytes + out_file_bytes:
        return limits
    if job.storage_gb_per_s is not None:
        limits["storage"] = job.storage_gb_per_s * gb / (in_file_bytes + out_file_bytes)
    if job.network_gb_per_s is not None:
        limits["network"] = job.hosts * job.network_gb_per_s * gb / max(in_file_bytes, out_file_bytes)
    if job.storage_gb_per_s is None and job.network_gb_per_s is None:
        if in_file_bytes and _is_cached(job, machine):
            limits["page cache"] = job.hosts * machine.cached_read_gb_per_s * gb / in_file_bytes
        elif in_file_bytes:
            limits["disk read"] = job.hosts * machine.disk_read_gb_per_s * gb / in_file_bytes
        if out_file_bytes:
            limits["disk write"] = job.hosts * machine.disk_write_gb_per_s * gb / out_file_bytes
    return limits


def _staged_bytes(job: Job) -> tuple[int, int]:
    """Bytes of a row that copy workers read from the source, and that they write to the result."""
    return job.in_row_bytes if job.staged_in else 0, job.out_row_bytes if job.staged_out else 0


def _is_cached(job: Job, machine: Machine) -> bool:
    """Whether each host's memory can hold its part of the source's file."""
    return -(-job.rows // job.hosts) * job.in_row_bytes <= machine.host_memory_bytes


def _lanes(job: Job, machine: Machine, limits: dict[str, float]) -> StageRates:
    """One GPU's lanes, with all GPUs at work."""

    def lowest(*names: str) -> float:
        return min(limits.get(name, math.inf) for name in names) / job.gpus

    fill_bytes, drain_bytes = _staged_bytes(job)
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


def _notes(job: Job, machine: Machine) -> list[str]:
    """What a reader should know of how the limits were found."""
    notes, each = [], job.gpus_a_host
    together, alone = (of_gpus(machine.duplex_gb_per_s, n) for n in (each, 1))
    if together < 0.99 * each * alone:
        notes.append(
            f"the {each} GPUs of a host share its bus: {together:.1f} GB/s each way together, one alone {alone:.1f}"
        )
    if "file" in (job.source, job.out):
        if job.storage_gb_per_s is not None or job.network_gb_per_s is not None:
            notes.append("files are taken to lie on shared storage: the hosts' own disks don't count")
        elif job.source == "file":
            where = "its host's page cache" if _is_cached(job, machine) else "the disk, as memory can't hold it"
            notes.append(f"the source's file is taken to be read from {where}")
    elif job.storage_gb_per_s is not None or job.network_gb_per_s is not None:
        notes.append("storage and network don't count: neither end is a file")
    return notes
