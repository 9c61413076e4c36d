"""What a workload takes of the memory of GPUs and hosts, and where that is more than there is."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import GIB
from pipeline.plan.machine import Machine
from pipeline.plan.simulate import ring_bytes
from pipeline.plan.workload import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes that a workload takes.

    `gpu_bytes` are of one GPU, with `weight_bytes`; `slot_row_bytes` are what its slots take for each row of a chunk,
    `pinned_bytes` are of its rings. `host_bytes` are of one host.
    """

    gpu_bytes: int
    weight_bytes: int
    slot_row_bytes: int
    pinned_bytes: int
    host_bytes: int


def memory_of(work: Workload, chunk_rows: int) -> Memory:
    in_wire_bytes, out_wire_bytes = work.wire_row_bytes
    operands = 2 if work.runs_as == "fp32" else 1  # whose rows, of x and of W, are kept split as well
    weight_bytes = operands * (work.in_features + 1) * work.out_features * work.wire.dtype.itemsize
    slot_row_bytes = work.options.streams * (operands * in_wire_bytes + out_wire_bytes)
    pinned_bytes = ring_bytes(in_wire_bytes) if work.staged_in else 0
    pinned_bytes += ring_bytes(out_wire_bytes) if work.staged_out else 0
    arrays = sum(
        n for n, where in ((work.in_row_bytes, work.source), (work.out_row_bytes, work.out)) if where != "file"
    )
    host_bytes = work.gpus_per_host * pinned_bytes + arrays * -(-work.rows // work.hosts)
    return Memory(weight_bytes + chunk_rows * slot_row_bytes, weight_bytes, slot_row_bytes, pinned_bytes, host_bytes)


def problems(work: Workload, machine: Machine, memory: Memory, chunk_rows: int) -> list[str]:
    """Why the workload wouldn't run, and what to do."""
    found = []
    if memory.gpu_bytes > machine.gpu_memory_bytes:
        most = max(0, machine.gpu_memory_bytes - memory.weight_bytes) // memory.slot_row_bytes
        found.append(
            f"weights and {work.options.streams:,} chunks of {chunk_rows:,} rows need "
            f"{memory.gpu_bytes / GIB:,.1f} GiB, a GPU has {machine.gpu_memory_bytes / GIB:,.1f}; "
            + (f"use chunk_rows of at most {most:,}, or fewer num_streams" if most else "use a narrower layer")
        )
    if memory.host_bytes > machine.host_memory_bytes:
        found.append(
            f"rows in memory and rings need {memory.host_bytes / GIB:,.1f} GiB, a host has "
            f"{machine.host_memory_bytes / GIB:,.1f}; keep the rows in files, or use more hosts"
        )
    return found
