"""The checks for authors of formats: they pass for every source and sink of ours, and find what is planted."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import batches_of, random_rows
from helpers.ends import as_tensor

from pipeline import Sink, Source
from pipeline.arrays import HostArray
from pipeline.dtypes import FLOAT32
from pipeline.flow import Feed
from pipeline.io import registry
from pipeline.testing import check_sink, check_source

X = random_rows(23, 7)


def saved(array: HostArray, folder: Path) -> Path:
    np.save(folder / "x.npy", array)
    return folder / "x.npy"


SOURCES: dict[str, Callable[[HostArray, Path], Any]] = {
    "array": lambda x, folder: x,
    "Fortran array": lambda x, folder: np.asfortranarray(x),
    "big-endian array": lambda x, folder: x.astype(">f4"),
    "view with gaps": lambda x, folder: np.repeat(x, 2, axis=1)[:, ::2],
    "tensor": lambda x, folder: as_tensor(x),
    ".npy": saved,
    "Fortran .npy": lambda x, folder: saved(np.asfortranarray(x), folder),
    "big-endian .npy": lambda x, folder: saved(x.astype(">f4"), folder),
    "map": lambda x, folder: np.load(saved(x, folder), mmap_mode="r"),
    "map with gaps": lambda x, folder: np.load(saved(np.repeat(x, 2, axis=0), folder), mmap_mode="r")[::2],
    "list of batches": lambda x, folder: [x[:3], x[3:3], x[3:20], x[20:]],
    "batches": lambda x, folder: batches_of(x, [5]),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_check_source_passes_for_ours(kind: str, tmp_path: Path) -> None:
    check_source(lambda: SOURCES[kind](X, tmp_path), X)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_check_source_passes_for_other_types(dtype: str) -> None:
    x = random_rows(23, 7, dtype)
    check_source(lambda: x, x)
    check_source(lambda: as_tensor(x), x)


SINKS: dict[str, tuple[Callable[[int, Path], Any], Callable[[Any], Any]]] = {
    "new array": (lambda rows, path: None, lambda result: result),
    "array": (lambda rows, path: np.full((rows, 7), np.nan, np.float32), lambda result: result),
    "big-endian columns": (lambda rows, path: np.zeros((7, rows), ">f4").T, lambda result: result),
    "tensor": (lambda rows, path: as_tensor(np.zeros((rows, 7), np.float32)), lambda result: result),
    ".npy": (lambda rows, path: path.with_suffix(".npy"), np.load),
    "map": (lambda rows, path: np.memmap(path, np.float32, "w+", 0, (rows + 1, 7))[:rows], lambda result: result),
}


@pytest.mark.parametrize("kind", SINKS)
def test_check_sink_passes_for_ours(kind: str, tmp_path: Path) -> None:
    (make, read), number = SINKS[kind], itertools.count()
    check_sink(lambda rows: make(rows, tmp_path / str(next(number))), read, folder=tmp_path)


# -- planted mistakes --------------------------------------------------------------------------------------------------


class Given(Source):
    """A right source, which the ones below spoil."""

    kind = "rows of a test"

    def __init__(self, value: Any = None, request: Any = None) -> None:
        self.rows, self.features, self.dtype = len(X), X.shape[1], FLOAT32

    def read(self, first: int, piece: HostArray) -> None:
        piece[...] = X[first : first + len(piece)]


class OneRowOff(Given):
    def read(self, first: int, piece: HostArray) -> None:
        piece[...] = X[max(0, first - 1) :][: len(piece)]


class InOrderOnly(Given):
    """A position that moves on: rows come wrong where they are read in another order."""

    at = 0

    def read(self, first: int, piece: HostArray) -> None:
        piece[...] = X[np.arange(self.at, self.at + len(piece)) % len(X)]
        self.at += len(piece)


class LastRowMissing(Given):
    def read(self, first: int, piece: HostArray) -> None:
        rows = X[first : first + len(piece)]
        piece[: len(rows) - (first + len(rows) == len(X))] = rows[: len(rows) - (first + len(rows) == len(X))]


class WrongLength(Given):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.rows = len(X) + 1


class SkipsNothing(Given):
    def feed(self, chunk_rows: int, gather: Any, wire: Any, skip: Any = frozenset()) -> Feed:
        return super().feed(chunk_rows, gather, wire)


class NeverCast(Given):
    def rows_at(self, row: int, count: int, wire: Any) -> Any:
        return super().rows_at(row, count, self.dtype)


class LeftOpen(Given):
    def rows_at(self, row: int, count: int, wire: Any) -> Any:
        OPENED.append(os.open("/dev/null", os.O_RDONLY))
        return super().rows_at(row, count, wire)


OPENED: list[int] = []


@pytest.mark.parametrize(
    "spoiled", [OneRowOff, InOrderOnly, LastRowMissing, WrongLength, SkipsNothing, NeverCast, LeftOpen]
)
def test_check_source_finds_what_is_planted(spoiled: type[Given], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.SOURCES, "_openers", {Given: lambda value, request: value})
    check_source(Given, X)
    with pytest.raises((AssertionError, ValueError)):
        check_source(spoiled, X)
    while OPENED:
        os.close(OPENED.pop())


class Kept(Sink):
    """A right sink, which the ones below spoil."""

    resumable = True

    def __init__(self, array: HostArray, path: Path) -> None:
        self.array, self.path = array, path

    def write(self, first: int, piece: HostArray) -> None:
        self.array[first : first + len(piece)] = piece

    def finish(self, rows: int) -> HostArray:
        return self.array[:rows]

    def leave(self) -> None: ...


class KeepsPieces(Kept):
    """Stores rows at the end, from pieces that are others' by then."""

    def write(self, first: int, piece: HostArray) -> None:
        vars(self).setdefault("pieces", {})[first] = piece

    def finish(self, rows: int) -> HostArray:
        for first, piece in vars(self).setdefault("pieces", {}).items():
            super().write(first, piece)
        return super().finish(rows)


class InOrderOfArrival(Kept):
    at = 0

    def write(self, first: int, piece: HostArray) -> None:
        super().write(self.at, piece)
        self.at += len(piece)


class ForgetsWhenLeft(Kept):
    def leave(self) -> None:
        self.array[...] = 0


class LeavesAFile(Kept):
    def __init__(self, array: HostArray, path: Path) -> None:
        super().__init__(array, path)
        path.write_bytes(b"begun")


class WrongCast(Kept):
    def target(self, chunk: Any) -> Any:
        self.cast = None
        return super().target(chunk)


@pytest.mark.parametrize("spoiled", [KeepsPieces, InOrderOfArrival, ForgetsWhenLeft, LeavesAFile, WrongCast])
def test_check_sink_finds_what_is_planted(spoiled: type[Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.SINKS, "_openers", {tuple: lambda value, request: value[0](*value[1:])})

    number = itertools.count()

    def check(kind: type[Kept]) -> None:
        def make(rows: int) -> Any:
            return kind, np.zeros((rows, 7), np.float32), tmp_path / str(next(number))

        check_sink(make, lambda result: result, folder=tmp_path)

    check(Kept)
    with pytest.raises((AssertionError, ValueError)):
        check(spoiled)
