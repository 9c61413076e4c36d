"""Sources and sinks of tests: a small layer with rows, arrays of every layout, system calls that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import random_layer, random_rows
from hypothesis import HealthCheck, settings

from pipeline import FusedLinear, Pipeline
from pipeline.arrays import HostArray

IN, OUT = 6, 5


LAYER = random_layer(IN, OUT)


X = random_rows(50, IN)


DTYPES = ["float64", "float32", "float16", "bfloat16"]


every = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def open_pipeline(layer: FusedLinear = LAYER, **options: Any) -> Pipeline:
    return Pipeline(layer, **{"devices": "cpu", "chunk_rows": 16, "num_streams": 2, **options})


LAYOUTS: dict[str, Callable[[HostArray], HostArray]] = {
    "C": lambda x: x.copy(),
    "Fortran": np.asfortranarray,
    "reversed rows": lambda x: x[::-1].copy()[::-1],
    "reversed features": lambda x: x[:, ::-1].copy()[:, ::-1],
    "every third row": lambda x: np.repeat(x, 3, axis=0)[1::3],
    "every second feature": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "inside a wider array": lambda x: np.pad(x, 2, constant_values=np.nan)[2:-2, 2:-2],
    "of 3 dimensions": lambda x: np.stack([x, x + 1], axis=1)[:, 0],
    "unaligned": lambda x: unaligned(x),
    "read-only": lambda x: frozen(x),
}


def unaligned(x: HostArray) -> HostArray:
    memory = np.empty(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def frozen(x: HostArray) -> HostArray:
    x = x.copy()
    x.setflags(write=False)
    return x


def as_tensor(x: HostArray) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def refusing(code: int, after: int = 0) -> Callable[..., Any]:
    """A system call that fails with `code` from its call number `after` on; the calls before do nothing."""
    calls = iter(range(10**9))

    def call(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))

    return call


def failing_from(name: str, after: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = getattr(os, name), iter(range(10**9))

    def call(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, name, call)
