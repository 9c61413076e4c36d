"""Raw binary files: rows one after the other and nothing else, so their element type and shape have to be told."""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dtypes import DType, parse_dtype
from pipeline.errors import InputError, OptionError
from pipeline.flow import Sink, Source
from pipeline.io.atomic_file import AtomicFileSink, check_path
from pipeline.io.files import FileLayout, FileSource, check_size, open_regular
from pipeline.io.memory import check_out_dtype
from pipeline.io.registry import SinkRequest, SourceRequest
from pipeline.layer.checks import check_out


@dataclass(frozen=True)
class RawFile:
    """A file of rows in C order without a header, as a source or as `out`.

        run_pipelined(layer, RawFile("x.bin", "float32", (1_000_000, 1024)), RawFile("y.bin"))

    As `out` it appears under its name only when it is complete, and comes back with its type and shape.

    Args:
        path: of the file, whatever its suffix.
        dtype: the element type: a name ("float32", "bf16"), a NumPy dtype of any byte order, or a torch dtype. `out`
            may leave it out.
        shape: (rows, features). `out` may leave it out.
    """

    path: Any
    dtype: Any = None
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)):
            what = type(self.path).__name__
            raise InputError(f"path is a {what}, expected the path of a file; pass RawFile('x.bin', dtype, shape)")

    @property
    def element(self) -> DType:
        remedy = "pass the type of the elements in the file"
        return parse_dtype(self.dtype, f"the dtype of RawFile({os.fspath(self.path)!r})", remedy)

    @property
    def swapped(self) -> bool:
        """Whether elements are of foreign byte order."""
        try:
            return not np.dtype(self.dtype).isnative
        except TypeError:  # a type that NumPy doesn't have
            return False


def open_source(value: Any, request: SourceRequest) -> Source:
    """The source of a `RawFile`. Foreign byte order is converted while rows are read.

    Raises:
        FileNotFoundError, PermissionError: from opening it.
        FileFormatError: the file's size isn't that of the shape.
        InputError, ShapeError, DTypeError
    """
    if not isinstance(value, RawFile):
        raise InputError(
            f"source {os.fspath(value)!r} is raw binary, which doesn't tell its element type and shape; pass "
            f"pipeline.RawFile({os.fspath(value)!r}, dtype, (rows, features))"
        )
    path = Path(value.path)
    if value.dtype is None or value.shape is None:
        raise InputError(f"source RawFile({str(path)!r}) has no dtype or no shape; pass RawFile(path, dtype, shape)")
    element, shape = value.element, _sizes(value.shape, path)
    request.check_rows(shape, f"the array in {path}", f"RawFile(path, dtype, (rows, {request.in_features}))")
    rows, features = shape
    expected = rows * features * element.itemsize
    fd = open_regular(path, "a file of rows")
    try:
        promise = f"shape {shape} of {element} makes {expected}"
        check_size(fd, path, expected, promise, "pass the shape and the element type of what is in it")
    except BaseException:
        os.close(fd)
        raise
    layout = FileLayout.in_order(fd, path, 0, features, element.itemsize, swapped=value.swapped)
    return FileSource("raw file", layout, (rows, features), element, path)


def _sizes(shape: Any, path: Path) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise InputError(f"the shape of {str(path)!r} is {shape!r}, expected whole numbers (rows, features)")
    return sizes


class RawSink(AtomicFileSink):
    """A new raw file."""

    def __init__(self, out: RawFile, path: Path, request: SinkRequest) -> None:
        super().__init__(path, request, swapped=out.swapped)
        self._out, self._features, self._dtype = out, request.out_features, request.dtype

    def finish(self, rows: int) -> RawFile:
        super().finish(rows)
        dtype = self._out.dtype if self._out.dtype is not None else self._dtype.name
        return RawFile(self._out.path, dtype, (rows, self._features))


def open_sink(out: Any, request: SinkRequest) -> Sink:
    """The sink that writes a new raw file.

    Raises:
        ShapeError, DTypeError: it was told to be of another shape or type than the result.
        OptionError, OutputError, OutputExistsError: no file may be made there.
    """
    if not isinstance(out, RawFile):
        raise OptionError(
            f"out {os.fspath(out)!r} doesn't end in .npy: to write raw binary, pass "
            f"pipeline.RawFile({os.fspath(out)!r}); its element type and shape are in no header"
        )
    if out.dtype is not None:
        check_out_dtype(out.element, request.dtype)
    if out.shape is not None:
        sizes = _sizes(out.shape, Path(out.path))
        rows = request.rows if request.rows is not None else next(iter(sizes), 0)  # only the source's end tells
        check_out(sizes, (rows, request.out_features))
    return RawSink(out, check_path(os.fspath(out.path), request), request)
