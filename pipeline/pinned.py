"""`pin`: ordinary memory that is streamed many times, registered with CUDA so that the copy engines use it in place."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

from pipeline.arrays import HostArray, address_of, host_view
from pipeline.devices.cuda import is_pinned, register, unregister
from pipeline.errors import OptionError


class Pinned:
    """Memory registered with CUDA until `close`, the end of the `with` statement, or, if both are forgotten, until
    nobody holds this object any more. `array` is what was passed in."""

    def __init__(self, array: Any, host: HostArray) -> None:
        self.array = array
        self._close: weakref.finalize[Any, Any] | None = None
        address = address_of(host)
        if host.nbytes and not is_pinned(address):
            register(address, host.nbytes, read_only=not host.flags.writeable)
            self._close = weakref.finalize(self, _unregister, address, host)

    def close(self) -> None:
        """Unregister the memory. It must not be part of a run any more. Safe to call twice."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Any:
        return self.array

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _unregister(address: int, _host: HostArray) -> None:
    unregister(address)


def pin(array: Any) -> Pinned:
    """Register an array's memory with CUDA, so that runs copy from it and to it without staging.

        with pipeline.pin(x) as x, pipeline.pin(y) as y, Pipeline(layer) as pipe:
            for epoch in range(100):
                pipe.run(x, y)

    Registering takes about as long as streaming the memory once (docs/notes/formats.md), so it pays for memory that is
    streamed more than once or twice. The memory is locked until it is unregistered: the system
    can't move or swap it. Blocks until it is done.

    Args:
        array: a NumPy array, read-only `np.memmap` or torch CPU tensor, contiguous and in native byte order. Memory
            that is pinned already is left as it is.

    Returns:
        A `Pinned`, which keeps the array alive; as a context manager it gives the array itself.

    Raises:
        OptionError: not contiguous, or a foreign byte order.
        DTypeError: an element type that can't be streamed.
        DeviceNotFoundError: no GPU.
        DriverError: the system or the driver refused, for example for a writable map of a file.
    """
    host, _ = host_view(array, "the array to pin")
    if not (host.flags.c_contiguous and host.dtype.isnative):
        raise OptionError(
            f"the array to pin has strides {host.strides} for shape {host.shape} and type {host.dtype}, expected a "
            f"contiguous one in native byte order; others are staged anyway"
        )
    return Pinned(array, host)
