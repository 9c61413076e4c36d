"""Element types and precisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import DTypeError, OptionError


@dataclass(frozen=True)
class DType:
    """An element type of the layer.

    `carrier` is the NumPy type that moves its bytes on the host: NumPy has no bfloat16 of its own, so
    bfloat16 travels as unsigned 16-bit integers.
    """

    name: str
    carrier: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        return self.carrier.itemsize

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return parse_dtype, (self.name,)  # there is one object a type: they are compared with `is`


FLOAT64 = DType("float64", np.dtype("=f8"))
FLOAT32 = DType("float32", np.dtype("=f4"))
FLOAT16 = DType("float16", np.dtype("=f2"))
BFLOAT16 = DType("bfloat16", np.dtype("=u2"))
DTYPES = {dtype.name: dtype for dtype in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)}
_SHORT_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
    name = _SHORT_NAMES.get(name, name)
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
    if dtype is not FLOAT32 or wire not in (BFLOAT16, FLOAT16):
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
