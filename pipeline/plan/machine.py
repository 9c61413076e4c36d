"""A host and its GPUs by a few measured numbers: what plans are made with. Shipped ones, and files of one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import FileFormatError, OptionError
from pipeline.kernels.choose import ARCHITECTURES

_RUNS_AS = ("fp32", "ieee", "tf32", "bfloat16", "float16")
_SHIPPED = Path(__file__).parent / "machines"


@dataclass(frozen=True)
class Machine:
    """A host and its GPUs by what was measured there. GB/s are 1e9 bytes per second.

    Fields that go by a number of GPUs are for all these GPUs of a host together. Between the numbers that were measured
    a plan takes what lies in between, beyond them what the most GPUs had: a field with "1" alone says that all GPUs of
    a host share what one GPU was measured with.
    """

    name: str
    gpu: str
    architecture: str  # that kernels are compiled for ("sm_90a"), which decides what runs for a precision
    origin: str
    gpu_memory_bytes: int
    host_memory_bytes: int
    h2d_gb_per_s: dict[str, float]  # pinned memory, nothing in the other direction; by number of GPUs
    d2h_gb_per_s: dict[str, float]  # likewise
    duplex_gb_per_s: dict[str, float]  # each way with copies both ways at once, by number of GPUs
    copy_pause_us: float  # a copy engine loses it before the first copy of another chunk
    kernel_tflops: dict[str, float]  # by what runs: "fp32", "ieee", "tf32", "bfloat16", "float16"
    fill_gb_per_s: float  # one GPU's copy workers: bytes of fills over the time that any was under way
    drain_gb_per_s: float
    copy_gb_per_s: dict[str, float]  # fills and drains together while the bus is busy, by number of GPUs
    fresh_gb_per_s: float  # drains to memory that was never written before, of a whole host
    cached_read_gb_per_s: float  # files that the host's memory holds, of a whole host
    disk_read_gb_per_s: float
    disk_write_gb_per_s: float  # synchronised
    pinned_run_us: float  # a warm run takes it beyond what its stages take, no copy workers at work
    staged_run_us: float  # the same with copy workers, which have to be woken

    @classmethod
    def load(cls, name: str) -> Machine:
        """The shipped machine of that name, or the one that a .json file describes.

        Raises:
            OptionError: no such machine. FileFormatError: the file doesn't describe one. OSError: it can't be read.
        """
        path = Path(name)
        if path.suffix != ".json":
            path = _SHIPPED / f"{name.lower()}.json"
            if not path.is_file():
                shipped = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.json")))
                raise OptionError(
                    f"machine {name!r} isn't known, expected one of {shipped}, or the path of a .json with the same "
                    f"fields, measured on yours"
                )
        try:
            document = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{path} isn't a machine's description: expected JSON, {error}") from error
        if not isinstance(document, dict):
            raise FileFormatError(
                f"{path} isn't a machine's description: it holds a {type(document).__name__}, expected an object with "
                f"fields; compare with {_SHIPPED / 'h200.json'}"
            )
        missing = {field.name for field in fields(cls)} - document.keys()
        extra = document.keys() - {field.name for field in fields(cls)}
        if missing or extra:
            raise FileFormatError(
                f"{path} isn't a machine's description: missing {sorted(missing) or 'nothing'}, unknown "
                f"{sorted(extra) or 'nothing'}; compare with {_SHIPPED / 'h200.json'}"
            )
        for field in fields(cls):
            _check_value(path, field.name, str(field.type), document[field.name])
        return cls(**document)


def of_gpus(measured: dict[str, float], gpus: int) -> float:
    """What all of a host's `gpus` have together, by a field that goes by number of GPUs."""
    counts = sorted(int(count) for count in measured)
    return float(np.interp(gpus, counts, [measured[str(count)] for count in counts]))


def _check_value(path: Path, name: str, kind: str, value: Any) -> None:
    """Check that a field has a value of its kind.

    Raises:
        FileFormatError: it hasn't.
    """
    if kind.startswith("dict"):
        expected, right = _expected_keys(name, value)
    elif name == "architecture":
        expected, right = f"one of {', '.join(ARCHITECTURES)}", value in ARCHITECTURES
    elif kind == "str":
        expected, right = "text", isinstance(value, str)
    else:
        allowed = int if kind == "int" else (int, float)
        expected = "a whole number above 0" if kind == "int" else "a number above 0"
        right = isinstance(value, allowed) and not isinstance(value, bool) and is_rate(value)
    if not right:
        raise FileFormatError(
            f"{path}: {name} is {value!r}, expected {expected}; compare with {_SHIPPED / 'h200.json'}"
        )
    if isinstance(value, dict):
        for key, number in value.items():
            _check_value(path, f"{name} of {key}", "float", number)


def _expected_keys(name: str, value: Any) -> tuple[str, bool]:
    """What a field that holds several numbers should go by, and whether it does."""
    if name == "kernel_tflops":
        right = isinstance(value, dict) and bool(value) and value.keys() <= set(_RUNS_AS)
        return f"numbers by {', '.join(_RUNS_AS)}, at least one of them", right
    right = isinstance(value, dict) and "1" in value and all(_is_count(key) for key in value)
    return 'numbers by number of GPUs, "1" among them, such as {"1": 50.0, "4": 80.0}', right


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and text[0] != "0"


def is_rate(value: float) -> bool:
    """Whether `value` is a positive number that arithmetic with it can't take to 0 or infinity."""
    return 1e-30 < value < 1e30
