"""Layers, rows and their check for what scripts/capture measures."""

from __future__ import annotations

from typing import Any

from benches import common
from benches.layers import ALLOWED


def context() -> dict[str, Any]:
    """What a reader needs to repeat it, as in the benches' records."""
    return common.context("scripts/capture --out FOLDER")


def make_layer(in_features: int, out_features: int, dtype: Any, precision: str | None) -> Any:
    import torch

    from pipeline import FusedLinear

    bound = in_features**-0.5
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator).to(dtype)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator).to(dtype)
    return FusedLinear(weight, bias, 2.0, precision=precision)


def make_rows(rows: int, in_features: int, out_features: int, dtype: Any, memory: str) -> tuple[Any, Any]:
    """Random input rows, and an output that has been touched."""
    import torch

    pinned = memory == "pinned"
    x = torch.empty(rows, in_features, dtype=dtype, pin_memory=pinned)
    for row in range(0, rows, 65536):
        part = x[row : row + 65536]
        part.copy_(torch.randn(part.shape, device="cuda").to(dtype))
    return x, torch.full((rows, out_features), torch.nan, dtype=dtype, pin_memory=pinned)


def check_rows(layer: Any, x: Any, y: Any) -> None:
    """Compare some rows of a result with the float64 reference.

    Raises:
        RuntimeError: they differ by more than the precision explains.
    """
    import torch

    picked = torch.randint(0, len(x), (48,))
    want = torch.from_numpy(layer.reference(x[picked].double().numpy()))
    difference = ((y[picked].double() - want).abs() / (1 + want.abs())).max().item()
    allowed = ALLOWED.get(layer.precision, 2e-2)  # others: one rounding to 8 or 11 bits
    if not difference <= allowed:
        raise RuntimeError(f"the result is {difference:.1e} away from the reference, expected at most {allowed:.0e}")
