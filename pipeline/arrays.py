"""Views of what callers pass in: NumPy arrays and torch tensors, as arrays of a known element type.

Torch is imported only where a torch tensor is at hand.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import CONVERT, Cast, DType, parse_dtype
from pipeline.errors import DTypeError, InputError, ShapeError

if TYPE_CHECKING:
    import torch

HostArray = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class TypedArray:
    """An array in its carrier type, beside the element type that it stands for: for types that NumPy lacks."""

    array: HostArray
    dtype: DType


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor, without importing torch."""
    return _is_tensor_type(type(value))  # type: ignore[arg-type]  # types are hashable


@functools.lru_cache(maxsize=256)
def _is_tensor_type(kind: type) -> bool:
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in kind.__mro__)


def is_cuda(value: Any) -> bool:
    return is_torch(value) and bool(value.is_cuda)


def shape_of(value: Any, what: str, expected: str = "a NumPy array or a torch tensor") -> tuple[int, ...]:
    """The shape of an array, a tensor, or nested lists of numbers.

    Raises:
        InputError: something else.
        ShapeError: lists of different lengths.
    """
    if isinstance(value, TypedArray):
        return value.array.shape
    if not (is_torch(value) or hasattr(value, "__array__") or isinstance(value, (list, tuple))):
        raise InputError(f"{what} is a {type(value).__name__}, expected {expected}")
    try:
        return tuple(np.shape(value))
    except ValueError as error:
        raise ShapeError(
            f"{what} is a {type(value).__name__} of rows that differ in length, expected {expected}"
        ) from error


def host_view(value: Any, what: str, remedy: str = CONVERT) -> tuple[HostArray, DType]:
    """A NumPy view of a host array or CPU tensor in its carrier type, and the element type it stands for.

    Nothing is copied: strides and byte order are the caller's. What is said of an unsupported element type ends with
    `remedy`.

    Raises:
        DTypeError: object, integer, complex or any other unsupported element type; a sparse or quantized tensor, a
            lazily negated one, or a masked array.
    """
    if isinstance(value, TypedArray):
        return value.array, value.dtype
    if is_torch(value):
        import torch

        if value.layout != torch.strided or value.is_quantized:
            raise DTypeError(f"{what} is a {value.layout} tensor, expected a dense one; use .to_dense() first")
        if value.device.type != "cpu":
            raise DTypeError(f"{what} is on {value.device}, expected a host tensor; use .cpu() first")
        if value.is_neg():
            raise DTypeError(f"{what} is a view that torch negates when it is read; use .resolve_neg() first")
        dtype = parse_dtype(value.dtype, f"{what} dtype", remedy)
        tensor = value.detach()
        return (tensor if dtype.in_numpy else tensor.view(getattr(torch, dtype.carrier.name))).numpy(), dtype
    array = np.asanyarray(value)
    if type(array) is not np.ndarray and _is_masked(array):
        raise DTypeError(f"{what} is a masked array, its mask would be lost; use .filled() first")
    dtype = parse_dtype(array.dtype.newbyteorder("="), f"{what} dtype", remedy)
    return (array if dtype.in_numpy else array.view(dtype.carrier)), dtype


def _is_masked(array: HostArray) -> bool:
    """Whether it is a masked array, without importing numpy.ma: where nobody has, there is none."""
    masked = sys.modules.get("numpy.ma")
    return masked is not None and isinstance(array, masked.MaskedArray)


def host_tensor(array: HostArray, dtype: DType) -> torch.Tensor:
    """A torch view of a native-endian host array in its carrier type.

    Copied where torch can't view it: read-only memory, and strides that are negative or cut through elements.
    """
    import torch

    if array.flags.c_contiguous:  # an axis of one element may have any stride: give it the plain one
        array = array.reshape(-1).reshape(array.shape)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    tensor = torch.from_numpy(np.require(array, requirements="W"))
    return tensor if dtype.in_numpy else tensor.view(getattr(torch, dtype.name))


def to_float64(value: Any, what: str = "array") -> npt.NDArray[np.float64]:
    """A float64 NumPy copy of a host array, CPU tensor or CUDA tensor of any supported element type."""
    if is_torch(value):
        return np.asarray(value.detach().cpu().double().numpy())
    array, dtype = host_view(value, what)
    if dtype.widen is not None:
        array = dtype.widen(array)
    return array.astype(np.float64)


def convert(target: HostArray, source: HostArray, cast: Cast | None) -> None:
    """target[...] = source, both in the carrier types of the cast."""
    if cast is not None and cast.source.widen is not None:
        source = cast.source.widen(source)
    if cast is not None and cast.target.narrow is not None:
        source = cast.target.narrow(source)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond fp16's range lies infinity
        np.copyto(target, source, casting="same_kind")


def empty_like(x: Any, shape: tuple[int, int]) -> Any:
    if is_torch(x):
        import torch

        return torch.empty(shape, dtype=x.dtype, device=x.device)
    return np.empty(shape, np.asanyarray(x).dtype.newbyteorder("="))


def address_of(array: HostArray) -> int:
    """The address of a NumPy array's first element."""
    try:  # an eighth of the other way's time; for writable, contiguous arrays of at least a byte
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]  # arrays are buffers
    except (TypeError, ValueError):
        return int(array.__array_interface__["data"][0])


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last that a torch tensor's elements take up."""
    if tensor.numel() == 0:
        return (tensor.data_ptr(), tensor.data_ptr())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def overlaps(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two address ranges share a byte."""
    return a[0] < b[1] and b[0] < a[1]
