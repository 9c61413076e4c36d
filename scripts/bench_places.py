"""Arrays in the near and in the far memory of a machine.

Memory can lie at another socket than the cores that copy it. A virtual machine's may come from both sockets of its
host without a word to the guest, whose one NUMA node holds all of it: on one H200 host 14 workers read 50 GB/s from
some of it and 106 from other. What `numactl --membind` chooses elsewhere, only a measurement can tell there.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import Staging
from pipeline.devices.cpu import free_memory_bytes
from pipeline.flow import Drain
from pipeline.io.memory import ArrayRows
from pipeline.staging.native import open_workers, workers_kind

KEPT_FREE = 0.2  # of the memory that is available
CANDIDATES = 12


@dataclass
class Places:
    """Flat float32 arrays of one length, zeroed, in huge pages where the system has them."""

    near: list[Any]
    far: list[Any]
    copies_gb_per_s: list[float]
    """Of all that were tried, the fastest first: one half copied to the other."""


class Copier:
    """The pipeline's copy workers, as many as it starts with. Ends the program where they aren't the native ones."""

    def __init__(self) -> None:
        if workers_kind() != "native":
            raise SystemExit("this bench measures with the native copy workers, which aren't built: pip install -e .")
        self._workers = open_workers(Staging.chosen().workers)

    def seconds(self, target: Any, source: Any) -> float:
        """What they need to copy one array to another, nothing else going on."""
        start = time.perf_counter()
        self._workers.run(Drain(ArrayRows(target.reshape(1, -1)), 0, source.reshape(1, -1)))
        return time.perf_counter() - start

    def close(self) -> None:
        self._workers.close()


def places(torch: Any, copier: Copier, length: int, near: int, far: int, later: int) -> Places:
    """Take most of the free memory, and keep the arrays that are copied fastest and slowest.

    Ends the program where memory for them, and for as many as are made `later`, is short.
    """
    available = (free_memory_bytes() or 0) * (1 - KEPT_FREE)
    count = min(CANDIDATES, int(available) // (4 * length))
    if count < near + far + later:
        need, have = (near + far + later) * 4 * length / 2**30, available / 2**30
        raise SystemExit(
            f"the arrays of this bench take {need:.1f} GiB, and {have:.1f} GiB are free for it: pass a smaller --gib"
        )
    arrays = [np.empty(length, np.float32) for _ in range(count)]
    for array in arrays:
        torch.from_numpy(array).zero_()  # in turn, so that each has memory of its own region
    half = length // 2

    def rate(array: Any) -> float:
        times = [copier.seconds(array[half : 2 * half], array[:half]) for _ in range(3)]
        return half * 4 / statistics.median(times) / 1e9

    rates = [rate(array) for array in arrays]
    order = sorted(range(count), key=lambda n: -rates[n])
    return Places(
        [arrays[n] for n in order[:near]], [arrays[n] for n in order[count - far :]], [rates[n] for n in order]
    )
