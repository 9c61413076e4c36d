"""Layers and batches for tests of the layer itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline import FusedLinear
from pipeline.arrays import host_view, to_float64
from pipeline.dtypes import DTYPES

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
# What rounding to an element type can cost a value, relative to the larger of itself and 1.
ROUNDING = {"float64": 1e-13, "float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}


def fresh(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def new_layer(
    in_features: int = 8, out_features: int = 5, dtype: Any = np.float32, scaling_factor: float = 2.0
) -> FusedLinear:
    weight, bias = fresh(1, out_features, in_features, dtype=dtype), fresh(2, out_features, dtype=dtype)
    return FusedLinear(weight, bias, scaling_factor)


def assert_close(y: Any, expected: Any, dtype: str) -> None:
    y = to_float64(y)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def carrier(value: Any) -> Any:
    """The bits of an array or tensor, for exact comparison."""
    array = np.ascontiguousarray(host_view(value, "value")[0])
    return array.view(f"u{array.itemsize}")
