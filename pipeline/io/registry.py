"""Which function opens a source or a sink: by the suffix of a path, or by the type of any other value.

Three ways lead into a registry: a line of `_BUILT_IN`, `register_source` and `register_sink`, and entry points in the
groups "pipeline.sources" and "pipeline.sinks" of installed distributions. Modules are imported when something of theirs
is opened first, and entry points are looked for when a suffix or a type isn't known otherwise.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.arrays import HostArray
from pipeline.dtypes import Cast, DType, cast_between
from pipeline.errors import OptionError, PipelineError
from pipeline.flow import BatchResult, Sink, Source
from pipeline.layer.checks import check_dtype, check_rows

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_BUILT_IN = {  # modules with `open_source`, `open_sink` or both, and the suffixes and types that these open
    "pipeline.io.memory": ("numpy.ndarray", "torch.Tensor"),
    "pipeline.io.batches": ("builtins.list", "builtins.tuple", "builtins.generator"),
    "pipeline.io.formats.npy": (".npy",),
    "pipeline.io.formats.raw": (".bin", "pipeline.io.formats.raw.RawFile"),
}


def _nowhere(array: HostArray) -> bool:
    return False


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class SourceRequest:
    """What is asked of a source: rows of `in_features` elements of `dtype`.

    `is_pinned` says whether the copy engines can read a contiguous array in place. `before_rows` is called before any
    row of an iterable is asked for, since those can't be given back, and raises where no run is possible. In a stream,
    `on_batch` is called with the rows of each batch before it is gathered, and gives the place of its result.
    """

    in_features: int
    dtype: DType
    is_pinned: Callable[[HostArray], bool] = _nowhere
    on_batch: Callable[[int], BatchResult | None] | None = None
    before_rows: Callable[[], None] = _nothing

    def check_rows(self, shape: tuple[int, ...], what: str = "the source", example: str = "") -> None:
        """Check the shape of what is opened; `what` is what messages call it, `example` how it is reshaped.

        Raises:
            ShapeError: `shape` isn't (rows, in_features).
        """
        check_rows(shape, self.in_features, what, example)

    def check_dtype(self, dtype: DType, what: str = "the source", remedy: str = "") -> None:
        """Check an element type. Raises DTypeError."""
        check_dtype(dtype, self.dtype, what, remedy)


@dataclass(frozen=True)
class SinkRequest:
    """What is asked of a sink: a place for the rows of `out_features` elements of `dtype` that a source's rows become.

    Rows come from the device as elements of `wire`. An output that exists may only be replaced with `overwrite`. With
    `reopen`, the sink goes on with what an earlier one of the same request left (`Sink.leave`).
    """

    source: Source
    out_features: int
    dtype: DType
    wire: DType
    overwrite: bool = False
    reopen: bool = False

    @property
    def rows(self) -> int | None:
        """How many rows will come; None where only the end of the source will tell."""
        return self.source.rows

    @property
    def family(self) -> str:
        """What a new result should be: "numpy", "torch" or "cuda"."""
        return self.source.family

    @property
    def cast(self) -> Cast | None:
        return cast_between(self.wire, self.dtype)


Opener = TypeVar("Opener", bound=Callable[..., Any])
SourceOpener = Callable[[Any, SourceRequest], Source]
SinkOpener = Callable[[Any, SinkRequest], Sink]


class Registry(Generic[Opener]):
    """The openers of one kind, by suffix (".npy") and by type (itself, or its dotted name)."""

    def __init__(self, group: str, built_in_name: str) -> None:
        self._group, self._built_in_name = group, built_in_name
        self._openers: dict[str | type, Opener] = {}
        self._modules = {kind: module for module, kinds in _BUILT_IN.items() for kind in kinds}

    def register(self, kind: str | type, opener: Opener, *, replace: bool = False) -> None:
        """Raises OptionError: `kind` isn't a suffix or a type, is taken, or `opener` can't be called."""
        is_suffix = isinstance(kind, str) and len(kind) > 1 and Path(f"x{kind}").suffix == kind
        is_dotted = isinstance(kind, str) and all(part.isidentifier() for part in kind.split(".")) and "." in kind
        if not (isinstance(kind, type) or is_suffix or is_dotted):
            raise OptionError(
                f"kind is {kind!r}, expected a suffix such as '.csv', a type or a type's dotted name 'package.Type'"
            )
        if not callable(opener):
            raise OptionError(f"the opener of {kind!r} is {opener!r}, expected a function of a value and a request")
        if not replace and self._is_known(kind):
            raise OptionError(f"{_dotted(kind)!r} is registered already; pass replace=True to take its place")
        self._openers[kind] = opener

    def _is_known(self, kind: str | type) -> bool:
        if isinstance(kind, str) and any(kind == _dotted(known) for known in self._openers):
            return True
        return kind in self._openers or _dotted(kind) in self._openers or _dotted(kind) in self._modules

    def find(self, value: Any) -> Opener | None:
        """What opens `value`; None where nothing does.

        Raises:
            PipelineError: the entry point for it can't be used.
        """
        kinds = _kinds(value)
        for kind in kinds:
            if kind in self._openers:
                return self._openers[kind]
            if kind in self._modules:
                opener = getattr(importlib.import_module(self._modules[str(kind)]), self._built_in_name, None)
                if opener is not None:
                    found: Opener = opener
                    return found
        return next((self._installed(kind) for kind in kinds if kind in _entry_points(self._group, *sys.path)), None)

    def _installed(self, kind: str | type) -> Opener:
        """The opener of installed distributions' entry points for `kind`, from now on the registered one."""
        points = _entry_points(self._group, *sys.path)[str(kind)]
        names = [point.dist.name if point.dist is not None else "?" for point in points]
        if len({point.value for point in points}) > 1:
            raise PipelineError(
                f"the distributions {', '.join(names)} each open {kind!r} by an entry point in {self._group}; keep one"
            )
        what = f"the entry point of the distribution {names[0]} for {kind!r} in {self._group}"
        try:
            opener: Opener = points[0].load()
        except Exception as error:
            raise PipelineError(f"{what} can't be loaded: {error!r}; repair or remove it") from error
        if not callable(opener):
            raise PipelineError(
                f"{what} is {opener!r}, expected a function of a value and a request; repair or remove it"
            )
        self._openers[kind] = opener
        return opener


def _kinds(value: Any) -> list[str | type]:
    """What a value may be registered by, the nearest kind first."""
    if isinstance(value, (str, os.PathLike)):
        return [Path(value).suffix]
    types = type(value).__mro__[:-1]  # everything is an object
    return [kind for each in types for kind in (each, _dotted(each))]


def _dotted(kind: str | type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


@functools.lru_cache(maxsize=8)
def _entry_points(group: str, *_path: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by their names, as `_path` (sys.path) has them."""
    from importlib.metadata import entry_points  # it takes longer to import than all of this package's formats

    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


SOURCES: Registry[SourceOpener] = Registry("pipeline.sources", "open_source")
SINKS: Registry[SinkOpener] = Registry("pipeline.sinks", "open_sink")


def register_source(kind: str | type, opener: SourceOpener, *, replace: bool = False) -> None:
    """Let runs read a further format or type.

        pipeline.register_source(".csv", CsvSource)

    Args:
        kind: the suffix of paths (".csv"), or the type of values, also by its dotted name ("package.Type"). Subclasses
            of a type go with it.
        opener: called with the value and a `SourceRequest`; returns a `Source`. Its width and element type are checked
            afterwards. Whatever the source holds open is released by its `close`.
        replace: take the place of what is registered.

    Distributions register theirs by an entry point in the group "pipeline.sources": its name is the suffix or the
    dotted name, its value the opener.

    Raises:
        OptionError: `kind` is neither, or is registered already.
    """
    SOURCES.register(kind, opener, replace=replace)


def register_sink(kind: str | type, opener: SinkOpener, *, replace: bool = False) -> None:
    """Let runs write a further format or type: as `register_source`, with a `SinkRequest` and the group
    "pipeline.sinks"; the opener returns a `Sink`. It makes nothing if it raises.

    Raises:
        OptionError: `kind` is neither a suffix nor a type, or is registered already.
    """
    SINKS.register(kind, opener, replace=replace)
