"""Rows of files: read and written piece by piece, whatever the system answers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.ends import IN, LAYER, X, failing_from, open_pipeline
from helpers.leaks import nothing_left_behind, small_rings

from pipeline import run_pipelined
from pipeline.errors import FileFormatError


def test_npy_source_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 100, 2)
    path, x = tmp_path / "x.npy", random_rows(400, IN)
    np.save(path, x)

    def cut(progress: Any) -> None:
        os.truncate(path, 128 + 200 * IN * 4)

    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        with pytest.raises(FileFormatError, match=r"ended at byte .* it was cut while it was read") as caught:
            pipeline.run(path, tmp_path / "y.npy", progress=cut)
        assert caught.value.__notes__[0].startswith("pipeline: in fill of chunk ")
        assert_same_bits(pipeline.run(X).out, LAYER(X))
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("layout", ["raw", "Fortran", "big-endian"])
def test_source_file_leaves_resident_memory_flat(layout: str, tmp_path: Path) -> None:
    """96 MiB, of which a map's pages would stay."""
    array = np.zeros((12_288, 2048), ">f4" if layout == "big-endian" else "<f4", "F" if layout == "Fortran" else "C")
    np.save(tmp_path / "x.npy", array)
    source = np.load(tmp_path / "x.npy", mmap_mode="r") if layout == "raw" else tmp_path / "x.npy"
    layer = random_layer(2048, 4)
    peak = 0

    def file_mib() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) // 1024

    def watch(progress: Any) -> None:
        nonlocal peak
        peak = max(peak, file_mib())

    with open_pipeline(layer, chunk_rows=1024) as pipeline:
        pipeline.run(array[:1024])  # what torch maps when it first computes
        before = file_mib()
        pipeline.run(source, progress=watch)
    assert peak - before < 10


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("call", ["preadv"])
def test_npy_source_read_error_is_passed_on(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", X)
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from(call, 2, errno.EIO, patch)
            with pytest.raises(OSError, match="Input/output error") as caught:
                pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy")
            assert caught.value.__notes__[0].startswith("pipeline: in fill of chunk ")
        assert_same_bits(pipeline.run(tmp_path / "x.npy").out, LAYER(X))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.npy"]


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_npy_files_move_on_after_short_reads_and_writes(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", X)
    real = getattr(os, call)

    def short(fd: int, data: Any, position: int) -> int:
        part = [data[0][:13]] if call == "preadv" else data[:13] if len(data) != 128 else data
        return int(real(fd, part, position))

    monkeypatch.setattr(os, call, short)
    path = run_pipelined(LAYER, tmp_path / "x.npy", tmp_path / "y.npy", devices="cpu", chunk_rows=9).out
    assert_same_bits(np.load(path), LAYER(X))
