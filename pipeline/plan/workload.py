"""What a plan is asked about: so many rows, from where to where, on how many GPUs, with which options."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.dtypes import DType
from pipeline.errors import OptionError
from pipeline.options import RunOptions
from pipeline.plan.machine import Machine, is_rate
from pipeline.staging.movers import Wire

SOURCES = ("pinned", "array", "file")
OUTPUTS = (*SOURCES, "fresh")
_MOST = 2**63 - 1  # rows, features, GPUs and the like


@dataclass(frozen=True)
class Workload:
    """Rows to be streamed, for a plan.

    `source` and `out` say where rows are: "pinned" memory, an ordinary "array", or a "file"; `out` may be "fresh" too,
    a new array.

    `dtype` is the source's element type, `options` are a run's: those of `PLAN_OPTIONS` count. `gpus` are those of all
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
    options: RunOptions = field(default_factory=RunOptions)
    storage_gb_per_s: float | None = None
    network_gb_per_s: float | None = None

    @property
    def wire(self) -> Wire:
        """The rows as they cross the bus."""
        return Wire(self.in_features, self.out_features, *self.options.wire_dtypes(self.dtype))

    @property
    def wire_row_bytes(self) -> tuple[int, int]:
        """Bytes of a row on the bus, in and out."""
        wire = self.wire
        return wire.in_features * wire.dtype.itemsize, wire.out_features * wire.out_dtype.itemsize

    @property
    def out_dtype(self) -> DType:
        """The result's element type."""
        return self.options.result_dtype(self.dtype)

    @property
    def in_row_bytes(self) -> int:
        return self.in_features * self.dtype.itemsize

    @property
    def out_row_bytes(self) -> int:
        return self.out_features * self.out_dtype.itemsize

    @property
    def staged_in(self) -> bool:
        """Whether rows come through copy workers and a ring."""
        return self.source != "pinned" or self.wire.dtype is not self.dtype

    @property
    def staged_out(self) -> bool:
        return self.out != "pinned" or self.wire.out_dtype is not self.out_dtype

    @property
    def gpus_per_host(self) -> int:
        return self.gpus // self.hosts


def check(work: Workload, machine: Machine) -> None:
    """Check what a workload asks for.

    Raises:
        OptionError: a value that can't be, or the machine has no rate for what runs.
    """
    counts = {name: getattr(work, name) for name in ("rows", "in_features", "out_features", "gpus", "hosts")}
    counts |= {"num_streams": work.options.streams, "chunk_rows": work.options.chunk_rows}
    for name, count in counts.items():
        if not isinstance(count, str) and not 1 <= count <= _MOST:
            raise OptionError(f"{name} is {count}, expected a whole number from 1 to {_MOST}")
    for name in ("storage_gb_per_s", "network_gb_per_s"):
        rate = getattr(work, name)
        if rate is not None and not is_rate(rate):
            raise OptionError(f"{name} is {rate}, expected a number above 0; leave it out where files lie on own disks")
    for what, where, known in (("source", work.source, SOURCES), ("out", work.out, OUTPUTS)):
        if where not in known:
            raise OptionError(f"{what} is {where!r}, expected one of {', '.join(known)}")
    if work.gpus % work.hosts:
        raise OptionError(f"{work.gpus} GPUs on {work.hosts} hosts: expected a multiple, the same number on each host")
    if work.runs_as not in machine.kernel_tflops:
        raise OptionError(
            f"{machine.name} has no kernel_tflops for {work.runs_as}, it has {', '.join(machine.kernel_tflops)}"
        )
