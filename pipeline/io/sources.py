"""The source that a value stands for, whoever opens it, with the checks that all sources share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pipeline.dtypes import parse_dtype
from pipeline.errors import InputError
from pipeline.flow import Source
from pipeline.io import batches
from pipeline.io.registry import SOURCES, SourceOpener, SourceRequest


def open_source(value: Any, request: SourceRequest) -> Source:
    """Open what `value` stands for. The caller closes it.

    Raises:
        ShapeError, DTypeError, FileFormatError, InputError: it can't be streamed through this layer.
        PipelineError: a third party's entry point for it can't be used.
    """
    source = _opener(value)(value, request)
    try:
        dtype = parse_dtype(source.dtype, f"{source.name} dtype")
        if dtype is not source.dtype:  # a type's name
            source.dtype = dtype
        request.check_rows((source.rows or 0, source.features), source.name)
        request.check_dtype(dtype, source.name, source.conversion(request.dtype))
    except BaseException:
        source.close()
        raise
    return source


def _opener(value: Any) -> SourceOpener:
    opener = SOURCES.find(value)
    if opener is not None:
        return opener
    if isinstance(value, (str, os.PathLike)):
        raise InputError(
            f"source {os.fspath(value)!r} doesn't end in .npy, the only file format read; save the array with "
            f"np.save, or pass it itself"
        )
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, dict, set)):
        return batches.open_source
    raise InputError(
        f"source is a {type(value).__name__}, expected a NumPy array, a torch tensor, the path of a .npy file or "
        f"an iterable of batches"
    )
