"""The process of one checkout in `scripts/bench versions`: it imports that checkout's package, and measures when told.

    python -P worker.py CHECKOUT MEMORY_FD

Requests are lines of JSON on standard input, answers lines of JSON on standard output. It uses nothing of the package
but FusedLinear and Pipeline, which every version has.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import statistics
import sys
import time
import traceback
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKED_ROWS = 64
DIGEST_BYTES = 64 * 2**20  # of a result, at most, in rows spread over it
LONG_S = 3  # a run that takes longer isn't run twice in its turn


class Work(ABC):
    """A layer of random weights, and what is measured of it. All workers make the same weights."""

    def __init__(self, spec: dict[str, Any], dtype: torch.dtype, precision: str | None) -> None:
        from pipeline import FusedLinear

        self.device = torch.device(spec["device"])
        features = spec["features"]
        bound = features**-0.5
        torch.manual_seed(0)
        self._weight = torch.empty(features, features, device=self.device).uniform_(-bound, bound).to(dtype)
        self._bias = torch.empty(features, device=self.device).uniform_(-bound, bound).to(dtype)
        self.layer = FusedLinear(self._weight.cpu(), self._bias.cpu(), 2.0, precision=precision)

    @abstractmethod
    def measure(self, count: int) -> float:
        """Seconds of one call, or of one of `count` calls."""

    @abstractmethod
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y."""

    @abstractmethod
    def compute(self) -> None:
        """Compute y from x, once."""

    def count_for(self, seconds: float) -> int:
        """How many calls take about that long."""
        self.measure(1)
        return max(1, int(seconds / self.measure(3)))

    def check(self) -> dict[str, Any]:
        """Compute y, poisoned before: the largest |y - float64| / (1 + |float64|) of some rows, and a digest of y."""
        x, y = self.ends()
        y.fill_(torch.nan)
        self.compute()
        picked = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).long()
        rows, got = (part[picked.to(part.device)].to(self.device).double() for part in (x, y))
        z = rows @ self._weight.double().T + self._bias.double()
        want = 2.0 * torch.sigmoid(z) + z
        step = -(-y.nbytes // DIGEST_BYTES)
        digest = hashlib.sha256(y[::step].contiguous().cpu().view(torch.uint8).numpy().data).hexdigest()
        return {"difference": ((got - want).abs() / (1 + want.abs())).max().item(), "digest": digest[:16]}

    def close(self) -> None:
        """Give back what isn't memory of this object alone."""


class KernelWork(Work):
    """layer(x, out=y) on rows in the device's memory; `rows`, and `precision`, which bf16 names a type by."""

    def __init__(self, spec: dict[str, Any], memory: mmap.mmap | None) -> None:
        bf16 = spec["precision"] == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        super().__init__(spec, dtype, None if bf16 else spec["precision"])
        self._x = torch.randn(spec["rows"], spec["features"], device=self.device).to(dtype)
        self._y = torch.empty_like(self._x)

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._x, self._y

    def compute(self) -> None:
        self.layer(self._x, out=self._y)

    def measure(self, count: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                self.layer(self._x, out=self._y)
            return (time.perf_counter() - start) / count
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            self.layer(self._x, out=self._y)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count


class HostWork(Work):
    """Pipeline.run from host memory to host memory: the first `rows` rows of the memory that all workers share."""

    def __init__(self, spec: dict[str, Any], memory: mmap.mmap | None) -> None:
        from pipeline import Pipeline

        super().__init__(spec, torch.float32, spec["precision"])
        flat = torch.from_numpy(np.frombuffer(memory or b"", np.float32))
        half, length = len(flat) // 2, spec["rows"] * spec["features"]
        self._x, self._y = (flat[first : first + length].view(spec["rows"], -1) for first in (0, half))
        self._pinned = [self._x, self._y] if spec["memory"] == "pinned" else []
        for array in self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(array.data_ptr(), array.nbytes, 0))
        self._arguments = (self._x, self._y) if self._pinned else (self._x.numpy(), self._y.numpy())
        self._pipe = Pipeline(self.layer, devices=spec["device"])
        self._pipe.__enter__()

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._x, self._y

    def compute(self) -> None:
        self._pipe.run(*self._arguments)

    def measure(self, count: int) -> float:
        """The median of `count` runs; before them one more, unless it takes long: clocks and threads that have rested
        take a while to come up."""
        first = self._run_s()
        if first > LONG_S:
            return first
        return statistics.median(self._run_s() for _ in range(count))

    def _run_s(self) -> float:
        start = time.perf_counter()
        self._pipe.run(*self._arguments)
        return time.perf_counter() - start

    def close(self) -> None:
        self._pipe.__exit__(None, None, None)
        for array in self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(array.data_ptr()))


KINDS: dict[str, type[KernelWork | HostWork]] = {"kernel": KernelWork, "host": HostWork}


def map_memory(fd: int) -> mmap.mmap | None:
    """The memory behind a descriptor, with huge pages where the system gives them to shared memory."""
    n_bytes = os.fstat(fd).st_size
    if not n_bytes:
        return None
    memory = mmap.mmap(fd, n_bytes)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Worker:
    """Answers requests: `open` a piece of work, `count` calls for so many seconds, `measure`, `check`, `close`."""

    def __init__(self, checkout: str, fd: int) -> None:
        sys.path.insert(0, checkout)
        import pipeline

        self._package = Path(pipeline.__file__).resolve().parent
        if self._package.parent != Path(checkout).resolve():
            raise RuntimeError(f"pipeline was imported from {self._package}, expected that of {checkout}")
        self._memory = map_memory(fd)
        self._work: Work | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        do, work = request["do"], self._work
        if do == "open":
            self._work = KINDS[request["case"]["kind"]](request["case"], self._memory)
            return self._work.check()
        assert work is not None
        if do == "count":
            return work.count_for(request["seconds"])
        if do == "measure":
            return work.measure(request["count"])
        work.close()
        self._work = None
        return None


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything prints goes to standard error
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        try:
            answer = {"answer": worker.answer(json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
