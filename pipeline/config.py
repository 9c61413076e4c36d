"""Element types, precisions, run options and the environment variables the package reads, but for nsys.py's two."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DTypeError, OptionError

GIB = 2**30
MIB = 2**20

CHUNK_BYTES = 32 * MIB  # of the wider of a chunk's two sides
# NOTE: with 4, chunks fall into step, all loading and then all unloading, and lose overlap: 0.73 to 0.97 of the duplex
# PCIe ceiling from run to run, against 0.96 with 6 (H200, pinned to pinned, 4096 -> 4096, tf32). 8 add nothing.
DEFAULT_STREAMS = 6
_FEWEST_CHUNKS, _FEWEST_ROWS = 8, 256  # of an automatic choice; a kernel on fewer rows leaves multiprocessors idle


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


def wire_dtypes(dtype: DType, wire_dtype: Any, out_dtype: DType, precision: str | None = None) -> tuple[DType, DType]:
    """The element types in which rows of `dtype` cross the bus, in and out, where results are of `out_dtype`.

    Raises:
        OptionError: a wire_dtype that rows can't be rounded to while they are staged, or that doesn't go with
            `out_dtype` or the layer's `precision`.
    """
    try:
        wire = dtype if wire_dtype is None else parse_dtype(wire_dtype)
    except DTypeError:
        raise OptionError(f"wire_dtype is {wire_dtype!r}, expected 'bf16' or 'fp16'; or leave it out") from None
    if wire is dtype:
        return wire, out_dtype
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


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise OptionError(f"environment variable {name} is {text!r}, expected a whole number of at least 1")
    return value


def cache_dir() -> Path:
    """Where kernels and measurements are kept: PIPELINE_CACHE_DIR, else `pipeline` in $XDG_CACHE_HOME or `~/.cache`."""
    chosen = os.environ.get("PIPELINE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pipeline"


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Staging:
    """How rows are staged between the caller's memory and a device: the pinned ring and the copy workers."""

    piece_bytes: int  # of one pinned piece, on the wire
    ring_pieces: int  # in each direction
    workers: int  # threads that fill and drain pieces
    origin: str = field(default="", compare=False)  # where the values came from, for reports

    @classmethod
    def default(cls) -> Staging:
        """What suits most machines.

        8 MiB and 4 pieces: a ring that stays in the last-level cache. Workers: all cores but two, one for the loop
        and one for everybody else; at least 1, at most 16.
        """
        return cls(8 * MIB, 4, min(16, max(1, cores() - 2)), origin="defaults")

    @classmethod
    def chosen(cls, found: Staging | None = None) -> Staging:
        """What the environment says (PIPELINE_PIECE_BYTES, PIPELINE_RING_PIECES, PIPELINE_COPY_WORKERS), else what was
        found (None: the default).

        Raises:
            OptionError: a variable is no whole number of at least 1.
        """
        found = found or cls.default()
        names = ("PIPELINE_PIECE_BYTES", "PIPELINE_RING_PIECES", "PIPELINE_COPY_WORKERS")
        given = [name for name in names if os.environ.get(name)]
        return cls(
            _environment_int(names[0], found.piece_bytes),
            _environment_int(names[1], found.ring_pieces),
            _environment_int(names[2], found.workers),
            origin=", ".join([found.origin, *given] if len(given) < len(names) else given),
        )


def tuning() -> str:
    """When to measure this machine's copies (PIPELINE_TUNE): "never" for 0, "always" for 1, else "once".

    Raises:
        OptionError: another value.
    """
    text = os.environ.get("PIPELINE_TUNE", "")
    if text not in ("", "0", "1"):
        raise OptionError(
            f"environment variable PIPELINE_TUNE is {text!r}, expected 0 (use the defaults), 1 (measure in every "
            f"Pipeline) or nothing (measure once, in a large run)"
        )
    return {"": "once", "0": "never", "1": "always"}[text]


def native_copy() -> bool:
    """Whether the copy workers written in C may be used: PIPELINE_NATIVE_COPY isn't 0.

    Raises:
        OptionError: another value than 0, 1 or nothing.
    """
    text = os.environ.get("PIPELINE_NATIVE_COPY", "")
    if text not in ("", "0", "1"):
        raise OptionError(
            f"environment variable PIPELINE_NATIVE_COPY is {text!r}, expected 0 (NumPy copies), 1 or nothing (workers "
            f"written in C)"
        )
    return text != "0"


def auto_chunk_rows(row_bytes: int, *, most: int = 65_536) -> int:
    """Rows of a chunk of about 32 MiB, a multiple of 128 between 128 and `most`; `row_bytes` is its wider side's."""
    return int(min(most, max(128, CHUNK_BYTES // row_bytes // 128 * 128)))


def rows_a_chunk(rows: int, devices: int, most: int, *, fewest_chunks: int = _FEWEST_CHUNKS) -> int:
    """Rows of the chunks of a run of `rows` rows on `devices` devices: `most`, or fewer where the run is so short that
    its copies and kernels wouldn't overlap."""
    share = -(-rows // (fewest_chunks * devices))
    return min(most, max(_FEWEST_ROWS, -(-share // 128) * 128))


def debug() -> bool:
    """Whether PIPELINE_DEBUG is set: buffers are overwritten with NaN between uses."""
    return bool(os.environ.get("PIPELINE_DEBUG"))
