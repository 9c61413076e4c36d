"""What a run may not leave behind, and how tests wait and fail on purpose."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline import release


def pipeline_threads(*, copy_workers: bool = True) -> list[str]:
    """The names of the package's threads. Copy workers of an open Pipeline start when they are first needed."""
    names = (thread.name for thread in threading.enumerate())
    return sorted(n for n in names if n.startswith("pipeline") and (copy_workers or "pipeline-copy" not in n))


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `condition` comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


@contextmanager
def nothing_left_behind(folder: Path | None = None, *, copy_workers: bool = True) -> Iterator[None]:
    """No thread of ours, file descriptor, or file in `folder` ending in .partial is left that wasn't there before. What
    runs keep warm is closed first."""
    release()
    gc.collect()
    process = psutil.Process()
    threads, fds = pipeline_threads(copy_workers=copy_workers), process.num_fds()
    yield
    release()
    gc.collect()
    wait_until(lambda: pipeline_threads(copy_workers=copy_workers) == threads and process.num_fds() <= fds, seconds=3.0)
    assert pipeline_threads(copy_workers=copy_workers) == threads
    assert process.num_fds() <= fds, f"{process.num_fds() - fds} file descriptors left: {process.open_files()}"
    if folder is not None:
        assert list(folder.glob("*.partial")) == []


def small_rings(monkeypatch: pytest.MonkeyPatch, piece_bytes: int = 4096, pieces: int = 3, workers: int = 2) -> None:
    """Pieces so small that a chunk of a test takes several."""
    monkeypatch.setenv("PIPELINE_PIECE_BYTES", str(piece_bytes))
    monkeypatch.setenv("PIPELINE_RING_PIECES", str(pieces))
    monkeypatch.setenv("PIPELINE_COPY_WORKERS", str(workers))


class PlannedError(Exception):
    """What the tests' own sources, sinks and callbacks raise."""
