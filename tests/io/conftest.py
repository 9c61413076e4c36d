"""Fixtures of the tests of files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers.files import mounted

from pipeline.io.reservation import is_in_memory


@pytest.fixture
def numpy_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy workers that call `os`, where a test's own calls can stand in."""
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", "0")


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in a file system in memory."""
    shm = Path("/dev/shm")
    fd = os.open(shm if shm.is_dir() else "/", os.O_RDONLY)
    try:
        if not is_in_memory(fd):
            pytest.skip("/dev/shm is no file system in memory")
    finally:
        os.close(fd)
    with TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, in memory."""
    with mounted(tmp_path / "disk", "tmpfs", "size=64k") as disk:
        yield disk
