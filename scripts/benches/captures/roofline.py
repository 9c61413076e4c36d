"""The layer's and cuBLAS's rates from few rows to many, with the memory's measured rate."""

from __future__ import annotations

from typing import Any

from benches.bursts import burst_seconds
from benches.captures.machine import kernel_rate
from benches.captures.made import context
from benches.common import GIB
from benches.device_contenders import MM

ROWS, FEATURES, MOST_IEEE_ROWS = (16, 64, 256, 1024, 4096, 16384), 8192, 4096


def measure_roofline() -> dict[str, Any]:
    import torch

    source = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = burst_seconds(lambda _: target.copy_(source), 10)
    points = []
    for precision, itemsize in (("bfloat16", 2), ("tf32", 4), ("ieee", 4)):
        for rows in ROWS:
            if precision == "ieee" and rows > MOST_IEEE_ROWS:
                continue
            shape = rows, FEATURES, FEATURES
            rates = {name: kernel_rate(precision, shape, name, 0.15) for name in ("layer", MM)}
            moved = itemsize * (rows * FEATURES * 2 + FEATURES**2)
            intensity = 2 * rows * FEATURES**2 / moved
            points.append({"precision": precision, "rows": rows, "flop_per_byte": intensity, **rates})
            print(f"roofline {precision} {rows} rows: layer {rates['layer']:.1f}, cuBLAS mm {rates[MM]:.1f}")
    memory_gb_per_s = 2 * source.nbytes / copy_s / 1e9
    return {"bench": "roofline", "context": context(), "memory_gb_per_s": memory_gb_per_s, "points": points}
