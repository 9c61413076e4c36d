"""How a layer's weights reach a device through pinned blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.arrays import HostArray
from pipeline.config import MIB, Staging
from pipeline.devices.cpu import CpuDevice
from pipeline.errors import FileFormatError
from pipeline.pages import Pages
from pipeline.rows import Workers
from pipeline.staging.native import open_workers
from pipeline.upload import StagedUpload

STAGING = Staging(piece_bytes=4096, ring_pieces=3, workers=2)


@pytest.fixture
def workers() -> Iterator[Workers]:
    with closing(open_workers(STAGING.workers)) as found:
        yield found


class Target:
    """Where blocks are copied to: each when it is waited for, or at the end, so that a block that is used again too
    early shows."""

    def __init__(self, like: HostArray) -> None:
        self.rows = np.zeros_like(like)
        self.queued: list[Callable[[], None]] = []

    def copy(self, first: int, block: HostArray) -> Callable[[], None]:
        assert block.flags.c_contiguous and block.dtype == self.rows.dtype

        def wait() -> None:
            if wait in self.queued:
                self.rows[first : first + len(block)] = block
                self.queued.remove(wait)

        self.queued.append(wait)
        return wait

    def finish(self) -> HostArray:
        for wait in list(self.queued):
            wait()
        return self.rows


def random_bytes(rows: int, features: int, dtype: str = "float32") -> HostArray:
    bits = np.random.default_rng(rows).integers(0, 256, rows * features * np.dtype(dtype).itemsize, np.uint8)
    return bits.view(dtype).reshape(rows, features)


@pytest.mark.parametrize(("rows", "features", "dtype"), [(1000, 7, "float32"), (999, 1024, "uint16"), (20, 512, "<f8")])
def test_upload_brings_every_row_to_its_place(workers: Workers, rows: int, features: int, dtype: str) -> None:
    x = random_bytes(rows, features, dtype)
    with closing(CpuDevice()) as device:
        upload, target = StagedUpload(device, workers, STAGING), Target(x)
        assert upload.upload(x, target.copy)
        assert target.finish().tobytes() == x.tobytes()
        assert upload.pinned_bytes == 2 * 3 * 4096


def test_upload_reads_a_file_past_its_map(workers: Workers, tmp_path: Path) -> None:
    x = random_bytes(1000, 9)
    path = tmp_path / "w"
    path.write_bytes(b"header..." + x.tobytes())
    mapped = np.memmap(path, np.float32, "r", offset=9, shape=x.shape)
    with closing(CpuDevice()) as device:
        target, fds = Target(x), len(os.listdir("/proc/self/fd"))
        assert StagedUpload(device, workers, STAGING).upload(mapped, target.copy)
        assert target.finish().tobytes() == x.tobytes()
        assert len(os.listdir("/proc/self/fd")) == fds
        os.truncate(path, 5000)
        with pytest.raises(FileFormatError, match="was cut while it was read"):
            StagedUpload(device, workers, STAGING).upload(mapped, target.copy)
        assert len(os.listdir("/proc/self/fd")) == fds


def test_upload_leaves_small_arrays_and_long_rows_to_the_device(workers: Workers) -> None:
    with closing(CpuDevice()) as device:
        upload = StagedUpload(device, workers, STAGING)
        for x in (random_bytes(1, 100), random_bytes(20, 2000)):
            assert not upload.upload(x, Target(x).copy)
        assert upload.pinned_bytes == 0, "nothing was pinned for nothing"


@pytest.mark.parametrize("n_bytes", [1, 2 * MIB, 11 * MIB + 5])
def test_upload_has_pages_made_by_the_workers(workers: Workers, n_bytes: int) -> None:
    with closing(CpuDevice()) as device:
        memory, process = Pages.new(n_bytes).memory, psutil.Process()
        before = process.memory_info().rss
        StagedUpload(device, workers, STAGING).touch(memory)
        if n_bytes > 10 * MIB:
            assert process.memory_info().rss - before > 8 * MIB
        assert not memory.any() and memory.nbytes == n_bytes


def test_rings_take_over_the_memory_of_the_upload(workers: Workers) -> None:
    x = random_bytes(1000, 16)
    with closing(CpuDevice()) as device:
        upload = StagedUpload(device, workers, STAGING)
        upload.upload(x, Target(x).copy)
        upload.upload(x, Target(x).copy)
        rings = [upload.take(3 * 4096), upload.take(4096)]
        assert [ring.nbytes for ring in rings] == [3 * 4096, 4096] and upload.pinned_bytes == 0
        assert not any(np.may_share_memory(upload.take(4096), ring) for ring in rings)


def test_upload_keeps_memory_that_a_ring_is_too_large_for(workers: Workers) -> None:
    x = random_bytes(1000, 16)
    with closing(CpuDevice()) as device:
        upload = StagedUpload(device, workers, STAGING)
        upload.upload(x, Target(x).copy)
        assert upload.take(4 * 4096).nbytes == 4 * 4096 and upload.pinned_bytes == 2 * 3 * 4096
