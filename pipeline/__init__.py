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
    from pipeline.dtypes import DType, parse_dtype, register_dtype
    from pipeline.epilogues import ByFeature, Epilogue, SigmoidScaleResidual
    from pipeline.flow import Chunk, Feed, Sink, Source, Span
    from pipeline.io.formats.raw import RawFile
    from pipeline.io.registry import SinkRequest, SourceRequest, register_sink, register_source
    from pipeline.kept import release
    from pipeline.layer.base import DeviceLayer, Layer
    from pipeline.layer.linear import FusedLinear
    from pipeline.options import Progress
    from pipeline.pinned import Pinned, pin
    from pipeline.report.stats import Stats
    from pipeline.rows import SourceRows, TargetRows
    from pipeline.torch_op import GemmSigmoidScalingResidualAdd, fused_gemm_sigmoid_scale_add

__version__ = "0.1.0"

__all__ = [
    "ByFeature",
    "Chunk",
    "CompileError",
    "DType",
    "DTypeError",
    "DeviceError",
    "DeviceLayer",
    "DeviceMemoryError",
    "DeviceNotFoundError",
    "DriverError",
    "Epilogue",
    "Feed",
    "FileFormatError",
    "FusedLinear",
    "GemmSigmoidScalingResidualAdd",
    "InputError",
    "Layer",
    "OptionError",
    "OutputError",
    "OutputExistsError",
    "Pinned",
    "Pipeline",
    "PipelineError",
    "Progress",
    "RawFile",
    "Result",
    "ShapeError",
    "SigmoidScaleResidual",
    "Sink",
    "SinkRequest",
    "Source",
    "SourceRequest",
    "SourceRows",
    "Span",
    "Stats",
    "TargetRows",
    "TraceWarning",
    "__version__",
    "fused_gemm_sigmoid_scale_add",
    "parse_dtype",
    "pin",
    "register_dtype",
    "register_sink",
    "register_source",
    "release",
    "run_pipelined",
]

_HOMES = {
    "ByFeature": "pipeline.epilogues",
    "Chunk": "pipeline.flow",
    "DType": "pipeline.dtypes",
    "DeviceLayer": "pipeline.layer.base",
    "Epilogue": "pipeline.epilogues",
    "Feed": "pipeline.flow",
    "FusedLinear": "pipeline.layer.linear",
    "GemmSigmoidScalingResidualAdd": "pipeline.torch_op",
    "Layer": "pipeline.layer.base",
    "Pinned": "pipeline.pinned",
    "Pipeline": "pipeline.api",
    "Progress": "pipeline.options",
    "RawFile": "pipeline.io.formats.raw",
    "Result": "pipeline.api",
    "SigmoidScaleResidual": "pipeline.epilogues",
    "Sink": "pipeline.flow",
    "SinkRequest": "pipeline.io.registry",
    "Source": "pipeline.flow",
    "SourceRequest": "pipeline.io.registry",
    "SourceRows": "pipeline.rows",
    "Span": "pipeline.flow",
    "Stats": "pipeline.report.stats",
    "TargetRows": "pipeline.rows",
    "fused_gemm_sigmoid_scale_add": "pipeline.torch_op",
    "parse_dtype": "pipeline.dtypes",
    "pin": "pipeline.pinned",
    "register_dtype": "pipeline.dtypes",
    "register_sink": "pipeline.io.registry",
    "register_source": "pipeline.io.registry",
    "release": "pipeline.kept",
    "run_pipelined": "pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
