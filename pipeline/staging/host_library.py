"""The library in C: how it is found and checked, its functions, and the twins of its structures (csrc/host/)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast

COPY, READ_FILE, WRITE_FILE = range(3)
CASTS: dict[Cast | None, int] = {
    None: 0,
    Cast(FLOAT32, BFLOAT16): 1,
    Cast(FLOAT32, FLOAT16): 2,
    Cast(BFLOAT16, FLOAT32): 3,
    Cast(FLOAT16, FLOAT32): 4,
}
INSTRUCTIONS = {"best": 0, "AVX2": 1, "portable": 2}  # at most these
_AGAIN = "install the package again"


class CopyRequest(ctypes.Structure):
    """What a copy job is asked for; see csrc/host/copy_workers.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("cast", ctypes.c_int32),
        ("streaming", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
        ("source_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("map", ctypes.c_void_p),
    )


class CopyResult(ctypes.Structure):
    """How a copy job ended; see csrc/host/copy_workers.h."""

    _fields_ = (
        ("start_ns", ctypes.c_int64),
        ("end_ns", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("error", ctypes.c_int32),
    )


class MoverDevice(ctypes.Structure):
    """The driver's functions and what they are called with; see csrc/host/mover.h, as for all that follow."""

    _fields_ = (
        ("context", ctypes.c_void_p),
        ("in_stream", ctypes.c_void_p),
        ("out_stream", ctypes.c_void_p),
        ("set_context", ctypes.c_void_p),
        ("copy_in", ctypes.c_void_p),
        ("copy_out", ctypes.c_void_p),
        ("record", ctypes.c_void_p),
        ("query", ctypes.c_void_p),
    )


class MoverRing(ctypes.Structure):
    """The pinned pieces of one direction."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("memory", ctypes.POINTER(ctypes.c_void_p)),
        ("events", ctypes.POINTER(ctypes.c_void_p)),
    )


class MoverSpan(ctypes.Structure):
    """When a piece's two copies began and ended."""

    _fields_ = (
        ("host_start_ns", ctypes.c_int64),
        ("host_end_ns", ctypes.c_int64),
        ("device_start_ns", ctypes.c_int64),
        ("device_end_ns", ctypes.c_int64),
    )


class TransferRequest(ctypes.Structure):
    """A chunk to move."""

    _fields_ = (
        ("host", CopyRequest),
        ("device", ctypes.c_uint64),
        ("row_bytes", ctypes.c_int64),
        ("piece_rows", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("out", ctypes.c_int32),
    )


class TransferResult(ctypes.Structure):
    """How that ended."""

    _fields_ = (
        ("position", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("device_error", ctypes.c_int32),
        ("cancelled", ctypes.c_int32),
    )


TWINS: dict[str, type[ctypes.Structure]] = {  # by their names in C
    "copy_request": CopyRequest,
    "copy_result": CopyResult,
    "mover_device": MoverDevice,
    "mover_ring": MoverRing,
    "mover_span": MoverSpan,
    "transfer_request": TransferRequest,
    "transfer_result": TransferResult,
}
_POINTER = ctypes.c_void_p
_FUNCTIONS: tuple[tuple[Any, ...], ...] = (  # name, result, arguments
    ("copy_workers_open", _POINTER, ctypes.c_int, ctypes.c_int),
    ("copy_workers_close", None, _POINTER),
    ("copy_workers_isa", ctypes.c_char_p, _POINTER),
    ("copy_workers_use_maps", ctypes.c_int),
    ("copy_workers_job_bytes", ctypes.c_size_t),
    ("copy_workers_submit", ctypes.c_int, _POINTER, _POINTER, _POINTER),
    ("copy_workers_done", ctypes.c_int, _POINTER, _POINTER),
    ("copy_workers_wait", None, _POINTER, _POINTER),
    ("copy_workers_pending", ctypes.c_int, _POINTER),
    ("mover_open", _POINTER, _POINTER, _POINTER, ctypes.c_int),
    ("mover_use", ctypes.c_int, _POINTER, ctypes.c_int, _POINTER),
    ("mover_transfer_bytes", ctypes.c_size_t),
    ("mover_submit", None, _POINTER, _POINTER, _POINTER),
    ("mover_queued", _POINTER, _POINTER),
    ("mover_done", ctypes.c_int, _POINTER, _POINTER),
    ("mover_cancel", None, _POINTER),
    ("mover_close", None, _POINTER),
    ("mover_has_ranges", ctypes.c_int),
)


@functools.cache
def find_library() -> tuple[Any, str]:
    """The library, or None and the reason why it can't be used."""
    package = Path(__file__).resolve().parent.parent
    built = sorted(package.glob("_host*.so"))
    if not built:
        return None, "not built: no C compiler when the package was installed"
    folders = (package / "csrc" / "host", package.parent / "csrc" / "host")
    digest = digest_of(next((folder for folder in folders if folder.is_dir()), package))
    reason = ""
    for path in built:
        library, reason = load_library(path, digest)
        if library is not None:
            return library, ""
    return None, reason


def digest_of(folder: Path) -> str:
    """What tells the sources in a folder from others; setup.py compiles it in."""
    files = sorted(folder.glob("*.[ch]"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def load_library(path: Path, digest: str) -> tuple[Any, str]:
    """The library at `path`, or None and the reason why it can't be used. It must be built from sources of that digest,
    and its structures must have the sizes of their twins here."""
    try:
        library = ctypes.CDLL(str(path), use_errno=True)
        library.host_source.restype = ctypes.c_char_p
        library.host_struct_bytes.restype, library.host_struct_bytes.argtypes = ctypes.c_size_t, (ctypes.c_char_p,)
    except (OSError, AttributeError) as error:
        return None, f"can't be loaded: {error}"
    if library.host_source() != digest.encode():
        return None, f"built from other sources: {_AGAIN}"
    for name, twin in TWINS.items():
        in_c, here = library.host_struct_bytes(name.encode()), ctypes.sizeof(twin)
        if in_c != here:
            return None, f"built with a {name} of {in_c} bytes, {here} were expected: {_AGAIN}"
    for name, result, *arguments in _FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""
