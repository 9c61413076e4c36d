"""The source that a value stands for, whoever opens it, with the checks that all sources share."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable
from typing import Any

from pipeline.dtypes import parse_dtype
from pipeline.errors import InputError, PipelineError
from pipeline.flow import Source
from pipeline.io import batches
from pipeline.io.registry import SOURCES, SourceOpener, SourceRequest


def open_source(value: Any, request: SourceRequest) -> Source:
    """Open what `value` stands for. The caller closes it.

    Raises:
        ShapeError, DTypeError, FileFormatError, InputError: it can't be streamed through this layer.
        PipelineError: a third party's entry point for it can't be used, or its opener returns no source.
    """
    source = _opener(value)(value, request)
    if not isinstance(source, Source):
        raise PipelineError(
            f"the opener of a {type(value).__name__} returned a {type(source).__name__}, expected a pipeline.Source; "
            f"correct what was registered for it"
        )
    try:
        _check_row_count(source)
        dtype = parse_dtype(source.dtype, f"{source.name} dtype")
        if dtype is not source.dtype:  # a type's name
            source.dtype = dtype
        request.check_rows((source.rows or 0, source.features), source.name)
        request.check_dtype(dtype, source.name, source.conversion(request.dtype))
    except BaseException:
        source.close()
        raise
    return source


def _check_row_count(source: Source) -> None:
    rows: Any = source.rows  # whatever a third party says
    if rows is not None and (not isinstance(rows, numbers.Integral) or rows < 0):
        raise InputError(f"{source.name} has {rows!r} rows, expected a whole number, or None where only its end tells")


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
