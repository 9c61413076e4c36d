"""New memory whose pages are there."""

from __future__ import annotations

import mmap

import psutil
import pytest

from pipeline.arrays import address_of
from pipeline.config import MIB
from pipeline.devices.host_pages import touched_memory


@pytest.mark.parametrize("n_bytes", [1, 4096, 2 * MIB + 1, 33 * MIB])
def test_touched_memory_is_zero_writable_and_begins_with_a_page(n_bytes: int) -> None:
    memory = touched_memory(n_bytes)
    assert memory.nbytes == n_bytes and address_of(memory) % mmap.PAGESIZE == 0 and not memory.any()
    memory[:] = 7
    assert (memory == 7).all()


def test_touched_memory_is_resident_and_goes_with_its_last_view() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    memory = touched_memory(64 * MIB)
    assert process.memory_info().rss - before > 60 * MIB, "without a write of ours"
    part = memory[::2][5:]
    del memory
    part[:] = 1
    del part
    assert process.memory_info().rss - before < 8 * MIB
