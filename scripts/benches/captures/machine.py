"""Ceilings: what `pipeline.plan.machine.Machine` needs, as far as one process can measure it."""

from __future__ import annotations

from typing import Any

from benches.bursts import burst_seconds
from benches.ceilings import COPY_BYTES, duplex, host_copies, one_way
from benches.device_contenders import MM, Operands, contenders


def kernel_rate(precision: str, shape: tuple[int, int, int], contender: str, seconds: float = 0.4) -> float:
    """TFLOP/s of "layer" or "cuBLAS mm" over rows x out x in, sustained for some tenths of a second."""
    import torch

    found = contenders(Operands(precision, shape))
    launch = next(launch for name, launch in found.items() if (name == MM) == (contender == MM))
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    count = max(3, int(seconds / 3 / burst_seconds(launch, 3)))
    burst_seconds(launch, count)
    return 2 * shape[0] * shape[1] * shape[2] / burst_seconds(launch, count) / 1e12


def measure_machine() -> dict[str, Any]:
    import torch

    pinned = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    precisions = ("fp32", "ieee", "tf32", "bfloat16", "float16")
    return {
        "h2d_gb_per_s": {"1": one_way(pinned, device, True)},
        "d2h_gb_per_s": {"1": one_way(pinned, device, False)},
        "duplex_gb_per_s": {"1": duplex()},
        "kernel_tflops": {name: kernel_rate(name, (1024, 8192, 8192), "layer") for name in precisions},
        "copy_gb_per_s": {"1": host_copies()},
    }
