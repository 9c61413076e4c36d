"""One user at a time."""

from __future__ import annotations

import threading
import weakref
from types import TracebackType

from pipeline.errors import PipelineError


class Turns:
    """Lets one at a time have its turn. True while somebody has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: weakref.ref[Turn] | None = None

    def __bool__(self) -> bool:
        return self._holder is not None and self._holder() is not None

    def take(self, holder: Turn) -> bool:
        """Whether nobody had it. NOTE: an interrupt may lose the holder before it can let go; its end does that."""
        with self._lock:
            if self:
                return False
            self._holder = weakref.ref(holder)
            return True

    def let_go(self) -> None:
        self._holder = None


class Turn:
    """A turn, from entering the block to leaving it.

    Raises:
        PipelineError: somebody else has it.
    """

    def __init__(self, turns: Turns, message: str) -> None:
        self._turns, self._message = turns, message

    def __enter__(self) -> None:
        if not self._turns.take(self):
            raise PipelineError(self._message)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._turns.let_go()
