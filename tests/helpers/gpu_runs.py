"""Runs on the first GPU that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from helpers.data import batches_of, random_layer, random_rows

from pipeline import FusedLinear, Pipeline

LAYER = random_layer(256, 192)
X = random_rows(3000, 256)
MIB = 2**20


def open_pipeline(layer: FusedLinear = LAYER, **options: Any) -> Pipeline:
    return Pipeline(layer, **{"devices": "cuda:0", "chunk_rows": 256, "num_streams": 3, **options})


def pinned(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).pin_memory()


def device_free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(0)[0])


def kinds(x: Any) -> Iterator[Any]:
    """The same rows as sources of every kind."""
    yield x
    yield pinned(x)
    yield batches_of(x, [700])
    yield torch.from_numpy(x).cuda()


def use_everything_once() -> None:
    """Driver and torch open files and threads of their own, which stay: before tests that count them."""
    torch.zeros(1, device="cuda:0")
    with open_pipeline() as pipeline:
        for source in kinds(X):
            pipeline.run(source)
