"""A CPU to whose slots rows are staged, by code in C too: tests/native/fake_driver.c stands for the CUDA driver."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.leaks import wait_until

from pipeline.arrays import HostArray, address_of
from pipeline.devices.base import NativeCopies
from pipeline.devices.cpu import CpuDevice
from pipeline.dtypes import DType
from pipeline.errors import DriverError
from pipeline.layer.linear import FusedLinear
from pipeline.rows import DeviceRows

NATIVE = Path(__file__).resolve().parents[1] / "native"
REFUSAL, FAILURE = 0, 1
_FUNCTIONS = ("fake_set_context", "fake_copy_in", "fake_copy_out", "fake_record", "fake_query")
_NOT_READY = 600


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


@functools.cache
def fake_driver() -> Any:
    """The library. Skips the test where there is no C compiler."""
    if compiler() is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        built, source = Path(folder) / "fake_driver.so", NATIVE / "fake_driver.c"
        options = ["-O1", "-shared", "-fPIC", "-pthread"]
        subprocess.run([str(compiler()), *options, "-o", str(built), str(source)], check=True)
        library = ctypes.CDLL(str(built))
    pointer = ctypes.c_void_p
    library.fake_open_stream.argtypes, library.fake_open_stream.restype = [ctypes.c_uint64], pointer
    library.fake_close_stream.argtypes = library.fake_query.argtypes = library.fake_waits.argtypes = [pointer]
    library.fake_pend.argtypes = library.fake_hold.argtypes = [pointer, ctypes.c_int]
    library.fake_new_event.restype = pointer
    return library


class NativeDevice(CpuDevice):
    """A CPU with slots and pinned memory of its own: ordinary memory is staged. `in_c` False keeps C away from it."""

    in_c = True
    poison = True

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self._pinned: list[HostArray] = []
        self._streams = {stage: fake_driver().fake_open_stream(seed + n) for n, stage in enumerate(("H2D", "D2H"))}
        self._kernel_events: dict[int, int] = {}

    def prepare(self, layer: FusedLinear, out_dtype: DType, chunk_rows: int) -> None:
        super().prepare(layer, out_dtype, chunk_rows)
        fake_driver().fake_trouble(REFUSAL, -1)
        fake_driver().fake_trouble(FAILURE, -1)

    def pinned(self, n_bytes: int) -> HostArray:
        memory = super().pinned(n_bytes)
        memory[:] = 0xFF
        return self.pin(memory)

    def pin(self, array: HostArray) -> HostArray:
        """Treat `array` as pinned memory."""
        self._pinned.append(array)
        return array

    def in_place(self, rows: HostArray) -> bool:
        first = address_of(rows)
        return any(address_of(a) <= first < address_of(a) + a.nbytes for a in self._pinned)

    def own_rows(self, rows: HostArray) -> DeviceRows | None:
        return None

    def idle(self) -> None:
        time.sleep(1e-4)

    def native_copies(self) -> NativeCopies | None:
        if not self.in_c:
            return None
        functions = (getattr(fake_driver(), name) for name in _FUNCTIONS)
        return NativeCopies(
            tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions),
            1,
            *self._streams.values(),
            new_event=fake_driver().fake_new_event,
            input=lambda slot: address_of(self._inputs[slot]),
            output=lambda slot: address_of(self._outputs[slot]),
            before_kernel=self._before_kernel,
            after_kernel=self._after_kernel,
            error=lambda what, code: DriverError(f"{what} failed: {code}", str(code)),
        )

    def _before_kernel(self, slot: int, event: int) -> None:
        self._queue("kernel", slot, lambda: wait_until(lambda: fake_driver().fake_query(event) != _NOT_READY))

    def _after_kernel(self, slot: int) -> int:
        event = self._kernel_events.setdefault(slot, fake_driver().fake_new_event())
        fake_driver().fake_pend(event, 1)
        self._queue("kernel", slot, lambda: fake_driver().fake_pend(event, -1))
        return event

    def waits(self, stage: str) -> bool:
        """Whether something that C queued for "H2D" or "D2H" hasn't begun."""
        return bool(fake_driver().fake_waits(self._streams[stage]))

    @contextmanager
    def held(self, stage: str) -> Iterator[None]:
        """What is queued for "H2D", "kernel" or "D2H" inside begins afterwards."""
        stream = self._streams.get(stage) if self.in_c else None
        if stream is not None:
            fake_driver().fake_hold(stream, 1)
            try:
                yield
            finally:
                fake_driver().fake_hold(stream, 0)
            return
        go_on = threading.Event()
        for slot in range(len(self._last)):
            self._queue(stage, slot, go_on.wait)
        try:
            yield
        finally:
            go_on.set()

    def close(self) -> None:
        super().close()
        for stream in self.__dict__.pop("_streams", {}).values():
            fake_driver().fake_close_stream(stream)


class PythonOnly(NativeDevice):
    """The same device, which C can't copy to or from."""

    in_c = False


class WatchedNative(NativeDevice):
    """Notices a hang: it is still asked to idle after so many seconds."""

    patience_s = 10.0
    may_wait = False

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self._until_s = time.monotonic() + self.patience_s

    def idle(self) -> None:
        assert time.monotonic() < self._until_s, f"nothing has moved for {self.patience_s} seconds"
        super().idle()
