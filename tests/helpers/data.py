"""Random layers and rows for tests, and how results are compared with what is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch

from pipeline import FusedLinear
from pipeline.arrays import HostArray, is_torch, to_float64
from pipeline.dtypes import parse_dtype

SCALE = 2.0
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}


def random_rows(rows: int, features: int, dtype: str = "float32", seed: int = 0) -> Any:
    """Normal random rows: a NumPy array, for bfloat16 of the ml_dtypes type."""
    values = np.random.default_rng([seed, rows, features]).standard_normal((rows, features))
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def random_layer(
    in_features: int, out_features: int, dtype: str = "float32", *, bias: bool = True, seed: int = 0, **options: Any
) -> FusedLinear:
    weight = random_rows(out_features, in_features, "float64", seed + 1) / np.sqrt(in_features)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    b = random_rows(out_features, 1, "float64", seed + 2)[:, 0].astype(kind) if bias else None
    return FusedLinear(weight.astype(kind), b, options.pop("scaling_factor", SCALE), **options)


def poisoned(shape: tuple[int, ...], dtype: str = "float32") -> HostArray:
    """An array of NaN: what isn't written shows."""
    return np.full(shape, np.nan, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def bits(value: Any) -> bytes:
    """The elements' bytes, in native order."""
    if is_torch(value):
        value = value.detach().cpu().contiguous()
        return bytes(value.view(torch.uint8).numpy().data) if value.numel() else b""
    array = np.asarray(value)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).tobytes()


def assert_same_bits(got: Any, expected: Any) -> None:
    assert tuple(got.shape) == tuple(expected.shape)
    if bits(got) != bits(expected):
        a, b = to_float64(got), to_float64(expected)
        wrong = np.flatnonzero((a != b).any(axis=1) & ~(np.isnan(a) & np.isnan(b)).all(axis=1))
        raise AssertionError(f"{len(wrong)} of {len(a)} rows differ, the first ones are {wrong[:8].tolist()}")


def assert_close(got: Any, layer: FusedLinear, x: Any) -> None:
    """`got` is layer(x) within the worst case of its arithmetic: sums in the layer's precision, one rounding after."""
    y = to_float64(got)
    expected = layer.reference(x)
    assert y.shape == expected.shape
    weight = np.abs(to_float64(_weights(layer)))
    size = np.abs(to_float64(x)) @ weight.T + abs(getattr(layer, "scaling_factor", SCALE)) + 1
    if layer.bias is not None:
        size += np.abs(layer.reference(np.zeros((1, layer.in_features))))
    sums = _EPSILON["float64" if layer.dtype.name == "float64" else "float32"] * (layer.in_features + 16)
    out_dtype = parse_dtype(got.dtype).name
    # Near zero a type's numbers are no longer apart by a share of their size but by its smallest one: a float64 layer
    # with float16 results was "off" by it below 6e-5, where its sums explain nothing.
    tolerance = sums * size + _EPSILON[out_dtype] * np.abs(expected) + _SMALLEST[out_dtype]
    bad = ~(np.abs(y - expected) <= tolerance)
    assert not bad.any(), f"{bad.sum()} of {bad.size} elements are off, the first at {np.argwhere(bad)[0].tolist()}"


def _weights(layer: FusedLinear) -> Any:
    return layer.weight.view(ml_dtypes.bfloat16) if layer.dtype.name == "bfloat16" else layer.weight


def batches_of(x: Any, sizes: list[int]) -> Iterator[Any]:
    """`x` in batches of the given sizes, the last one repeated as needed; the memory of a batch is used again."""
    at, number = 0, 0
    while at < len(x):
        size = sizes[min(number, len(sizes) - 1)]
        batch = x[at : at + size].clone() if is_torch(x) else x[at : at + size].copy()
        yield batch
        batch[...] = 7  # by now it belongs to the iterable again
        at, number = at + size, number + 1
