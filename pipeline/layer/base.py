"""What a device asks of a layer: `Layer` is the layer itself, `DeviceLayer` what it becomes at one place.

A second kind of layer implements both; devices, executor and API need no change for it:

    class Halved(Layer):
        def on(self, place, out_dtype, chunk_rows):
            return HalvedThere(self, place, out_dtype)

    class HalvedThere(DeviceLayer):
        kernel, runs_as = "torch", "fp32"

        def __init__(self, layer, place, out_dtype):
            self.layer, self.place, self.out_dtype = layer, place, out_dtype

        def queue(self, x, y, first_row, stream, scratch):
            with self.place.torch_stream(stream):
                rows = x.tensor(self.layer.in_features, self.layer.dtype)
                y.tensor(self.layer.out_features, self.out_dtype).copy_(rows / 2)

    run_pipelined(Halved(1024, 1024, "float32"), source)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from pipeline.arrays import HostArray
from pipeline.dtypes import DType, parse_dtype, parse_precision
from pipeline.errors import OptionError
from pipeline.layer.checks import check_dtype
from pipeline.rows import DeviceRows

ALIGNMENT_BYTES = 16  # divides the first address and the stride of rows in a GPU's memory


class Place(ABC):
    """Where a device computes, as the layers that it prepares see it. What is allocated here lives as long as the
    device."""

    kind: ClassVar[str]
    """ "host": addresses are those of ordinary memory. "cuda": of the memory of GPU `ordinal`."""
    ordinal: int = 0
    stream: int = 0
    """A raw CUstream on which to queue what makes the layer ready; the device waits for it once the layer is there."""

    @abstractmethod
    def allocate(self, n_bytes: int, what: str) -> int:
        """The address of new memory, a multiple of 256; `what` names it in errors.

        Raises:
            DeviceMemoryError: it doesn't fit.
        """

    @abstractmethod
    def upload(self, array: HostArray, what: str) -> int:
        """The address of a contiguous array's copy here. Blocks."""

    @abstractmethod
    def upload_rows(self, rows: HostArray, what: str) -> DeviceRows:
        """A copy of contiguous rows, laid out as the device lays out the rows that `DeviceLayer.queue` is given."""

    @abstractmethod
    def read(self, address: int, n_bytes: int) -> bytes:
        """What lies at an address. Blocks."""

    @property
    def torch_device(self) -> str:
        """torch's name of this place."""
        return "cpu" if self.kind == "host" else f"{self.kind}:{self.ordinal}"

    def torch_stream(self, stream: int) -> AbstractContextManager[Any]:
        """What torch does inside is queued on `stream`, a raw CUstream; on the host it is done at once."""
        if self.kind == "host":
            return nullcontext()
        import torch

        return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self.torch_device))  # type: ignore[no-untyped-call]


class DeviceLayer(ABC):
    """A layer with its weights at one place, prepared for one type of results."""

    kernel: str
    """What computes, for reports."""
    runs_as: str
    """The precision that really runs, for reports: "fp32", "ieee", "tf32", "bfloat16", "float16" or "float64"."""

    def slot_bytes(self, chunk_rows: int) -> int:
        """Memory that each slot of the device keeps for `queue`'s own use on chunks of up to so many rows."""
        return 0

    @abstractmethod
    def queue(self, x: DeviceRows, y: DeviceRows, first_row: int, stream: int, scratch: int) -> None:
        """Queue y = layer(x) on `stream`, a raw CUstream, and return; on the host compute it before returning.

        `first_row` is the number of x's first row in its dataset, `scratch` the address of the slot's own memory. Rows
        are contiguous; on GPUs x's begin at multiples of 16 bytes. A device calls this from one thread at a time, the
        CPU for different slots from several.
        """

    def exact_rows(self) -> int:
        """Rows computed so far in exact fp32 because the fp32-accurate kernel's pairs couldn't hold them."""
        return 0

    def close(self) -> None:
        """Give back what isn't the place's own memory. Nothing is queued any more."""


class Layer(ABC):
    """A function of rows (rows, in_features) with results (rows, out_features), each row for itself.

    `dtype` is the element type of the rows, `precision` how float32 rows are computed (`parse_precision`).

    Raises:
        DTypeError, OptionError: an element type or a precision that isn't supported.
    """

    in_features: int
    out_features: int
    dtype: DType
    precision: str

    def __init__(self, in_features: int, out_features: int, dtype: Any, precision: str | None = None) -> None:
        self.in_features, self.out_features, self.dtype = in_features, out_features, parse_dtype(dtype)
        self.precision = parse_precision(precision, self.dtype)

    def state(self) -> tuple[Any, ...]:
        """What the layer's copies on devices are made from, besides what never changes: a copy is used again while
        these are the same objects."""
        return ()

    @abstractmethod
    def on(self, place: Place, out_dtype: DType, chunk_rows: int) -> DeviceLayer:
        """This layer at a place, for results of `out_dtype` and up to `chunk_rows` rows at a time. Blocks.

        Raises:
            OptionError: it can't be computed at such a place.
            CompileError, DeviceMemoryError, DriverError: as the place has them.
        """

    def rounded_to(self, dtype: DType, narrow: Callable[[HostArray], HostArray]) -> Layer:
        """The same layer for rows of another element type, for `wire_dtype`; `narrow` rounds rows of an array to its
        carrier.

        Raises:
            OptionError: there is none.
        """
        raise OptionError(
            f"wire_dtype is {dtype}, but a {type(self).__name__} takes rows of {self.dtype} only; leave wire_dtype out"
        )

    def check_dtype(self, dtype: DType, what: str = "x", remedy: str = "") -> None:
        """Check an element type against the layer's; `remedy` is what the message says to do.

        Raises:
            DTypeError: `dtype` isn't the layer's.
        """
        check_dtype(dtype, self.dtype, what, remedy)
