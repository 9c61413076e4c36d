"""Random layers, how far a result may be from float64, and the comparison of every row with it."""

from __future__ import annotations

from typing import Any

# The largest |y - reference| / (1 + |reference|) that rounding explains with these layers' data, z of standard
# deviation 0.6. tf32: both operands of each product are off by at most 2**-12, together 1.2e-4 of z's size at one
# standard deviation, 8e-4 at the 6.5 that billions of results reach. fp32: sums of thousands of terms. bf16: operands,
# weights and results are off by 2**-9 of their size.
ALLOWED = {"tf32": 2e-3, "ieee": 1e-5, "fp32": 1e-5, "bfloat16": 3e-2}
ALLOWED_CUBLAS = {**ALLOWED, "ieee": 4e-5, "fp32": 4e-5}  # which sums fp32 products one after another


def random_layer(features: int, precision: str, out_features: int | None = None) -> Any:
    """A layer of random weights, as wide at its end as at its beginning unless `out_features` says otherwise."""
    import numpy as np

    from pipeline import FusedLinear

    rng = np.random.default_rng(0)
    bound, out_features = features**-0.5, out_features or features
    weight = rng.uniform(-bound, bound, (out_features, features)).astype(np.float32)
    return FusedLinear(weight, rng.uniform(-bound, bound, out_features).astype(np.float32), 2.0, precision=precision)


def verdict(difference: float, precision: str) -> str:
    return f"every row right, worst difference {difference:.1e}" if difference <= ALLOWED[precision] else "WRONG RESULT"


def larger(worst: float, difference: float) -> float:
    """The larger of two differences; NaN is larger than any."""
    return worst if difference <= worst or worst != worst else difference


def worst_difference(layer: Any, x: Any, y: Any, rows: int = 8192) -> float:
    """The largest |y - float64 reference| / (1 + |reference|) over ALL rows, computed on the GPU chunk by chunk."""
    import torch

    weight = torch.from_numpy(layer.weight).cuda().double().T
    bias = torch.from_numpy(layer.bias).cuda().double()
    worst = 0.0
    for row in range(0, len(x), rows):
        z = torch.addmm(bias, torch.asarray(x[row : row + rows], copy=True).cuda().double(), weight)
        want = layer.scaling_factor * torch.sigmoid(z) + z
        got = torch.asarray(y[row : row + rows], copy=True).cuda().double()
        difference = ((got - want).abs() / (1 + want.abs())).max().item()
        worst = larger(worst, difference)
    return worst
