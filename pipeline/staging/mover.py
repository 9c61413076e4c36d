"""The protocol between the executor and what moves chunks between host rows and a device's slots."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pipeline.instrument import Ranges, Recorder
from pipeline.rows import SourceRows, TargetRows


class Transfer(ABC):
    """One chunk on its way between host rows and a slot. An interrupt may come between any two of its steps."""

    failed_stage: str = ""
    """The stage that failed, once `done` has raised: "fill", "H2D", "D2H" or "drain"."""

    @abstractmethod
    def queued(self) -> bool:
        """Whether all copies of a load to the device are queued. Once this has said so, what is queued on the slot
        comes after them."""

    @abstractmethod
    def done(self) -> bool:
        """Whether the whole chunk has been moved.

        Raises, once nothing of it uses rows, pieces or the slot any more:
            DeviceError: the device failed, in the stage "H2D" or "D2H". PipelineError: it was cancelled.
            Exception: what reading or writing the rows raised.
        """

    @abstractmethod
    def record(self, recorder: Recorder) -> None:
        """Add its copies to the record of a run, each stage's in the order in which they began. Once it is done."""

    @property
    @abstractmethod
    def end_s(self) -> float:
        """When its last copy ended, on the device's clock. Once it is done."""


class Mover(ABC):
    """Moves whole chunks between host rows and a device's slots. Only one thread at a time calls it.

    Transfers of one direction are made in the order in which they were begun, and those of both directions at the same
    time.
    """

    def begin_run(self, ranges: Ranges) -> None:
        """Name copies for profilers by `ranges` from now on."""

    @abstractmethod
    def loads(self, rows: SourceRows) -> bool:
        """Whether it can read these rows."""

    @abstractmethod
    def stores(self, rows: TargetRows) -> bool:
        """Whether it can write these rows."""

    @abstractmethod
    def load(self, rows: SourceRows, count: int, slot: int, chunk: int) -> Transfer:
        """Begin to copy `count` rows into the slot's input buffer, which nothing may use until they are there. `chunk`
        is its number, for the record."""

    @abstractmethod
    def store(self, rows: TargetRows, count: int, slot: int, chunk: int) -> Transfer:
        """Begin to copy `count` rows from the slot's output buffer, once the kernel that was queued last on the slot
        has written them."""

    def poll(self) -> bool:
        """Move what can move. Whether anything did."""
        return False

    @abstractmethod
    def cancel(self) -> None:
        """Give up all transfers. Blocks until nothing uses rows, pieces or slots any more; then all pieces are free."""

    def close(self) -> None:
        """End its threads. Nothing may be under way. Its pieces' memory may be freed then."""
