"""What a job would reach on given hardware, and what would bound it: the executor's own loop on the simulated device.

One GPU's share of the job runs through the real executor, on a virtual clock, with the measured rates of a machine and
without touching data. What GPUs and hosts share (host memory, storage, network) limits or divides those rates.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DEFAULT_STREAMS, GIB, DType, auto_chunk_rows
from pipeline.errors import FileFormatError, OptionError
from pipeline.instrument import bus_rates
from pipeline.simulate import Rates, simulate

MEMORY = ("pinned", "array", "file")
_CHUNKS = 240  # simulated at most; longer jobs go on at the rate of these
_SHIPPED = Path(__file__).parent / "machines"


@dataclass(frozen=True)
class Machine:
    """A host and its GPUs by what was measured there. GB/s are 1e9 bytes a second.

    `duplex_gb_per_s` is each way with copies both ways at once, all GPUs of the host together, by their number.
    `architecture` is what kernels are compiled for there ("sm_90a"), which decides what runs for a precision, and
    `kernel_tflops` goes by that ("fp32", "ieee", "tf32", "bfloat16", "float16"). `copy_gb_per_s` is what the copy
    workers of a GPU move, fills and drains together, while the bus is busy; file rates are those of the page cache or
    disk that the job's files are on.
    """

    name: str
    gpu: str
    architecture: str
    origin: str
    gpu_memory_bytes: int
    host_memory_bytes: int
    h2d_gb_per_s: float
    d2h_gb_per_s: float
    duplex_gb_per_s: dict[str, float]
    kernel_tflops: dict[str, float]
    copy_gb_per_s: float
    file_read_gb_per_s: float
    file_write_gb_per_s: float

    @classmethod
    def load(cls, name: str) -> Machine:
        """The shipped machine of that name, or the one that a .json file describes.

        Raises:
            OptionError: no such machine. FileFormatError: the file doesn't describe one.
        """
        path = Path(name)
        if path.suffix != ".json":
            path = _SHIPPED / f"{name.lower()}.json"
            if not path.is_file():
                shipped = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.json")))
                raise OptionError(
                    f"machine {name!r} isn't known, expected one of {shipped}, or the path of a .json with the same "
                    f"fields, measured on yours"
                )
        try:
            document = json.loads(path.read_text())
            missing = {field.name for field in fields(cls)} - document.keys()
            extra = document.keys() - {field.name for field in fields(cls)}
        except (ValueError, AttributeError) as error:
            raise FileFormatError(f"{path} isn't a machine's description: {error}") from error
        if missing or extra:
            raise FileFormatError(
                f"{path} isn't a machine's description: missing {sorted(missing) or 'nothing'}, unknown "
                f"{sorted(extra) or 'nothing'}; compare with {_SHIPPED / 'h200.json'}"
            )
        return cls(**document)

    def duplex_of(self, gpus: int) -> float:
        """GB/s each way of all of a host's `gpus` together: measured, or in between, or as for the most measured."""
        counts = sorted(int(count) for count in self.duplex_gb_per_s)
        return float(np.interp(gpus, counts, [self.duplex_gb_per_s[str(count)] for count in counts]))


@dataclass(frozen=True)
class Job:
    """A job to be planned. `source` and `out` say where rows are: "pinned" memory, an ordinary "array", or a "file".

    `gpus` are those of all hosts together. The shared limits are None where nothing is shared: `storage_gb_per_s` for
    what all hosts read and write together, `network_gb_per_s` for each host, each way.
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
    storage_gb_per_s: float | None = None
    network_gb_per_s: float | None = None

    @property
    def in_row_bytes(self) -> int:
        return self.in_features * self.dtype.itemsize

    @property
    def out_row_bytes(self) -> int:
        return self.out_features * self.dtype.itemsize


@dataclass(frozen=True)
class Prediction:
    """What a job would reach. `limits` are rows a second that each part alone would allow, all GPUs together."""

    rows_per_s: float
    gb_per_s_in: float
    gb_per_s_out: float
    seconds: float
    bound: str
    limits: dict[str, float]
    busy_shares: dict[str, float]  # of a GPU's lanes, before the limits that hosts share
    chunk_rows: int
    gpu_memory_bytes: int  # of one GPU: weights and slots
    pinned_bytes: int  # of one GPU's rings
    host_memory_bytes: int  # of one host: rings, and the job's arrays
    problems: list[str]  # why it wouldn't run at all
    machine: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The prediction as text."""
        limits = ", ".join(f"{name} {rows:,.0f}" for name, rows in sorted(self.limits.items(), key=lambda x: x[1]))
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in self.busy_shares.items() if share > 0)
        return [
            f"{self.rows_per_s:,.0f} rows/s, {self.gb_per_s_in:.1f} GB/s in, {self.gb_per_s_out:.1f} GB/s out, "
            f"{_duration(self.seconds)} in all, without start-up",
            f"bound by {self.bound}; rows/s that each part alone allows: {limits}",
            f"a GPU's lanes: {busy}; chunks of {self.chunk_rows:,} rows",
            f"memory: {self.gpu_memory_bytes / GIB:.2f} GiB on each GPU, {self.pinned_bytes / GIB:.2f} GiB pinned for "
            f"each, {self.host_memory_bytes / GIB:.1f} GiB on each host",
            *(f"it would not run: {problem}" for problem in self.problems),
            f"hardware: {self.machine}",
        ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def predict(job: Job, machine: Machine) -> Prediction:
    """What the job would reach on hosts of this kind.

    Raises:
        OptionError: the machine has no rate for this precision, or GPUs and hosts don't divide.
    """
    if job.gpus % job.hosts:
        raise OptionError(f"{job.gpus} GPUs on {job.hosts} hosts: expected a multiple, the same number on each host")
    if job.runs_as not in machine.kernel_tflops:
        raise OptionError(
            f"{machine.name} has no kernel_tflops for {job.runs_as}, it has {', '.join(machine.kernel_tflops)}"
        )
    for what, where in (("source", job.source), ("out", job.out)):
        if where not in MEMORY:
            raise OptionError(f"{what} is {where!r}, expected one of {', '.join(MEMORY)}")
    each = job.gpus // job.hosts
    rows_each = -(-job.rows // job.gpus)
    chunk_rows = job.chunk_rows or auto_chunk_rows(max(job.in_row_bytes, job.out_row_bytes))
    rates = _rates(job, machine, each)
    simulated = simulate(
        rates,
        min(rows_each, _CHUNKS * chunk_rows),
        job.in_features,
        job.out_features,
        job.dtype,
        source_pinned=job.source == "pinned",
        out_pinned=job.out == "pinned",
        chunk_rows=chunk_rows,
        num_streams=job.num_streams,
    )
    limits = {"GPUs": simulated.steady_rows_per_s * job.gpus}
    if job.storage_gb_per_s is not None:
        limits["storage"] = job.storage_gb_per_s * 1e9 / (job.in_row_bytes + job.out_row_bytes)
    if job.network_gb_per_s is not None:
        limits["network"] = job.network_gb_per_s * 1e9 * job.hosts / max(job.in_row_bytes, job.out_row_bytes)
    lowest = min(limits, key=lambda name: limits[name])
    longer_s = max(0, rows_each - simulated.rows) / simulated.steady_rows_per_s
    seconds = max(simulated.seconds + longer_s, job.rows / limits[lowest])
    rate = job.rows / seconds
    bound_by = simulated.bound if lowest == "GPUs" else lowest
    if bound_by in ("H2D", "D2H") and each > 1 and machine.duplex_of(each) < each * machine.duplex_of(1) * 0.99:
        bound_by += ", whose bus the host's GPUs share"
    weights = (job.in_features + 1) * job.out_features * job.dtype.itemsize
    operands = 2 if job.runs_as == "fp32" else 1  # whose rows, of x and of W, are kept split as well
    gpu_bytes = operands * weights + job.num_streams * chunk_rows * (operands * job.in_row_bytes + job.out_row_bytes)
    arrays = sum(n for n, where in ((job.in_row_bytes, job.source), (job.out_row_bytes, job.out)) if where != "file")
    host_bytes = each * simulated.pinned_bytes + arrays * -(-job.rows // job.hosts)
    problems = []
    if gpu_bytes > machine.gpu_memory_bytes:
        problems.append(f"a GPU has {machine.gpu_memory_bytes / GIB:.0f} GiB; use smaller chunk_rows")
    if host_bytes > machine.host_memory_bytes:
        problems.append(
            f"a host has {machine.host_memory_bytes / GIB:.0f} GiB; keep the rows in files, or use more hosts"
        )
    return Prediction(
        rate,
        rate * job.in_row_bytes / 1e9,
        rate * job.out_row_bytes / 1e9,
        seconds,
        bound_by,
        limits,
        simulated.busy_shares,
        chunk_rows,
        gpu_bytes,
        simulated.pinned_bytes,
        host_bytes,
        problems,
        f"{job.gpus} x {machine.gpu} on {job.hosts} host{'s' if job.hosts > 1 else ''} ({machine.origin})",
    )


def _rates(job: Job, machine: Machine, gpus: int) -> Rates:
    """A GPU's rates with `gpus` at work on its host, each moving its share both ways."""
    duplex = machine.duplex_of(gpus) / gpus
    h2d, d2h = bus_rates(job.in_row_bytes, job.out_row_bytes, machine.h2d_gb_per_s, machine.d2h_gb_per_s, duplex)
    memory = machine.copy_gb_per_s
    return Rates(
        h2d=h2d * 1e9,
        d2h=d2h * 1e9,
        flop=machine.kernel_tflops[job.runs_as] * 1e12,
        copy=memory * 1e9,
        fill=(min(memory, machine.file_read_gb_per_s / gpus) if job.source == "file" else memory) * 1e9,
        drain=(min(memory, machine.file_write_gb_per_s / gpus) if job.out == "file" else memory) * 1e9,
    )
