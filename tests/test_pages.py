"""New memory whose pages are there."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.arrays import address_of
from pipeline.config import MIB
from pipeline.pages import Pages, RecycledPages, touch


@pytest.mark.parametrize("n_bytes", [1, 4096, 2 * MIB + 1, 33 * MIB])
def test_new_pages_are_zero_writable_and_begin_with_a_huge_page(n_bytes: int) -> None:
    memory = Pages.new(n_bytes).memory
    assert memory.nbytes == n_bytes and address_of(memory) % (2 * MIB) == 0 and not memory.any()
    memory[:] = 7
    assert (memory == 7).all()


def test_touched_pages_are_resident_and_go_with_their_last_view() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    memory = Pages.new(64 * MIB).memory
    touch(memory)
    assert process.memory_info().rss - before > 60 * MIB
    part = memory[::2][5:]
    del memory
    part[:] = 1
    del part
    assert process.memory_info().rss - before < 8 * MIB


def test_recycled_pages_come_back_with_their_last_view() -> None:
    pages = RecycledPages(100 * MIB)
    memory, recycled = pages.take(33 * MIB + 8)
    assert not recycled and memory.nbytes == 33 * MIB + 8 and address_of(memory) % (2 * MIB) == 0
    address = address_of(memory)
    view: Any = torch.from_numpy(memory.view(np.float32).reshape(-1, 2)[::3])
    del memory
    gc.collect()
    assert pages.kept_bytes == 0, "somebody holds a part"
    view[:] = 5
    del view
    gc.collect()
    assert pages.kept_bytes == 33 * MIB + 8
    again, recycled = pages.take(33 * MIB)
    assert recycled and address_of(again) == address and pages.kept_bytes == 0
    assert again.nbytes == 33 * MIB and again.flags.writeable


def test_recycled_pages_are_neither_too_small_nor_much_too_large() -> None:
    pages = RecycledPages(100 * MIB)
    pages.take(8 * MIB)
    assert pages.kept_bytes == 8 * MIB
    for n_bytes in (8 * MIB + 1, 6 * MIB):
        memory, recycled = pages.take(n_bytes)
        assert not recycled
        del memory
    pages.clear()
    assert pages.kept_bytes == 0


def test_recycled_pages_are_bounded() -> None:
    pages = RecycledPages(20 * MIB)
    held = [pages.take(8 * MIB)[0] for _ in range(3)]
    held.clear()
    assert pages.kept_bytes == 16 * MIB
    pages.take(32 * MIB)
    assert pages.kept_bytes == 16 * MIB


def test_recycled_pages_are_free_memory_to_the_system() -> None:
    """They count as resident until the system takes them, but as freed ones: LazyFree in its list."""
    pages = RecycledPages(100 * MIB)
    memory, _ = pages.take(64 * MIB)
    memory[:] = 1
    del memory
    with open("/proc/self/smaps_rollup") as lines:
        fields = dict(line.split(":", 1) for line in lines if ":" in line and line.split()[0].endswith(":"))
    assert int(fields["LazyFree"].split()[0]) * 1024 > 50 * MIB


def test_recycled_pages_serve_threads_that_take_at_once() -> None:
    pages = RecycledPages(400 * MIB)
    held = [pages.take(MIB)[0] for _ in range(40)]
    held.clear()
    assert pages.kept_bytes == 40 * MIB
    taken: list[Any] = []

    def take() -> None:
        taken.extend([pages.take(MIB)[0] for _ in range(5)])

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({address_of(memory) for memory in taken}) == 40 and pages.kept_bytes == 0


def test_pages_that_the_system_refuses_are_a_memory_error() -> None:
    for n_bytes in (1 << 60, 1 << 80):
        with pytest.raises(MemoryError, match=r"can't allocate .* GiB of memory"):
            Pages.new(n_bytes)
