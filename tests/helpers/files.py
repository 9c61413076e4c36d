"""Files and file systems of tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def new_file(path: Path, n_bytes: int) -> Iterator[int]:
    """The descriptor of a new file of zeros, for reading and writing."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(fd, n_bytes)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mounted(disk: Path, kind: str, options: str) -> Iterator[Path]:
    """A new file system at the folder `disk`, which is made."""
    disk.mkdir()
    mount = ["mount", "-t", kind, "-o", options, kind, str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
