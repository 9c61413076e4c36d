"""What `run_pipelined` keeps warm from call to call: fleets that nobody uses at the moment, within bounds."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import GIB, MIB, environment
from pipeline.errors import DeviceError
from pipeline.fleet import Fleet
from pipeline.layer.base import Layer
from pipeline.options import PIPELINE_OPTIONS, RunOptions
from pipeline.pages import RESULTS

MOST_FLEETS = 4
MOST_PINNED_BYTES = 512 * MIB
MOST_DEVICE_BYTES = 8 * GIB
IDLE_S = 60.0


@dataclass(eq=False)
class _Kept:
    """A fleet that nobody uses, and what a call must have in common with the one that made it."""

    fleet: Fleet
    layer: weakref.ref[Layer]
    layer_state: tuple[Any, ...]
    key: Hashable
    until_s: float
    pinned_bytes: int = field(init=False)
    device_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.pinned_bytes, self.device_bytes = self.fleet.pinned_bytes, self.fleet.device_bytes

    def serves(self, layer: Layer, key: Hashable) -> bool:
        """Whether a call with this layer, as it is now, may run on it."""
        if self.layer() is not layer or self.key != key:
            return False
        now, then = layer.state(), self.layer_state
        return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


class KeptFleets:
    """Fleets between two calls. All methods may be called from any thread.

    A fleet is closed when its layer dies, when it has been idle for `idle_s` seconds, when others were used later and
    the bounds are reached, when a device lacks memory for a new one, and by `release`.
    """

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._kept: list[_Kept] = []  # the one used last comes last
        self._keeper: threading.Thread | None = None
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # put() may be called while it is being called

    def forget(self) -> None:
        """In a process that was forked: the fleets, the threads and perhaps the lock are the parent's."""
        self._start_anew()

    @contextmanager
    def lent(self, layer: Layer, options: RunOptions) -> Iterator[Fleet]:
        """A fleet for one run: a kept one, or a new one, not yet open. It is kept afterwards, but not after an
        interrupt or an error of a device."""
        values = options.as_keywords()
        key = tuple(_hashable(values[name]) for name in PIPELINE_OPTIONS), environment()
        fleet = self._take(layer, key) or Fleet(layer, options, self.release)
        usable = False
        try:
            yield fleet
            usable = True
        except DeviceError:
            raise
        except Exception:
            usable = True
            raise
        finally:
            if not (usable and self._keep(fleet, layer, key)):
                fleet.close()

    def release(self) -> bool:
        """Close all fleets that are kept. Whether there were any."""
        with self._lock:
            kept, self._kept = self._kept, []
        self._wake.put(None)
        return self._close(kept)

    def _take(self, layer: Layer, key: Hashable) -> Fleet | None:
        with self._lock:
            for one in reversed(self._kept):
                if one.serves(layer, key):
                    self._kept.remove(one)
                    return one.fleet
        return None

    def _keep(self, fleet: Fleet, layer: Layer, key: Hashable) -> bool:
        """Whether it is kept: a fleet that opens at once isn't, nor one that takes more than the bounds alone."""
        state = fleet.state_to_keep()
        if state is None:
            return False
        one = _Kept(fleet, self._watched(layer), state, key, time.monotonic() + self._idle_s)
        if one.pinned_bytes > MOST_PINNED_BYTES or one.device_bytes > MOST_DEVICE_BYTES:
            return False
        with self._lock:
            if not self._start_keeper():
                return False
            self._kept.append(one)
            over = self._over_the_bounds()
        self._close(over)
        return True

    def _close(self, kept: list[_Kept]) -> bool:
        """Whether there was something to close. What another thread is closing is closed, too, when this returns."""
        with self._closing:
            for one in kept:
                one.fleet.close()
        return bool(kept)

    def _over_the_bounds(self) -> list[_Kept]:
        """Those that must go, out of the list. Called with the lock held."""
        over = []
        while (
            len(self._kept) > MOST_FLEETS
            or sum(one.pinned_bytes for one in self._kept) > MOST_PINNED_BYTES
            or sum(one.device_bytes for one in self._kept) > MOST_DEVICE_BYTES
        ):
            over.append(self._kept.pop(0))
        return over

    # -- the keeper ----------------------------------------------------------------------------------------------------

    def _watched(self, layer: Layer) -> weakref.ref[Layer]:
        """NOTE: what is called when an object dies runs anywhere, perhaps while this thread holds the lock or queues
        work on a GPU. So it only wakes the keeper."""
        wake = self._wake
        return weakref.ref(layer, lambda _: wake.put(None))

    def _start_keeper(self) -> bool:
        """Whether a thread watches what is kept. Called with the lock held."""
        if self._keeper is None:
            keeper = threading.Thread(target=self._watch, name="pipeline-keeper", daemon=True)
            try:
                keeper.start()
            except RuntimeError:  # the system gives no thread: nothing would ever close what is kept
                return False
            self._keeper = keeper
        return True

    def _watch(self) -> None:
        """Closes what has been idle for too long or whose layer has died, until nothing is kept."""
        while True:
            with self._lock:
                now_s = time.monotonic()
                ended = [one for one in self._kept if one.until_s <= now_s or one.layer() is None]
                self._kept = [one for one in self._kept if one not in ended]
                left_s = [one.until_s - now_s for one in self._kept]
                if not (left_s or ended):
                    self._keeper = None
                    return
            if ended:
                self._close(ended)
                del ended
                continue
            try:
                self._wake.get(timeout=min(left_s))
            except queue.Empty:
                pass


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, list) else value


KEPT = KeptFleets()
atexit.register(KEPT.release)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=KEPT.forget)


def release() -> None:
    """Close what `run_pipelined` keeps warm for its next call: devices, weights on them, pinned rings, threads. Memory
    of freed results goes back to the system as well.

    A call on GPUs keeps them for 60 seconds, as long as its layer lives, for a call with the same layer, options and
    environment variables. At most 4 such sets are kept, with 512 MiB of pinned memory and 8 GiB of GPU memory together;
    those used longest ago go first. All go when a device lacks memory for a new one. What other libraries need isn't
    seen: call this before they take all of a GPU's memory.
    """
    KEPT.release()
    RESULTS.clear()
