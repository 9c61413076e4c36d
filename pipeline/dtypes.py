"""Element types, what they are on the host, in torch and in kernels, and the precisions that they are computed in.

A type is one `DType`: all that the package knows of it. `register_dtype` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import DTypeError, OptionError

_Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class DType:
    """An element type of rows and weights.

    Args:
        name: its name in NumPy (or the package ml_dtypes) and in torch.
        carrier: the NumPy type that moves its bytes on the host, an unsigned integer where NumPy itself lacks the type.
        short_name: another name that options take.
        widen, narrow: where NumPy lacks it, the exact change of carriers to float32, and the rounding of float32 to
            carriers (to nearest, ties to even; NaN stays NaN).
        cuda_name: its C++ type in kernels, None where no kernel takes it.
        tensor_map_name: the end of its CU_TENSOR_MAP_DATA_TYPE, for kernels that use the bulk tensor copy engine.
        carries_float32: float32 rows may cross the bus in it (`wire_dtype`).
    """

    name: str
    carrier: np.dtype[Any]
    short_name: str = ""
    widen: Callable[[_Array], _Array] | None = None
    narrow: Callable[[_Array], _Array] | None = None
    cuda_name: str | None = None
    tensor_map_name: str | None = None
    carries_float32: bool = False

    @property
    def itemsize(self) -> int:
        return self.carrier.itemsize

    @property
    def in_numpy(self) -> bool:
        """Whether NumPy itself has the type. Arrays of other types are of their carrier, or of ml_dtypes' type."""
        return self.carrier.name == self.name

    def numpy_type(self) -> np.dtype[Any]:
        """The type that arrays of it have: NumPy's, else that of the package ml_dtypes.

        Raises:
            ImportError, AttributeError: ml_dtypes isn't installed, or lacks it.
        """
        if self.in_numpy:
            return self.carrier
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.name))
        return found

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return parse_dtype, (self.name,)  # there is one object a type: they are compared with `is`


def widen_bfloat16(carrier: _Array) -> _Array:
    return np.asarray((carrier.astype(np.uint32) << 16).view(np.float32))


def narrow_bfloat16(array: _Array) -> _Array:
    """float32 rounded to nearest even, as bfloat16 in its carrier type; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)


FLOAT64 = DType("float64", np.dtype("=f8"), "fp64")
FLOAT32 = DType("float32", np.dtype("=f4"), "fp32", cuda_name="float", tensor_map_name="FLOAT32")
FLOAT16 = DType("float16", np.dtype("=f2"), "fp16", cuda_name="__half", tensor_map_name="FLOAT16", carries_float32=True)
BFLOAT16 = DType(
    "bfloat16",
    np.dtype("=u2"),
    "bf16",
    widen=widen_bfloat16,
    narrow=narrow_bfloat16,
    cuda_name="__nv_bfloat16",
    tensor_map_name="BFLOAT16",
    carries_float32=True,
)
DTYPES = {dtype.name: dtype for dtype in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)}


def register_dtype(dtype: DType) -> DType:
    """Let arrays, tensors, weights and options be of another element type from now on. Returns it.

    The CPU computes it through float32, in which torch must be able to read and write its tensors. GPUs refuse it until
    a kernel takes it.

    Raises:
        DTypeError: there is a type of that name already, or one of widen and narrow is missing where both are needed.
    """
    taken = {name for known in DTYPES.values() for name in (known.name, known.short_name)}
    if dtype.name in taken or (dtype.short_name and dtype.short_name in taken):
        raise DTypeError(f"an element type named {dtype.name!r} or {dtype.short_name!r} is registered already")
    if not dtype.in_numpy and (dtype.widen is None or dtype.narrow is None):
        raise DTypeError(f"element type {dtype} isn't NumPy's own, so it needs widen and narrow; pass both")
    DTYPES[dtype.name] = dtype
    return dtype


class Cast(NamedTuple):
    """A change of element type, rounded to nearest even; NaN stays NaN."""

    source: DType
    target: DType


def cast_between(source: DType, target: DType) -> Cast | None:
    """The cast from one type to the other, None where they are the same."""
    return None if source is target else Cast(source, target)


CONVERT = "convert it first, for example with .astype('float32') in NumPy or .to(torch.float32) in torch"


def parse_dtype(value: Any, what: str = "dtype", remedy: str = CONVERT) -> DType:
    """The `DType` that a name ("float32", "bf16"), a NumPy dtype or a torch dtype stands for.

    A message calls the value `what` and ends with `remedy`.

    Raises:
        DTypeError: not one of float64, float32, bfloat16, float16.
    """
    if isinstance(value, DType):
        return value
    name = value if isinstance(value, str) else str(value).removeprefix("torch.")
    name = next((dtype.name for dtype in DTYPES.values() if name == dtype.short_name), name)
    if name not in DTYPES and value is not None:  # np.dtype(None) means float64
        try:
            name = np.dtype(value).name
        except TypeError:
            pass
    if name not in DTYPES:
        raise DTypeError(f"{what} is {value}, expected one of {', '.join(DTYPES)}; {remedy}")
    return DTYPES[name]


def parse_wire_dtype(value: Any) -> DType:
    """The element type on the wire that `wire_dtype` asks for."""
    try:
        return parse_dtype(value)
    except DTypeError:
        raise OptionError(f"wire_dtype is {value!r}, expected 'bf16' or 'fp16'; or leave it out") from None


def wire_dtypes(
    dtype: DType, wire: DType | None, out_dtype: DType, precision: str | None = None
) -> tuple[DType, DType]:
    """The element types in which rows of `dtype` cross the bus, in and out, where results are of `out_dtype` and `wire`
    is asked for.

    Raises:
        OptionError: a wire_dtype that rows can't be rounded to while they are staged, or that doesn't go with
            `out_dtype` or the layer's `precision`.
    """
    if wire is None or wire is dtype:
        return dtype, out_dtype
    if dtype is not FLOAT32 or not wire.carries_float32:
        raise OptionError(
            f"wire_dtype is {wire} for a layer of {dtype}, expected 'bf16' or 'fp16' for a layer of float32; "
            f"leave it out, or convert the data"
        )
    if precision is not None and precision != parse_precision(None, dtype):
        raise OptionError(
            f"precision is {precision!r} and wire_dtype {wire}, in which the layer then computes: leave precision out, "
            f"or leave wire_dtype out to compute in {precision!r}"
        )
    if out_dtype is FLOAT64:
        raise OptionError(f"wire_dtype is {wire} and out_dtype float64: results of {wire} have no use for it")
    return wire, out_dtype if out_dtype.itemsize == wire.itemsize else wire


def parse_out_dtype(value: Any) -> DType:
    """The element type of results that `out_dtype` asks for."""
    return parse_dtype(value, "out_dtype", "leave it out for that of the source")


PRECISIONS = ("fp32", "ieee", "tf32")


def parse_precision(value: str | None, dtype: DType) -> str:
    """The precision a layer of `dtype` computes in: "fp32", "ieee" or "tf32" for float32 data, else the dtype's name.

    Raises:
        OptionError: unknown name, or a precision asked for data that isn't float32.
    """
    if value is None:
        return "fp32" if dtype is FLOAT32 else dtype.name
    if value == dtype.name and dtype is not FLOAT32:
        return value
    if value not in PRECISIONS:
        raise OptionError(
            f"precision is {value!r}, expected one of {', '.join(map(repr, PRECISIONS))}; or leave it out"
        )
    if dtype is not FLOAT32:
        raise OptionError(
            f"precision={value!r} is for float32 data, the layer is {dtype}: leave precision out, {dtype} data has "
            f"its own (float32 accumulation, one rounding at the end)"
        )
    return value
