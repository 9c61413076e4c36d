"""The start of the driver and the contexts beside the program's imports. A stand-in for libcuda.so.1 answers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from pipeline.errors import DeviceError
from pipeline.kernels import start
from pipeline.kernels.driver import check_not_forked


class FakeLibrary:
    """A driver with three GPUs. `failing` is the function that returns an error."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.retained = failing, []  # type: tuple[str, list[int]]

    def cuInit(self, flags: int) -> int:
        return int(self.failing == "cuInit")

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 3
        return int(self.failing == "cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 100 + ordinal
        return int(not 0 <= ordinal < 3)

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.retained.append(device.value)
        return 0


@pytest.fixture(autouse=True)
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "process", None)


def retained(monkeypatch: pytest.MonkeyPatch, names: list[str] | None, failing: str = "") -> list[int]:
    library = FakeLibrary(failing)
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    thread = start.start_gpus(names)
    assert thread is not None
    thread.join()
    return library.retained


@pytest.mark.parametrize(
    ("names", "devices"),
    [
        (None, [100, 101, 102]),
        (["cuda"], [100]),
        (["cuda:2", "cuda:0"], [102, 100]),
        (["cpu", "cuda:1"], [101]),
        (["cuda:7", "cuda:x"], []),  # the command reports these
    ],
)
def test_start_makes_the_contexts_asked_for(
    names: list[str] | None, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert retained(monkeypatch, names) == devices
    assert start.process == os.getpid()


@pytest.mark.parametrize("names", [["cpu"], ["sim"], []])
def test_start_begins_nothing_without_a_gpu(names: list[str]) -> None:
    assert start.start_gpus(names) is None


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGetCount"])
def test_start_leaves_errors_to_whoever_uses_a_gpu(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert retained(monkeypatch, None, failing) == []
    assert start.process == (None if failing == "cuInit" else os.getpid())


def test_start_without_a_driver_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    thread = start.start_gpus(None)
    assert thread is not None
    thread.join()
    assert start.process is None


def test_start_counts_for_the_rule_about_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    retained(monkeypatch, None)
    check_not_forked()
    monkeypatch.setattr("os.getpid", lambda: -1)  # as a child of this process sees it
    with pytest.raises(DeviceError, match="forked after CUDA had started"):
        check_not_forked()


def test_start_imports_little() -> None:
    code = "import sys, pipeline.kernels.start; print({name.split('.')[0] for name in sys.modules} & {'numpy', 'cuda'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"
