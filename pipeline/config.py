"""Every environment variable that the package reads, and how rows are staged, which some of them decide."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import OptionError

GIB = 2**30
MIB = 2**20


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

    piece_bytes: int  # a pinned piece has so many, of rows as they cross the bus
    ring_pieces: int  # each direction has so many
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


def environment() -> tuple[object, ...]:
    """What a fleet is opened with, apart from its options: the package's environment variables, the cores."""
    return (*sorted(item for item in os.environ.items() if item[0].startswith("PIPELINE_")), cores())


def debug() -> bool:
    """Whether PIPELINE_DEBUG is set: buffers are overwritten with NaN between uses."""
    return bool(os.environ.get("PIPELINE_DEBUG"))


def nsys_program() -> str | None:
    """The Nsight Systems program to record with (PIPELINE_NSYS), None where the PATH decides."""
    return os.environ.get("PIPELINE_NSYS") or None


def nsys_packages() -> Path:
    """The folder with packages of libraries that Nsight Systems' importer may lack (PIPELINE_NSYS_DEBS)."""
    return Path(os.environ.get("PIPELINE_NSYS_DEBS", ".deb"))
