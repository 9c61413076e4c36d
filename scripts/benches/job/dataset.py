"""The files that `scripts/bench job` moves: rows and weights in a folder, what is cached of them, and the check of a
result."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import GIB
from benches.file import write_rows
from benches.layers import larger
from benches.pages import free_bytes

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
BLOCK_ROWS = 8192  # rows are random in blocks of so many, and no two blocks are alike
RANGES, ROWS_A_RANGE = 16, 4  # rows that are compared with float64
BLOCKS_AT_ONCE = 4096  # rows whose pages are looked at in one go


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, by the longest mount point above it."""
    path = folder.resolve()
    found, longest = "unknown file system", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, kind, *_ = line.split()
        point = Path(mounted.encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= longest:  # of two at one place the later one counts
            found, longest = kind, len(point.parts)
    return found


def lacks_room(folder: Path, gib: float, weights_bytes: int) -> str | None:
    """Why a dataset of that size and its result don't fit, None where they do."""
    need = int(2 * gib * GIB) + weights_bytes
    free = shutil.disk_usage(folder).free
    if file_system(folder) in MEMORY_FILE_SYSTEMS:
        free = min(free, free_bytes())
    return f"it takes {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free" if need > free else None


@dataclass(frozen=True)
class Dataset:
    """A source and weights in a folder of their own, and the place of the result."""

    folder: Path
    layer: Any

    @property
    def x(self) -> Path:
        return self.folder / "x.npy"

    @property
    def y(self) -> Path:
        return self.folder / "y.npy"

    @property
    def weights(self) -> Path:
        return self.folder / "layer.safetensors"

    def write(self, gib: float) -> None:
        """Write rows and weights, and wait until they are on the disk."""
        from safetensors.numpy import save_file

        features = self.layer.in_features
        save_file({"weight": self.layer.weight, "bias": self.layer.bias}, self.weights)
        write_rows(self.x, max(1, int(gib * GIB) // (4 * features)), features, BLOCK_ROWS)
        self.settle()

    def settle(self) -> None:
        """Remove the result and wait for what is still on its way to the disk."""
        self.y.unlink(missing_ok=True)
        os.sync()

    def drop_cache(self) -> None:
        """Have the system forget what it has of the inputs in memory: they are on the disk."""
        for path in (self.x, self.weights):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def cached_share(self) -> float:
        """The part of the source's pages that are in memory."""
        with open(self.x, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
            flags = np.empty(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            libc = ctypes.CDLL(None, use_errno=True)
            sizes = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
            failed = libc.mincore(*sizes, ctypes.c_void_p(flags.ctypes.data))
            del view  # a map that is looked at can't be closed
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore of {self.x}")
        return float((flags & 1).mean())

    def worst_difference(self) -> float:
        """The largest |y - float64 reference| / (1 + |reference|) in rows picked from ranges over the whole file; NaN
        where any row has a page that nobody wrote, or that isn't finite."""
        x, y = np.load(self.x, mmap_mode="r"), np.load(self.y, mmap_mode="r")
        if y.shape != (len(x), self.layer.out_features) or not _is_written(y):
            return float("nan")
        rng, ranges = np.random.default_rng(), np.array_split(np.arange(len(x)), min(RANGES, len(x)))
        picked = [rng.choice(rows, min(ROWS_A_RANGE, len(rows)), replace=False) for rows in ranges]
        rows = np.concatenate([*picked, [0, len(x) - 1]])
        want = self.layer.reference(np.ascontiguousarray(x[rows]))
        return larger(0.0, float((np.abs(y[rows] - want) / (1 + np.abs(want))).max()))


def _is_written(y: Any) -> bool:
    """Whether every page of every row has something in it that is finite and isn't zero.

    Two neighbours are looked at in each page: a result may be zero by chance, two hardly ever are.
    """
    step = min(y.shape[1], mmap.PAGESIZE // y.itemsize)
    for row in range(0, len(y), BLOCKS_AT_ONCE):
        part = y[row : row + BLOCKS_AT_ONCE]
        one, other = np.asarray(part[:, ::step]), np.asarray(part[:, 1::step])
        both = one[:, : other.shape[1]], other[:, : one.shape[1]]
        if not np.isfinite(both[0]).all() or bool(((both[0] == 0) & (both[1] == 0)).any()):
            return False
    return True
