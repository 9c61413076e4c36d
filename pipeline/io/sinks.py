"""The sink that a value stands for, whoever opens it."""

from __future__ import annotations

import os
from typing import Any

from pipeline.errors import OptionError, PipelineError
from pipeline.flow import Sink
from pipeline.io import memory
from pipeline.io.registry import SINKS, SinkOpener, SinkRequest


def open_sink(out: Any, request: SinkRequest) -> Sink:
    """Open what `out` stands for, checked against the source and the result. Nothing is created if a check fails.

    Raises:
        ShapeError, DTypeError, OptionError, OutputError, OutputExistsError: the result can't go there.
        PipelineError: a third party's entry point for it can't be used, or its opener returns no sink.
    """
    sink = memory.new_result(request) if out is None else _opener(out)(out, request)
    if not isinstance(sink, Sink):
        raise PipelineError(
            f"the opener of a {type(out).__name__} returned a {type(sink).__name__}, expected a pipeline.Sink; correct "
            f"what was registered for it"
        )
    sink.cast = request.cast
    return sink


def _opener(out: Any) -> SinkOpener:
    opener = SINKS.find(out)
    if opener is not None:
        return opener
    if isinstance(out, (str, os.PathLike)):
        name = os.fspath(out)
        raise OptionError(f"out {name!r} doesn't end in .npy, the only file format written; choose a name that does")
    raise OptionError(
        f"out is a {type(out).__name__}, expected None, a NumPy array, a torch tensor or the path of a .npy file"
    )
