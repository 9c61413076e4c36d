"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, batches_of, random_layer, random_rows
from helpers.ends import IN, LAYER, OUT, X, failing_from, open_pipeline, refusing
from helpers.leaks import PlannedError, nothing_left_behind, small_rings

from pipeline import RawFile, SinkRequest, SourceRequest, run_pipelined
from pipeline.dtypes import FLOAT32
from pipeline.errors import OutputError, OutputExistsError
from pipeline.flow import Gather
from pipeline.io.atomic_file import AtomicFile
from pipeline.io.sinks import open_sink
from pipeline.io.sources import open_source
from pipeline.rows import TargetRows


def test_npy_sink_overwrite_replaces_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    path.write_bytes(b"old")

    def refuse(progress: Any) -> None:
        assert path.read_bytes() == b"old"
        raise PlannedError

    with open_pipeline() as pipeline:
        with pytest.raises(PlannedError):
            pipeline.run(X, path, overwrite=True, progress=refuse)
        assert path.read_bytes() == b"old"
        pipeline.run(X, path, overwrite=True)
    assert_same_bits(np.load(path), LAYER(X))
    assert list(tmp_path.iterdir()) == [path]


def test_npy_sink_overwrite_while_the_old_file_is_mapped_as_the_source(tmp_path: Path) -> None:
    layer, path = random_layer(IN, IN), tmp_path / "x.npy"
    np.save(path, X)
    run_pipelined(layer, np.load(path, mmap_mode="r"), path, devices="cpu", overwrite=True)
    assert_same_bits(np.load(path), layer(X))


@pytest.mark.parametrize("links", [True, False])
def test_npy_sink_leaves_a_file_that_appears_during_the_run(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "y.npy"
    if not links:
        monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    with open_pipeline() as pipeline, nothing_left_behind(copy_workers=False):
        with pytest.raises(OutputExistsError, match=r"the result is complete in .*y\.npy\.partial"):
            pipeline.run(X, path, progress=lambda progress: path.write_bytes(b"theirs"))
        assert path.read_bytes() == b"theirs"
    assert_same_bits(np.load(tmp_path / "y.npy.partial"), LAYER(X))


@pytest.mark.parametrize("overwrite", [False, True])
def test_npy_sink_syncs_its_folder_once_the_file_has_its_name(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync, synced = tmp_path / "y.npy", os.fsync, []

    def recorded(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, path.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    run_pipelined(LAYER, X, path, devices="cpu", overwrite=overwrite)
    assert synced == [("y.npy.partial", False), (tmp_path.name, True)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_npy_sink_on_file_systems_that_sync_no_folders(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refused(fd: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).is_dir():
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refused)
    if code == errno.EINVAL:
        run_pipelined(LAYER, X, tmp_path / "y.npy", devices="cpu")
    else:
        with pytest.raises(OutputError, match="Input/output error"):
            run_pipelined(LAYER, X, tmp_path / "y.npy", devices="cpu")
    assert_same_bits(np.load(tmp_path / "y.npy"), LAYER(X))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_npy_sink_works_where_there_are_no_hard_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing(code))
    path = run_pipelined(LAYER, X, tmp_path / "y.npy", devices="cpu").out
    assert_same_bits(np.load(path), LAYER(X))
    assert list(tmp_path.iterdir()) == [path]


def test_npy_sink_two_runs_to_one_path_the_second_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"

    def second(progress: Any) -> None:
        with pytest.raises(OutputExistsError, match="another run is writing"):
            run_pipelined(LAYER, X, path, devices="cpu")

    run_pipelined(LAYER, X, path, devices="cpu", progress=second)
    assert_same_bits(np.load(path), LAYER(X))


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("source", ["array", "batches"])
@pytest.mark.parametrize("after", [0, 1, 5, 13])
def test_npy_sink_every_write_may_fail(
    after: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Header, rows and the last header: a full disk is an OutputError, whichever write meets it."""
    small_rings(monkeypatch, 100, 2)
    x = random_rows(100, IN)
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from("pwrite", after, errno.ENOSPC, patch)
            with pytest.raises(OutputError, match="No space left on device") as caught:
                pipeline.run(x if source == "array" else batches_of(x, [9]), tmp_path / "y.npy")
            assert "y.npy" in str(caught.value)
            assert isinstance(caught.value.__cause__, OSError)
        assert list(tmp_path.iterdir()) == []
        pipeline.run(x, tmp_path / "y.npy")
        assert_same_bits(np.load(tmp_path / "y.npy"), LAYER(x))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_npy_sink_other_calls_may_fail(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from(call, 0, errno.EIO, patch)
            with pytest.raises(OutputError, match="Input/output error"):
                pipeline.run(X, tmp_path / "y.npy", overwrite=True)
        assert list(tmp_path.iterdir()) == []
        pipeline.run(X, tmp_path / "y.npy")


def test_npy_sink_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    """A real refusal by the kernel, before and during the run."""
    x = random_rows(3000, IN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
            with pytest.raises(OutputError, match=r"can't reserve .*File too large"):
                pipeline.run(x, tmp_path / "y.npy")
            with pytest.raises(OutputError, match="File too large") as caught:
                pipeline.run(batches_of(x, [100]), tmp_path / "y.npy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "drain of chunk" in caught.value.__notes__[0]
        assert list(tmp_path.iterdir()) == []


def test_npy_sink_full_disk_is_a_clear_error(tiny_disk: Path) -> None:
    x = random_rows(5000, IN)
    with open_pipeline() as pipeline, nothing_left_behind(tiny_disk, copy_workers=False):
        for _ in range(2):
            with pytest.raises(OutputError, match=r"can't reserve .*No space left on device"):
                pipeline.run(x, tiny_disk / "y.npy")
            with pytest.raises(OutputError, match="No space left on device") as caught:
                pipeline.run(batches_of(x, [100]), tiny_disk / "y.npy")
            assert "drain of chunk" in caught.value.__notes__[0]
            assert list(tiny_disk.iterdir()) == []
        (tiny_disk / "fill").write_bytes(bytes(60_000))
        with pytest.raises(OutputError, match="No space left on device"):
            pipeline.run(batches_of(x, [100]), tiny_disk / "y.npy")
        (tiny_disk / "fill").unlink()
        pipeline.run(X, tiny_disk / "y.npy")
        assert_same_bits(np.load(tiny_disk / "y.npy"), LAYER(X))


# -- files that an earlier run left ------------------------------------------------------------------------------------


def left(path: Path, content: bytes = b"begun") -> AtomicFile:
    """A file that was begun and left."""
    file = AtomicFile(path)
    file.reserve(len(content))
    file.pwrite(content, 0)
    file.leave()
    return file


def test_atomic_file_that_was_left_is_reopened_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "y"
    with nothing_left_behind(tmp_path):
        begun = left(path)
        assert begun.partial.read_bytes() == b"begun" and not path.exists()
        begun.abort()  # after it was left: nothing of it is removed
        begun.leave()
        with pytest.raises(OutputExistsError, match=r"y\.partial exists: another run is writing y, or one was killed"):
            AtomicFile(path)
        file = AtomicFile(path, reopen=True)
        file.check_size(5)
        file.reserve(5)
        file.pwrite(b"XY", 3)
        assert file.finish() == path
        file.abort()
    assert path.read_bytes() == b"begXY"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_of_another_size_is_not_gone_on_with(tmp_path: Path) -> None:
    left(tmp_path / "y")
    file = AtomicFile(tmp_path / "y", reopen=True)
    with pytest.raises(OutputError, match=r"y\.partial has 5 bytes, expected 6, so another run left it; remove it"):
        file.check_size(6)
    file.leave()
    assert (tmp_path / "y.partial").read_bytes() == b"begun"


@pytest.mark.parametrize("kind", ["nothing", "a link", "a link to nothing", "a pipe", "a folder"])
def test_atomic_file_reopens_regular_files_only(kind: str, tmp_path: Path) -> None:
    partial, theirs = tmp_path / "y.partial", tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    if kind == "a link":
        partial.symlink_to(theirs)
    elif kind == "a link to nothing":
        partial.symlink_to(tmp_path / "nowhere")
    elif kind == "a pipe":
        os.mkfifo(partial)
    elif kind == "a folder":
        partial.mkdir()
    before = sorted(tmp_path.iterdir())
    message = r"y: .*y\.partial can't be opened \(No such file" if kind == "nothing" else "isn't a regular file"
    with nothing_left_behind():
        with pytest.raises(OutputError, match=message):
            AtomicFile(tmp_path / "y", reopen=True)
    assert sorted(tmp_path.iterdir()) == before and theirs.read_bytes() == b"theirs"


def test_atomic_file_that_was_reopened_can_be_aborted(tmp_path: Path) -> None:
    left(tmp_path / "y")
    AtomicFile(tmp_path / "y", reopen=True).abort()
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_is_not_tried_again_after_a_sync_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = []

    def refused(fd: int) -> None:
        syncs.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refused)
    file = AtomicFile(tmp_path / "y")
    with pytest.raises(OutputError, match="Input/output error"):
        file.finish()
    file.abort()
    assert len(syncs) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_sink_goes_on_where_an_earlier_one_stopped(suffix: str, tmp_path: Path) -> None:
    """Half of the chunks in one run, the others in a second one: the bytes of a run that wasn't interrupted."""
    path = tmp_path / f"y{suffix}"
    out: Any = RawFile(path) if suffix == ".bin" else path
    whole: Any = RawFile(tmp_path / "whole.bin") if suffix == ".bin" else tmp_path / "whole.npy"
    run_pipelined(LAYER, X, whole, devices="cpu")
    layer_rows, done = LAYER(X), {1, 3}
    source = open_source(X, SourceRequest(IN, FLOAT32))
    request = SinkRequest(source, OUT, FLOAT32, FLOAT32)
    for again in (False, True):
        sink = open_sink(out, replace(request, reopen=again))
        feed = source.feed(8, Gather(lambda n: np.empty(n, np.uint8), 0, lambda job: job()), FLOAT32, done)
        while (chunk := feed.take()) is not None:
            target = sink.target(chunk)
            assert isinstance(target, TargetRows)
            target.write(0, layer_rows[chunk.row : chunk.row + chunk.rows])
        if again:
            sink.finish(50)
        else:
            done = set(range(7)) - done
            sink.leave()
    assert path.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_sink_does_not_go_on_with_the_file_of_another_shape(tmp_path: Path) -> None:
    source = open_source(X, SourceRequest(IN, FLOAT32))
    open_sink(tmp_path / "y.npy", SinkRequest(source, OUT, FLOAT32, FLOAT32)).leave()
    before = (tmp_path / "y.npy.partial").read_bytes()
    with nothing_left_behind():
        with pytest.raises(OutputError, match=r"y\.npy\.partial has 1128 bytes, expected 1328"):
            open_sink(tmp_path / "y.npy", SinkRequest(source, OUT + 1, FLOAT32, FLOAT32, reopen=True))
    assert (tmp_path / "y.npy.partial").read_bytes() == before


@pytest.mark.parametrize("replaced", [True, False])
def test_file_whose_name_was_taken_is_neither_published_nor_removed(replaced: bool, tmp_path: Path) -> None:
    path, partial = tmp_path / "y.npy", tmp_path / "y.npy.partial"

    def take_the_name(progress: Any) -> None:
        partial.unlink(missing_ok=True)
        if replaced:
            partial.write_bytes(b"another's")

    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(OutputError, match=r"y\.npy\.partial was removed or replaced while it was written"):
            pipeline.run(X, path, progress=take_the_name)
    assert not path.exists() and partial.exists() == replaced
    assert not replaced or partial.read_bytes() == b"another's"
