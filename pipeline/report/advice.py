"""What bounds a run, and one sentence on what would make it faster.

The bound is the part of the run with the greatest share of its seconds (`largest`), if that is a stage that was near
its limit all along while rows moved (from 75%), or set-up or finishing that took more than half of the seconds. Else
nothing is: the bound is "none", and reports name the largest part without calling it the bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.record import Ends, Parts
from pipeline.report.stages import StageStats, nearness, rate_text

NONE, SET_UP, DISK, FINISH = "none", "set-up", "disk", "finish"  # what the bound may be besides a stage
NEAR = 0.75  # a stage that is this near its limit bounds the run, and a plan's limit that is reached so far
_MOST = 0.5  # more of the run's seconds than all the rest
_AT_CEILING = 0.9  # from this share of the measured ceiling on, the hardware is used up
_MEMORY = Ends()


def largest(stages: Mapping[str, StageStats], parts: Parts, ends: Ends = _MEMORY) -> str:
    """The part with the greatest share of the run's seconds, at its limit or not: "set-up", "disk" (finishing where the
    result is a file) or "finish" (where it isn't), or a stage; "none" for an empty run. A stage's share is how near it
    came to its limit while rows moved, of the time in which they did."""
    if not any(stage.count for stage in stages.values()):
        return NONE
    shares_s = {name: nearness(stage) * parts.run_s for name, stage in stages.items() if stage.count}
    shares_s |= {SET_UP: parts.setup_s, DISK if ends.target == "file" else FINISH: parts.finish_s}
    return max(shares_s, key=lambda name: shares_s[name])


def bound(stages: Mapping[str, StageStats], parts: Parts, ends: Ends = _MEMORY) -> str:
    """The part that `largest` names where it is at its limit, else "none"."""
    name = largest(stages, parts, ends)
    if name in stages:
        return name if nearness(stages[name]) >= NEAR else NONE
    return name if _share(name, parts) > _MOST else NONE


def _share(name: str, parts: Parts) -> float:
    """Of the run's seconds, that set-up or finishing took."""
    return (parts.setup_s if name == SET_UP else parts.finish_s) / parts.seconds if parts.seconds > 0 else 0.0


def bound_text(
    name: str, stages: Mapping[str, StageStats], parts: Parts, ends: Ends = _MEMORY, origin: str = ""
) -> str:
    """The bound in words, how much of the time it took and how near it came to its measured ceiling, which is of
    `origin`; where nothing is the bound, the largest part instead. "" for an empty run."""
    if name != NONE:
        return f"bound by {name}, which {_took(name, stages, parts, origin)}"
    part = largest(stages, parts, ends)
    if part == NONE:
        return ""
    took = _took(part, stages, parts, origin)
    return f"bound by none: nothing is at its limit all along; the largest part is {part}, which {took}"


def _took(part: str, stages: Mapping[str, StageStats], parts: Parts, origin: str) -> str:
    if part not in stages:
        when = "before the first row moved" if part == SET_UP else "after the last row was stored"
        return f"took {_share(part, parts):.0%} of the time, {when}"
    stage = stages[part]
    text = f"was busy {stage.busy_share:.0%} of the time in which rows moved"
    if stage.ceiling is not None and stage.ceiling_share is not None:
        text += f", at {stage.ceiling_share:.0%} of its ceiling of {rate_text(part, stage.ceiling)}"
        text += f" ({origin})" if origin else ""
    return text


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


def advice(stages: Mapping[str, StageStats], parts: Parts, runs_as: str, on_cpu: bool, ends: Ends = _MEMORY) -> str:
    """One sentence: what would make a run with these stages and parts faster. "" for an empty run."""
    name = largest(stages, parts, ends)
    if name == NONE:
        return ""
    if name == SET_UP and parts.room_s > parts.setup_s / 2:
        return _ROOM_ADVICE
    if name == SET_UP and ends.source == "batches":
        return f"{_SET_UP_ADVICE}, and an iterable may give its first batch sooner"
    if name not in stages:
        return _PART_ADVICE[name]
    if bound(stages, parts, ends) == NONE:
        return (
            "no stage is at its limit all along: give more rows, larger chunk_rows or more num_streams, or a "
            "source that delivers sooner"
        )
    return _stage_advice(name, stages[name], runs_as, on_cpu, ends)


_SET_UP_ADVICE = (
    "set-up takes longer than anything else: keep a Pipeline open, or call again in this process, or give more rows at "
    "once; the first call of a process starts the devices, the first large one on a machine measures its copies"
)
_ROOM_ADVICE = (
    "a file system in memory first makes the pages of the whole output: a narrower out_dtype, or as `out` an np.memmap "
    "of an earlier result, whose pages are there"
)
_PART_ADVICE = {
    SET_UP: _SET_UP_ADVICE,
    DISK: "the disk still wrote when all rows were stored: a faster disk, or a narrower out_dtype",
    FINISH: "putting the result together takes longer than anything else: pass an `out` for the rows to be stored in",
}


def _stage_advice(name: str, stage: StageStats, runs_as: str, on_cpu: bool, ends: Ends) -> str:
    """For a run that this stage bounds."""
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
