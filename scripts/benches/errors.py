"""`scripts/bench errors`: how far fp32 products are from float64, for data easy and hard, beside the vendor's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from benches.case import GPU, Outcome

IN_FEATURES = (8, 32, 64, 100, 128, 256, 512, 1024, 2048, 8192, 65536)
SIZES = ((256, 512), (1024, 1024))  # rows, out_features: the vendor splits small products' sums finely
LAYER = (1024, 8192, 8192)


def _normal(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device="cuda")


def _uniform(*shape: int) -> Any:
    import torch

    return torch.rand(*shape, device="cuda")


def _one_huge(rows: int, columns: int) -> Any:
    x = _normal(rows, columns)
    x[:, columns // 3] = 1e6
    return x


def _rows_of_all_sizes(rows: int, columns: int) -> Any:
    import torch

    return _normal(rows, columns) * torch.logspace(-30, 30, rows, device="cuda")[:, None]


# Rows of x, from (rows, columns).
DATA: dict[str, Callable[[int, int], Any]] = {
    "normal": _normal,
    "uniform": _uniform,
    "mean 10": lambda *shape: 10 + _normal(*shape),
    "log-normal rows": lambda *shape: (3 * _normal(*shape)).exp(),
    "spanning 2^40": lambda *shape: (40 * _uniform(*shape) - 20).exp2() * _normal(*shape).sign(),
    "rows from 1e-30 to 1e30": _rows_of_all_sizes,
    "one huge element": _one_huge,
    "sparse, 10%": lambda *shape: _normal(*shape) * (_uniform(*shape) < 0.1),
    "sparse, 1%": lambda *shape: _normal(*shape) * (_uniform(*shape) < 0.01),
    "denormals": lambda *shape: _normal(*shape) * 1e-39,
}
BIASED = ("mean 10", "spanning 2^40")  # where truncation adds up, or ranges are wide


def problem(kind: str, rows: int, out_features: int, in_features: int) -> tuple[Any, Any]:
    """x of that kind and W as torch initialises it, uniform; all-positive x gets positive weights."""
    bound = in_features**-0.5
    x, w = DATA[kind](rows, in_features), (2 * _uniform(out_features, in_features) - 1) * bound
    return x, w.abs() if kind == "mean 10" else w


def product(x: Any, w: Any, precision: str) -> Any:
    """z = x w^T: the layer with a scaling factor of 0 and no bias."""
    from pipeline import FusedLinear

    return FusedLinear(w, None, 0.0, precision=precision)(x)


def errors(z: Any, x: Any, w: Any) -> tuple[float, float]:
    """Relative Frobenius error against float64, and the worst element's error relative to |x| |w|^T."""
    import torch

    expected = x.double() @ w.double().T
    scale = (x.double().abs() @ w.double().abs().T).clamp_min(torch.finfo(torch.float32).tiny)
    difference = z.double() - expected
    return float(difference.norm() / expected.norm()), float((difference.abs() / scale).max())


def layer_differences(precision: str) -> tuple[float, float]:
    """Worst difference from float64 of the layer's outputs on the KernelBench problem (1024 rows uniform in [0, 1),
    8192 -> 8192, weights as torch.nn.Linear makes them, scaling factor 2), absolute and as a share of what KernelBench
    allows, 1e-4 + 1e-4 |y|."""
    import torch

    from pipeline import FusedLinear

    rows, out_features, in_features = LAYER
    torch.manual_seed(0)
    x, linear = _uniform(rows, in_features), torch.nn.Linear(in_features, out_features, device="cuda")
    z = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    expected = 2 * torch.sigmoid(z) + z
    with torch.inference_mode():
        if precision == "eager":
            y = linear(x)
            y = 2 * torch.sigmoid(y) + y
        else:
            y = FusedLinear(linear.weight.detach(), linear.bias.detach(), 2.0, precision=precision)(x)
    difference = (y.double() - expected).abs()
    return difference.max().item(), (difference / (1e-4 + 1e-4 * expected.abs())).max().item()


def compare(kind: str, rows: int, out_features: int, in_features: int) -> dict[str, Any]:
    """Errors of cuBLAS's fp32, ours as fp32 and ours as ieee for one problem."""
    import torch

    torch.manual_seed(in_features)
    x, w = problem(kind, rows, out_features, in_features)
    found = {"cuBLAS": errors(x @ w.T, x, w)}
    found |= {name: errors(product(x, w, name), x, w) for name in ("fp32", "ieee")}
    columns = [" ".join(f"{found[name][i]:.1e}" for name in found) for i in range(2)]
    ratios = [ours / vendors for ours, vendors in zip(found["fp32"], found["cuBLAS"], strict=True)]
    shown = f"{columns[0]} {ratios[0]:5.2f}  {columns[1]} {ratios[1]:5.2f}"
    print(f"{kind:24} {rows:5} x {out_features} x {in_features:<6} {shown}", flush=True)
    sizes = {"rows": rows, "out_features": out_features, "in_features": in_features}
    return {"data": kind, **sizes, "frobenius, worst": found}


class Errors:
    name = "errors"
    about = "errors of fp32 products against float64, beside cuBLAS's"
    needs = (GPU,)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--in-features", type=int, action="append", help="repeatable; default 8 to 65536")
        parser.add_argument("--smoke", action="store_true", help="a few, to see that it runs")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        import torch

        torch.set_float32_matmul_precision("highest")
        results: list[dict[str, Any]] = []
        print(
            "error against float64, Frobenius and worst element's: cuBLAS fp32, ours as fp32, ours as ieee; "
            "fp32's ratio"
        )
        for rows, out_features in SIZES[: 1 if options.smoke else None]:
            for kind in DATA:
                all_sizes = options.in_features or IN_FEATURES[: 2 if options.smoke else None]
                results += [compare(kind, rows, out_features, in_features) for in_features in all_sizes]
        for name in () if options.smoke else ("eager", "fp32", "ieee"):
            worst, share = layer_differences(name)
            results.append({"data": "KernelBench", "precision": name, "worst": worst, "share_of_allowed": share})
            print(f"the KernelBench problem, {name}: worst difference {worst:.1e}, {share:.1%} of what is allowed")
        yield Outcome(results, facts={"torch": torch.__version__})
