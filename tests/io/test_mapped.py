"""Maps of files: read and written past the map."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits, poisoned, random_layer, random_rows
from helpers.ends import IN, LAYER, OUT, X, failing_from, open_pipeline
from helpers.leaks import nothing_left_behind, small_rings

from pipeline import run_pipelined
from pipeline.arrays import HostArray
from pipeline.errors import FileFormatError, OptionError, OutputError


def test_sink_memmap_of_the_source_file_is_refused(tmp_path: Path) -> None:
    layer, square = random_layer(IN, IN), random_rows(40, IN)
    path = tmp_path / "x.npy"
    np.save(path, square)
    content = path.read_bytes()
    out = np.load(path, mmap_mode="r+")
    for source in (path, np.load(path, mmap_mode="r"), np.load(path, mmap_mode="r")[::2][::-1]):
        with pytest.raises(OptionError, match=r"out maps the bytes of .*x\.npy"):
            run_pipelined(layer, source, out if isinstance(source, Path) else out[: len(source)], devices="cpu")
    assert path.read_bytes() == content


def test_sink_tensor_of_the_map_that_is_the_source_is_refused(tmp_path: Path) -> None:
    layer, square = random_layer(IN, IN), random_rows(40, IN)
    np.save(tmp_path / "x.npy", square)
    source = np.load(tmp_path / "x.npy", mmap_mode="r+")
    with pytest.raises(OptionError, match="out overlaps the source"):
        run_pipelined(layer, source[:20], torch.from_numpy(source)[10:30], devices="cpu")
    assert (source == square).all()


def test_sink_memmap_of_another_part_of_the_source_file_is_fine(tmp_path: Path) -> None:
    layer, x = random_layer(IN, IN), random_rows(40, IN)
    np.concatenate([x, x]).tofile(tmp_path / "both.bin")
    half = {"dtype": np.float32, "shape": (40, IN)}
    source = np.memmap(tmp_path / "both.bin", mode="r", **half)
    out = np.memmap(tmp_path / "both.bin", mode="r+", offset=x.nbytes, **half)
    run_pipelined(layer, source, out, devices="cpu", chunk_rows=7)
    assert_same_bits(np.fromfile(tmp_path / "both.bin", np.float32).reshape(80, IN)[40:], layer(x))


def resident_kib(array: HostArray) -> int:
    """How much of the map that an array lies in the process has touched."""
    address, inside = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, dash, rest = line.partition("-")
        if dash and " " in rest and not first.endswith(":") and ":" not in first:
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("not mapped")


MAPPED: dict[str, Callable[[Any], Any]] = {
    "rows": lambda whole: whole[3:53, :OUT],
    "columns": lambda whole: whole[:50, 2 : 2 + OUT],
    "every second row": lambda whole: whole[1:101:2, :OUT],
    "reversed rows": lambda whole: whole[50:0:-1, :OUT],
    "plain array": lambda whole: np.asarray(whole)[3:53, :OUT],
    "columns of Fortran order": lambda whole: whole.reshape(whole.shape[::-1])[1 : 1 + OUT, 7:57].T,
}


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("view", MAPPED)
def test_sink_memmap_is_written_past_the_map(
    view: str, out_dtype: str, byte_order: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rings(monkeypatch, 100, 2)
    dtype = np.dtype(out_dtype).newbyteorder(byte_order)
    whole = np.memmap(tmp_path / "y.bin", dtype, "w+", 24, (120, 11))
    out = MAPPED[view](whole)
    with nothing_left_behind(tmp_path), open_pipeline(devices=device, out_dtype=out_dtype) as pipeline:
        result = pipeline.run(X, out)
    assert result.out is out
    assert resident_kib(whole) == 0  # nothing was stored through the map
    assert_same_bits(out.astype(out_dtype), LAYER(X, out=poisoned((50, OUT), out_dtype)))
    written = whole.copy()
    assert (np.fromfile(tmp_path / "y.bin", dtype, offset=24).reshape(120, 11) == written).all()
    MAPPED[view](written)[...] = 0
    assert not written.any()  # nor was anything written beside the view


@pytest.mark.parametrize("name", ["", "removed", "replaced"])
def test_maps_are_of_their_file_whatever_its_name_is(name: str, tmp_path: Path) -> None:
    X.tofile(tmp_path / "x.bin")
    source = np.memmap(tmp_path / "x.bin", np.float32, "r", 0, X.shape)
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, OUT))
    if name:
        for path in list(tmp_path.iterdir()):
            path.unlink()
            if name == "replaced":
                path.write_bytes(b"theirs")
    with open_pipeline() as pipeline:
        result = pipeline.run(source, out)
    assert result.stats.source == "memory-mapped file" and resident_kib(source) == resident_kib(out) == 0
    assert_same_bits(out, LAYER(X))
    if name == "replaced":
        assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"theirs"}


def test_sink_memmap_of_mode_c_is_memory_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "y.bin").write_bytes(bytes(50 * OUT * 4))
    out = np.memmap(tmp_path / "y.bin", np.float32, "c", 0, (50, OUT))
    run_pipelined(LAYER, X, out, devices="cpu")
    assert_same_bits(out, LAYER(X))
    assert not np.fromfile(tmp_path / "y.bin", np.uint8).any()


def test_sink_memmap_that_cannot_be_written_past_the_map_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, 2 * OUT))
    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        with pytest.raises(OptionError, match=r"out maps a file and has strides \(40, 8\), expected contiguous rows"):
            pipeline.run(X, whole[:, ::2])
        monkeypatch.setattr(os, "listdir", lambda path: [])
        with pytest.raises(OutputError, match="out maps can't be opened for writing; pass its path"):
            pipeline.run(X, whole[:, :OUT])
    assert not whole.any()


def test_sink_memmap_of_no_rows(tmp_path: Path) -> None:
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, OUT))[:0]
    assert run_pipelined(LAYER, X[:0], out, devices="cpu").out is out


@pytest.mark.parametrize("layout", ["C", "Fortran", "big-endian", "rows", "every second row"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_source_memmap_is_read_past_the_map(mode: Any, layout: str, tmp_path: Path) -> None:
    array = {"Fortran": np.asfortranarray(X), "big-endian": X.astype(">f4")}.get(layout, X)
    np.save(tmp_path / "x.npy", array)
    source = np.load(tmp_path / "x.npy", mmap_mode=mode)
    view = {"rows": source[10:40], "every second row": source[::2]}.get(layout, source)
    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        result = pipeline.run(view)
    expected = {"rows": LAYER(X)[10:40], "every second row": LAYER(X)[::2]}.get(layout, LAYER(X))
    assert_same_bits(result.out, expected)
    with_gaps = layout == "every second row"
    assert (resident_kib(source) > 0) == with_gaps
    assert result.stats.source == ("NumPy array" if with_gaps else "memory-mapped file")


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_source_memmap_that_was_changed_through_the_map(mode: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros_like(X))
    source = np.load(tmp_path / "x.npy", mmap_mode=mode)
    source[...] = X
    assert_same_bits(run_pipelined(LAYER, source, devices="cpu").out, LAYER(X))


def test_source_memmap_cut_while_it_is_read(tmp_path: Path) -> None:
    x = random_rows(40_000, IN)
    x.tofile(tmp_path / "x.bin")
    source = np.memmap(tmp_path / "x.bin", np.float32, "r", 0, x.shape)
    with nothing_left_behind(tmp_path), open_pipeline(chunk_rows=1000) as pipeline:
        os.truncate(tmp_path / "x.bin", 5000)
        with pytest.raises(FileFormatError, match=r"x\.bin ended at byte 5000, .* it was cut while it was read"):
            pipeline.run(source)


def test_source_memmap_whose_file_is_not_found_is_read_as_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X.tofile(tmp_path / "x.bin")
    source = np.memmap(tmp_path / "x.bin", np.float32, "r", 0, X.shape)
    monkeypatch.setattr(os, "listdir", lambda path: [])
    result = run_pipelined(LAYER, source, devices="cpu")
    assert result.stats.source == "NumPy array"
    assert_same_bits(result.out, LAYER(X))


def test_sink_memmap_full_disk_is_a_clear_error(tiny_disk: Path) -> None:
    """In a process of its own: stores through the map would end it by SIGBUS."""
    program = f"""
import numpy as np
from pipeline import FusedLinear, OutputError, run_pipelined

layer = FusedLinear(np.ones(({OUT}, {IN}), np.float32))
path = {str(tiny_disk / "y.bin")!r}
out = np.memmap(path, np.float32, "w+", 0, (5000, {OUT}))
out[:100] = 7
try:
    run_pipelined(layer, np.ones((5000, {IN}), np.float32), out, devices="cpu")
except OutputError as error:
    print(error)
assert (np.fromfile(path, np.float32, 100 * {OUT}) == 7).all()
run_pipelined(layer, np.ones((2000, {IN}), np.float32), out[:2000], devices="cpu")
rows = np.fromfile(path, np.float32).reshape(out.shape)
assert (rows[:2000] == out[0, 0]).all() and out[0, 0] not in (0, 7) and not rows[2000:].any()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert re.search(r"can't reserve .* for .*y\.bin: No space left on device; free space", done.stdout)


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("after", [0, 3])
def test_sink_memmap_every_write_may_fail(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 100, 2)
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, OUT))
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from("pwrite", after, errno.EIO, patch)
            with pytest.raises(OutputError, match=r"writing .*y\.bin failed: Input/output error"):
                pipeline.run(X, out)
        pipeline.run(X, out)
    assert_same_bits(out, LAYER(X))


def test_source_of_a_raw_file_is_a_memmap_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.f32"
    path.write_bytes(b"a header of 24 bytes ..." + X.tobytes())
    with open_pipeline() as pipeline:
        result = pipeline.run(np.memmap(path, np.float32, "r", 24, X.shape))
    assert_same_bits(result.out, LAYER(X))
