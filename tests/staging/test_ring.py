"""The pinned ring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.arrays import HostArray
from pipeline.dtypes import BFLOAT16, FLOAT32
from pipeline.staging.ring import Ring


def memory(n_bytes: int) -> HostArray:
    return np.zeros(n_bytes, np.uint8)


def ring(allocate: Any = memory, **options: Any) -> Ring:
    return Ring(allocate, 3, 100, 5, FLOAT32, **options)


def test_ring_pieces_hold_whole_rows_of_the_wires_type() -> None:
    found = ring()
    assert (found.piece_rows, found.row_bytes) == (5, 20)
    piece = found.take()
    assert found.rows(piece, 3).shape == (3, 5) and found.rows(piece, 5).dtype == np.float32
    assert Ring(memory, 1, 1, 5, BFLOAT16).piece_rows == 1, "however small a piece"


def test_ring_gives_each_piece_once_until_it_comes_back() -> None:
    found = ring()
    assert found.allocated_bytes == 0
    taken = [found.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and not found.available and found.free_pieces == []
    assert found.allocated_bytes == 3 * 128, "each piece begins with a cache line"
    found.give_back(taken[1])
    assert found.available and found.free_pieces == [taken[1]] and found.take() == taken[1]
    found.give_back_all()
    assert found.free_pieces == [0, 1, 2]


def test_ring_poisons_what_comes_back_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_DEBUG", raising=False)
    for poison in (False, True):
        found = ring(poison=poison)
        piece = found.take()
        found.give_back(piece)
        assert np.isnan(found.rows(piece, 5)).all() == poison
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    assert ring().poison


def test_ring_loses_no_piece_where_an_allocation_fails() -> None:
    calls = iter(range(10))

    def fails_once(n_bytes: int) -> HostArray:
        if next(calls) == 0:
            raise MemoryError
        return memory(n_bytes)

    found, freed = ring(fails_once), []
    with pytest.raises(MemoryError):
        found.take()
    assert sorted(found.take() for _ in range(3)) == [0, 1, 2]
    found.free(freed.append)
    assert [block.nbytes for block in freed] == [3 * 128] and found.allocated_bytes == 0


def test_ring_pieces_are_apart() -> None:
    found = ring()
    pieces = [found.rows(found.take(), 5) for _ in range(3)]
    for number, piece in enumerate(pieces):
        piece[:] = number
    assert [set(piece.ravel().tolist()) for piece in pieces] == [{0.0}, {1.0}, {2.0}]


def test_ring_gives_all_its_memory_at_once() -> None:
    found = ring()
    assert [piece.nbytes for piece in found.take_all()] == [100] * 3
    assert not found.available
