"""The options of a run: one frozen dataclass that Python's functions, the command line and plans all read.

A new option is one field of `RunOptions`: its default, the parser that checks it once, its text for docstrings, and its
flag for the command line, if it has one.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pipeline.errors import OptionError, PipelineError

if TYPE_CHECKING:  # NumPy isn't imported here, so that `pipeline --help` is quick
    import os

    from pipeline.dtypes import DType

DEFAULT_STREAMS = 6  # fewer fall into step and lose overlap (docs/notes/runs.md)
_CHUNK_BYTES = 32 * 2**20  # what the wider of a chunk's two sides has, where its rows are chosen
_MOST_ROWS, _MOST_CPU_ROWS = 65_536, 2**20  # such a chunk has no more
_FEWEST_CHUNKS, _FEWEST_CPU_CHUNKS = 8, 2  # a short run has; the CPU's threads wait for each other at each one's end
_FEWEST_ROWS = 256  # a short run's chunks have: a kernel on fewer leaves multiprocessors idle


# -- what is known of an option ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """How the command line takes an option: its help, the word for its value, and what a shell's word stands for."""

    help: str
    metavar: str | None = None
    read: Callable[[str], Any] = str
    early: bool = False  # a value that the option's parser refuses is a usage error


@dataclass(frozen=True)
class About:
    """An option besides its name, type and default."""

    text: str  # for docstrings
    parse: Callable[[Any], Any]  # gives the normal form, raises ValueError("expected ...") or a PipelineError
    flag: Flag | None  # None: not an option of the command line
    of_one_run: bool  # each run of a Pipeline may have its own value
    planned: bool  # it changes what a run takes, so a plan has it too


def _about(
    parse: Callable[[Any], Any],
    text: str,
    *,
    flag: Flag | None = None,
    of_one_run: bool = False,
    planned: bool = False,
) -> dict[str, About]:
    """The metadata of a field."""
    return {"about": About(" ".join(text.split()), parse, flag, of_one_run, planned)}


# -- parsers -----------------------------------------------------------------------------------------------------------


def _as_is(value: Any) -> Any:
    """For what only the machine can judge; that happens where the machine is asked."""
    return value


def _whole_number_or_auto(value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError("expected 'auto' or a whole number of at least 1")
    return int(value)


def _device_names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (str, list, tuple)):
        raise ValueError("expected None, a device name or a list of device names")
    names = tuple("cuda:0" if name == "cuda" else str(name) for name in ([value] if isinstance(value, str) else value))
    if not names or len(set(names)) != len(names):
        raise ValueError("expected one or several different device names")
    return names


def _wire_dtype(value: Any) -> DType | None:
    from pipeline.dtypes import parse_wire_dtype

    return None if value is None else parse_wire_dtype(value)


def _out_dtype(value: Any) -> DType | None:
    from pipeline.dtypes import parse_out_dtype

    return None if value is None else parse_out_dtype(value)


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        import numpy as np

        if not isinstance(value, np.bool_):  # the text "no" would be true
            raise ValueError("expected True or False")
    return bool(value)


def _progress_function(value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError("expected a function that takes a Progress, or None")
    return value


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


# -- the options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a run has come; `rows_total` is None where only the end of the source will tell.

    `ceiling_rows_per_s` is what the devices' buses and kernels allow, None where that wasn't measured.
    """

    rows_done: int
    rows_total: int | None
    elapsed_s: float
    ceiling_rows_per_s: float | None = None

    @property
    def rows_per_s(self) -> float:
        return self.rows_done / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(frozen=True)
class RunOptions:
    """Every option of a run, checked and in its normal form.

    What depends on the layer or the machine is checked where that is known: `wire_dtypes` against the layer,
    `devices` by `find_devices`, `trace` by `check_trace`.

    Raises:
        OptionError, DTypeError: a value that isn't allowed.
    """

    chunk_rows: int | str = field(
        default="auto",
        metadata=_about(
            _whole_number_or_auto,
            """rows of one kernel launch, or "auto" (the wider side of a chunk is about 32 MiB; less for a source with
            few rows, so that its copies and kernels overlap).""",
            flag=Flag("rows of one kernel launch (default auto)", "N", _number_or_word, early=True),
            planned=True,
        ),
    )
    num_streams: int | str = field(
        default="auto",
        metadata=_about(
            _whole_number_or_auto,
            f'chunks in flight on a device, each on its own stream, or "auto" ({DEFAULT_STREAMS}).',
            flag=Flag("chunks in flight on a device (default auto)", "N", _number_or_word, early=True),
            planned=True,
        ),
    )
    devices: str | list[str] | tuple[str, ...] | None = field(
        default=None,
        metadata=_about(
            _device_names,
            """None (every visible GPU, or the CPU where there is none), a name ("cpu", "cuda", "cuda:1", "sim") or a
            list of names that share the work.""",
            flag=Flag(
                "cpu, or GPUs such as cuda:0,cuda:1 (default: every GPU, or the CPU where there is none)",
                "NAMES",
                _names,
            ),
        ),
    )
    wire_dtype: Any = field(
        default=None,
        metadata=_about(
            _wire_dtype,
            """"bf16" or "fp16": float32 rows are rounded to this type while they are staged, so that half the bytes
            cross the bus; weights are rounded too, the layer computes in this type (so its `precision` can't be
            chosen), and results come back in it. Their element type stays the source's unless `out_dtype` says
            otherwise. In fp16, what is beyond 65,504 becomes infinite.""",
            flag=Flag(
                "bf16 or fp16: float32 rows cross the bus in it, and the layer computes in it (default: the dataset's)",
                "DTYPE",
            ),
            planned=True,
        ),
    )
    out_dtype: Any = field(
        default=None,
        metadata=_about(
            _out_dtype,
            """element type of results: "float32", "bfloat16", "float16", on the CPU "float64"; None keeps the
            source's. The rounding happens once, in the kernel.""",
            flag=Flag("element type of the result (default: the dataset's)", "DTYPE"),
            planned=True,
        ),
    )
    overwrite: bool = field(
        default=False,
        metadata=_about(
            _true_or_false,
            "replace an existing output file.",
            flag=Flag("replace an existing output file"),
            of_one_run=True,
        ),
    )
    progress: Callable[[Progress], None] | None = field(
        default=None,
        metadata=_about(
            _progress_function,
            "called with a `Progress` after each chunk, from the thread that runs its device.",
            of_one_run=True,
        ),
    )
    trace: str | os.PathLike[str] | None = field(
        default=None,
        metadata=_about(
            _as_is,
            """a file for the run's timeline, replaced if it exists: .json for Perfetto and Chrome's trace viewer, .png
            for a picture, .html for a page with a timeline to zoom into (the last two need the extra "plot"). A
            failure while it is written, after the run, is a `TraceWarning`: the result comes back all the same.""",
            flag=Flag("the run's timeline: .json (Perfetto, Chrome), .png or .html", "FILE"),
            of_one_run=True,
        ),
    )

    def __post_init__(self) -> None:
        for name in OPTIONS:
            object.__setattr__(self, name, parsed(name, getattr(self, name)))

    def with_values(self, values: Mapping[str, Any]) -> RunOptions:
        """These options with some of them replaced."""
        if not values:
            return self
        return RunOptions(**{**self.as_keywords(), **values})

    def as_keywords(self) -> dict[str, Any]:
        return dict(vars(self))

    # -- what "auto" and None stand for --------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """Chunks in flight on a device."""
        return DEFAULT_STREAMS if isinstance(self.num_streams, str) else self.num_streams

    def result_dtype(self, dtype: DType) -> DType:
        """The element type of results where the rows are of `dtype`."""
        return dtype if self.out_dtype is None else self.out_dtype

    def wire_dtypes(self, dtype: DType, precision: str | None = None) -> tuple[DType, DType]:
        """The element types in which rows of `dtype` cross the bus, in and out.

        Raises:
            OptionError: `wire_dtype` doesn't go with the layer's type and `precision`, or with `out_dtype`.
        """
        from pipeline.dtypes import wire_dtypes

        return wire_dtypes(dtype, self.wire_dtype, self.result_dtype(dtype), precision)

    def most_chunk_rows(self, row_bytes: int, *, cpu_alone: bool = False) -> int:
        """Rows of the largest chunk: `chunk_rows` or, where they are chosen, those of about 32 MiB, a multiple of 128.
        `row_bytes` is the wider side's. `cpu_alone` says that no other device takes part."""
        if not isinstance(self.chunk_rows, str):
            return self.chunk_rows
        rows = _CHUNK_BYTES // row_bytes // 128 * 128
        return int(min(_MOST_CPU_ROWS if cpu_alone else _MOST_ROWS, max(128, rows)))

    def rows_per_chunk(self, rows: int | None, devices: int, most: int, *, cpu_alone: bool = False) -> int:
        """Rows of the chunks of a run of `rows` rows (None: not known) on `devices` devices: `most` or, where they are
        chosen, fewer for a run so short that its copies and kernels wouldn't overlap."""
        if not isinstance(self.chunk_rows, str) or rows is None:
            return most
        chunks = devices * (_FEWEST_CPU_CHUNKS if cpu_alone else _FEWEST_CHUNKS)
        share = -(-rows // chunks)
        return min(most, max(_FEWEST_ROWS, -(-share // 128) * 128))


OPTIONS: dict[str, About] = {each.name: each.metadata["about"] for each in fields(RunOptions)}
PIPELINE_OPTIONS = tuple(name for name, about in OPTIONS.items() if not about.of_one_run)
ONE_RUN_OPTIONS = tuple(name for name, about in OPTIONS.items() if about.of_one_run)
PLAN_OPTIONS = tuple(name for name, about in OPTIONS.items() if about.planned)


def parsed(name: str, value: Any) -> Any:
    """The normal form of an option's value.

    Raises:
        OptionError, DTypeError: a value that isn't allowed.
    """
    try:
        return OPTIONS[name].parse(value)
    except PipelineError:
        raise
    except ValueError as error:
        raise OptionError(f"{name} is {value!r}, {error}") from None
