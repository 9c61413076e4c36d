"""What the hardware reaches with nothing but copies: the bus, one way and both, and the copy workers."""

from __future__ import annotations

import statistics
import time
from typing import Any

COPY_BYTES = 64 * 2**20


def bare_copies(x: Any, y: Any, times: int = 1) -> float:
    """Seconds of nothing but copies of pinned x to the GPU and of y back, both at once, so many times: the ceiling of
    any recipe."""
    import torch

    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def buffers(host: Any) -> tuple[int, list[Any]]:
        rows = min(len(host), max(1, COPY_BYTES // (host.shape[1] * host.element_size())))
        return rows, [torch.empty_like(host[:rows], device="cuda") for _ in range(2)]

    (rows_in, device_in), (rows_out, device_out) = buffers(x), buffers(y)
    torch.cuda.synchronize()
    start = time.perf_counter()
    copies = max(-(-len(x) // rows_in), -(-len(y) // rows_out))
    for i in range(times * copies):
        place = i % copies
        part = x[place * rows_in : (place + 1) * rows_in]
        with torch.cuda.stream(streams[0]):
            device_in[i % 2][: len(part)].copy_(part, non_blocking=True)
        part = y[place * rows_out : (place + 1) * rows_out]
        with torch.cuda.stream(streams[1]):
            part.copy_(device_out[i % 2][: len(part)], non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def one_way(pinned: Any, device: Any, to_device: bool, seconds: float = 0.3) -> float:
    """GB/s of pinned copies of 64 MiB in one direction."""
    import torch

    target, source = (device, pinned) if to_device else (pinned, device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        count += 8
    return float(count * pinned.nbytes / (time.perf_counter() - start) / 1e9)


def duplex(rounds: int = 9, copies: int = 32) -> float:
    """GB/s each way of pinned copies of 64 MiB in both directions at once, nothing else running: a median."""
    import torch

    pinned = [torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(4)]
    device = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(4)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    rates = []
    for _ in range(rounds + 1):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(copies):
            with torch.cuda.stream(streams[0]):
                device[number % 2].copy_(pinned[number % 2], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                pinned[2 + number % 2].copy_(device[2 + number % 2], non_blocking=True)
        torch.cuda.synchronize()
        rates.append(copies * COPY_BYTES / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates[1:])


class Copier:
    """The pipeline's copy workers, as many as it starts with, copying from array to array with nothing else going on.
    Ends the program where they aren't the native ones."""

    def __init__(self) -> None:
        from pipeline.config import Staging
        from pipeline.staging.native import open_workers, workers_kind

        if workers_kind() != "native":
            raise SystemExit("this bench measures with the native copy workers, which aren't built: pip install -e .")
        self._workers = open_workers(Staging.chosen().workers)

    def seconds(self, target: Any, source: Any) -> float:
        """What they need to copy one flat array to another."""
        from pipeline.io.memory import ArrayRows
        from pipeline.rows import Drain

        start = time.perf_counter()
        self._workers.run(Drain(ArrayRows(target.reshape(1, -1)), 0, source.reshape(1, -1)))
        return time.perf_counter() - start

    def close(self) -> None:
        self._workers.close()


class _BusyBus:
    """Copies of 64 MiB both ways, queued again whenever they have ended."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._host = [torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._gpu = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self._streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def keep_busy(self) -> None:
        if not all(stream.query() for stream in self._streams):
            return
        for _ in range(4):
            with self._torch.cuda.stream(self._streams[0]):
                self._gpu[0].copy_(self._host[0], non_blocking=True)
            with self._torch.cuda.stream(self._streams[1]):
                self._host[1].copy_(self._gpu[1], non_blocking=True)


def host_copies(seconds: float = 1.0) -> float:
    """GB/s that the copy workers move, fills and drains together, while the bus runs both ways."""
    import numpy as np
    import torch

    from pipeline.config import Staging
    from pipeline.io.memory import ArrayRows
    from pipeline.rows import Drain, Fill
    from pipeline.staging.native import open_workers

    staging = Staging.chosen()
    size, pieces = staging.piece_bytes, staging.ring_pieces
    host = np.ones((2, 256, size), np.uint8)  # beyond the caches
    ring = torch.zeros(2, pieces, size, dtype=torch.uint8, pin_memory=True).numpy()
    bus, workers = _BusyBus(), open_workers(staging.workers)
    queued: list[Any] = []
    moved, number, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        bus.keep_busy()
        while len(queued) < 2 * pieces:
            piece, array = ring[number % 2, number // 2 % pieces], host[number % 2, number // 2 % 256]
            job = (Fill if number % 2 else Drain)(ArrayRows(array[None]), 0, piece[None])
            queued.append(workers.submit(job))
            number += 1
        left = [operation for operation in queued if not operation.done()]
        moved += (len(queued) - len(left)) * size
        queued = left
        time.sleep(2e-5)
    rate = moved / (time.perf_counter() - start) / 1e9
    workers.close()
    torch.cuda.synchronize()
    return rate
