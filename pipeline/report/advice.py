"""What bounds a run, and one sentence on what would make it faster."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.record import Ends
from pipeline.report.stages import StageStats, nearness

_AT_CEILING = 0.9  # from this share of the measured ceiling on, the hardware is used up
_MOSTLY_BUSY = 0.75
_MEMORY = Ends()


def bound(stages: Mapping[str, StageStats], finish_share: float = 0.0) -> str:
    """The stage nearest to its limit; "disk" where completing the result took more of the time than any was busy."""
    nearest = max(stages, key=lambda name: nearness(stages[name]))
    if not stages[nearest].count:
        return "none"
    return "disk" if finish_share > nearness(stages[nearest]) else nearest


_MORE_WORKERS = "more copy workers where cores are idle"
_FILL_ADVICE = {
    "memory": f"copying from the source is the limit: pinned memory as the source (pipeline.pin), or {_MORE_WORKERS}",
    "file": f"reading the file is the limit: a faster disk, more memory to cache it, or {_MORE_WORKERS}",
    "batches": "gathering batches is the limit: larger batches, a source that makes them sooner, or an array or a file",
}
_DRAIN_ADVICE = {
    "memory": f"storing the result is the limit: pinned memory as the output (pipeline.pin), or {_MORE_WORKERS}",
    "fresh memory": "storing the result in fresh memory is the limit: pass an `out` that was written before",
    "file": f"writing the file is the limit: a faster disk, or {_MORE_WORKERS}",
}


def advice(
    stages: Mapping[str, StageStats],
    runs_as: str,
    on_cpu: bool,
    ends: Ends = _MEMORY,
    finish_share: float = 0.0,
) -> str:
    """One sentence: what would make a run with these stages faster."""
    name = bound(stages, finish_share)
    if name == "none":
        return ""
    if name == "disk":
        return "the disk still wrote when all rows were stored: a faster disk, or a narrower out_dtype"
    stage = stages[name]
    if nearness(stage) < _MOSTLY_BUSY:
        return (
            f"no stage is busy most of the time ({name} is for {stage.busy_share:.0%}): give more rows, larger "
            f"chunk_rows or more num_streams, or a source that delivers sooner"
        )
    if on_cpu and name in ("H2D", "kernel", "D2H"):
        return "the CPU computes and copies: a GPU, or more cores"
    if name in ("H2D", "D2H"):
        if stage.ceiling_share is not None and stage.ceiling_share < _AT_CEILING:
            return (
                f"the bus is busy but moves only {stage.ceiling_share:.0%} of what it can: look for other jobs on it, "
                f"try larger chunk_rows, and pinned memory at both ends"
            )
        fewer = "" if runs_as in ("bfloat16", "float16") else "data in bfloat16 or float16 (half the bytes), or "
        return f"the bus is used up: {fewer}another GPU with a bus of its own"
    if name == "kernel":
        lower = {"ieee": "precision='tf32' if its accuracy will do, or ", "tf32": "bfloat16 or float16 data, or "}
        return f"the GPU's arithmetic is used up: {lower.get(runs_as, '')}another GPU"
    return _FILL_ADVICE[ends.source] if name == "fill" else _DRAIN_ADVICE[ends.target]
