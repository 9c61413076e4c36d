"""The time of work on a GPU, by its own clock, and what the GPU's clock and power were meanwhile."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any


def burst_seconds(launch: Callable[[int], object], count: int) -> float:
    """Seconds per launch of `count` launches back to back, by CUDA events."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(count):
        launch(i)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


class Telemetry:
    """The GPU's SM clock and power, sampled by nvidia-smi for as long as the `with` block runs."""

    def __enter__(self) -> Telemetry:
        self.samples: list[tuple[float, float, float]] = []  # time, MHz, W
        query = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw.instant", "-lms", "20"]
        command = [*query, "--format=csv,noheader,nounits"]
        self._process: subprocess.Popen[str] | None
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except FileNotFoundError:
            self._process = None
            return self
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def _read(self, lines: Any) -> None:
        for line in lines:
            try:
                clock, power = (float(field) for field in line.split(","))
            except ValueError:  # "[N/A]" where a GPU doesn't tell
                continue
            self.samples.append((time.perf_counter(), clock, power))

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def between(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Clock (MHz) and power (W) of the samples taken between two times of the performance counter."""
        return [(clock, power) for when, clock, power in list(self.samples) if begin < when <= end]
