"""Runs to compare plans with."""

from __future__ import annotations

from typing import Any

from benches.captures.made import check_rows, make_layer, make_rows
from benches.common import GIB

# name: in_features, out_features, dtype, precision, memory, GiB of the wider side
CASES = {
    "pinned 4096 tf32": (4096, 4096, "float32", "tf32", "pinned", 4.0),
    "pinned 8192 tf32": (8192, 8192, "float32", "tf32", "pinned", 4.0),
    "pinned 8192 fp32": (8192, 8192, "float32", "fp32", "pinned", 4.0),
    "pinned 8192 ieee": (8192, 8192, "float32", "ieee", "pinned", 1.0),
    "pinned 2048 tf32": (2048, 2048, "float32", "tf32", "pinned", 4.0),
    "pinned 8192 bfloat16": (8192, 8192, "bfloat16", "bfloat16", "pinned", 4.0),
    "pinned 8192 to 1024 bfloat16": (8192, 1024, "bfloat16", "bfloat16", "pinned", 4.0),
    "pinned 1024 to 8192 tf32": (1024, 8192, "float32", "tf32", "pinned", 4.0),
    "array 4096 tf32": (4096, 4096, "float32", "tf32", "array", 4.0),
    "array 8192 tf32": (8192, 8192, "float32", "tf32", "array", 4.0),
}


def measure_case(name: str, rounds: int = 5) -> dict[str, Any]:
    import torch

    from pipeline import Pipeline

    in_features, out_features, dtype_name, precision, memory, gib = CASES[name]
    dtype = getattr(torch, dtype_name)
    rows = int(gib * GIB) // (max(in_features, out_features) * dtype.itemsize)
    layer = make_layer(in_features, out_features, dtype, precision if dtype_name == "float32" else None)
    x, y = make_rows(rows, in_features, out_features, dtype, memory)
    with Pipeline(layer, devices="cuda:0") as pipe:
        pipe.run(x[: 16 * pipe.chunk_rows], y[: 16 * pipe.chunk_rows])
        stats = [pipe.run(x, y).stats for _ in range(rounds)]
        middle = sorted(stats, key=lambda s: s.seconds)[rounds // 2]
        job = {
            "rows": rows, "in_features": in_features, "out_features": out_features, "dtype": dtype_name,
            "runs_as": middle.runs_as, "source": memory, "out": memory, "num_streams": pipe.num_streams,
        }  # fmt: skip
    check_rows(layer, x, y)
    rates = [s.rows_per_s for s in stats]
    print(f"{name}: {middle.rows_per_s:,.0f} rows/s ({min(rates):,.0f} to {max(rates):,.0f}), bound by {middle.bound}")
    spread = {"min": min(rates), "max": max(rates), "bound": middle.bound, "stats": middle.as_dict()}
    return {"name": name, "job": job, "rows_per_s": middle.rows_per_s, **spread}
