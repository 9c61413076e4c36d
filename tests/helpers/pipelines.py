"""A small layer, rows for it, and Pipelines of small chunks."""

from __future__ import annotations

from typing import Any

from helpers.data import random_layer, random_rows

from pipeline import FusedLinear, Pipeline

LAYER = random_layer(12, 7)
X = random_rows(200, 12)


def open_pipeline(layer: FusedLinear = LAYER, **options: Any) -> Pipeline:
    return Pipeline(layer, **{"devices": "cpu", "chunk_rows": 16, "num_streams": 3, **options})
