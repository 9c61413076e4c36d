"""What one run leaves behind: all that its reports are made from, whatever becomes of its devices meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.config import Staging
from pipeline.instrument import Ceilings, Recorder
from pipeline.report.timeline import Timeline, from_recorders


@dataclass(frozen=True)
class Ends:
    """Where a run's rows come from and go to, as far as ceilings and advice depend on it."""

    source: str = "memory"  # or "file", "batches", "device"
    target: str = "memory"  # or "fresh memory", "file", "device"


@dataclass(frozen=True)
class Setup:
    """How a run was made: its layer, its devices, its ends, and the options in force."""

    devices: dict[str, str]  # that took part, with what hardware they are
    ceilings: dict[str, Ceilings]  # those devices have some whose buses were measured
    kernel: str
    precision: str  # that was asked for
    runs_as: str  # that ran
    in_features: int
    out_features: int
    in_row_bytes: int  # in the source's element type
    out_row_bytes: int  # in the result's element type
    wire: str  # the element type that crossed the bus on the way in
    chunk_rows: int
    num_streams: int
    copy_workers: str
    staging: Staging
    pinned_bytes: int
    source: str
    ends: Ends = field(default_factory=Ends)


@dataclass(frozen=True)
class Record:
    """One run: what it moved and when, in seconds of its first device's clock."""

    setup: Setup
    rows: int
    start_s: float
    seconds: float  # until the result was complete
    finish_s: float  # the part of `seconds` after the last row was stored
    exact_rows: int  # computed in exact fp32 because of their range
    recorders: Sequence[Recorder]

    def timeline(self) -> Timeline:
        return from_recorders(self.recorders, self.start_s, self.setup.devices)
