"""Stream large host datasets through one fused CUDA layer at the speed of the hardware.

    from pipeline import FusedLinear, run_pipelined

    layer = FusedLinear(weight, bias, scaling_factor=2.0)
    result = run_pipelined(layer, "x.npy", "y.npy")

Names are imported when they are first used: `import pipeline` loads neither torch nor CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.errors import (
    CompileError,
    DeviceError,
    DeviceMemoryError,
    DeviceNotFoundError,
    DriverError,
    DTypeError,
    FileFormatError,
    InputError,
    OptionError,
    OutputError,
    OutputExistsError,
    PipelineError,
    ShapeError,
    TraceWarning,
)

if TYPE_CHECKING:
    from pipeline.api import Pipeline, Result, run_pipelined
    from pipeline.layer.linear import FusedLinear
    from pipeline.options import Progress
    from pipeline.pinned import Pinned, pin
    from pipeline.report.stats import Stats
    from pipeline.torch_op import GemmSigmoidScalingResidualAdd, fused_gemm_sigmoid_scale_add

__version__ = "0.1.0"

__all__ = [
    "CompileError",
    "DTypeError",
    "DeviceError",
    "DeviceMemoryError",
    "DeviceNotFoundError",
    "DriverError",
    "FileFormatError",
    "FusedLinear",
    "GemmSigmoidScalingResidualAdd",
    "InputError",
    "OptionError",
    "OutputError",
    "OutputExistsError",
    "Pinned",
    "Pipeline",
    "PipelineError",
    "Progress",
    "Result",
    "ShapeError",
    "Stats",
    "TraceWarning",
    "__version__",
    "fused_gemm_sigmoid_scale_add",
    "pin",
    "run_pipelined",
]

_HOMES = {
    "FusedLinear": "pipeline.layer.linear",
    "GemmSigmoidScalingResidualAdd": "pipeline.torch_op",
    "fused_gemm_sigmoid_scale_add": "pipeline.torch_op",
    "Pinned": "pipeline.pinned",
    "pin": "pipeline.pinned",
    "Pipeline": "pipeline.api",
    "Progress": "pipeline.options",
    "Result": "pipeline.api",
    "run_pipelined": "pipeline.api",
    "Stats": "pipeline.report.stats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
