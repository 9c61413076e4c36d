"""Small launches of every kernel variant, to run under compute-sanitizer; prints what it covered.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitizer_smoke.py

and likewise with racecheck, synccheck and initcheck.

Each array has an allocation of its own, no larger than it must be, so that a stray access is caught. No torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.dtypes import parse_dtype
from pipeline.epilogues import SigmoidScaleResidual
from pipeline.kernels.choose import Problem, alignment, candidates
from pipeline.kernels.fused_layer import Weights, prepare, prepare_split, split_weights
from pipeline.kernels.fused_linear import Matrix
from pipeline.kernels.launch import Launcher, in_context

# rows, in_features, out_features: inside one tile, ragged in every direction, and several tiles and ring rounds.
SHAPES = [(1, 1, 1), (5, 33, 7), (130, 200, 264), (67, 523, 131), (300, 640, 523)]
PARAMETERS = SigmoidScaleResidual(2.0).pack({})
SPLIT_SHAPES = [(1, 128, 1), (130, 200, 264), (67, 523, 131), (300, 1100, 523)]


def call(function: Any, *arguments: Any) -> Any:
    code, *results = function(*arguments)
    if code != 0:
        sys.exit(f"{function.__name__} failed: {code}")
    return results[0] if results else None


def upload(values: np.ndarray[Any, Any]) -> Any:
    pointer = call(driver.cuMemAlloc, values.nbytes)
    call(driver.cuMemcpyHtoD, pointer, values.ctypes.data, values.nbytes)
    return pointer


def operand(precision: str, *shape: int) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    if precision == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16) if precision == "float16" else values


def launch_shape(launcher: Launcher, precision: str, shape: tuple[int, int, int]) -> int:
    """Launches every variant the operands allow, and returns how many."""
    rows, in_features, out_features = shape
    dtype = parse_dtype("float32" if precision in ("ieee", "tf32") else precision)
    x, w, bias = (
        upload(operand(precision, *dims))
        for dims in ((rows, in_features), (out_features, in_features), (out_features,))
    )
    y_bytes = rows * out_features * dtype.itemsize
    y = call(driver.cuMemAlloc, y_bytes)
    problem = Problem(dtype, dtype, precision, in_features, out_features)
    row_bytes = in_features * dtype.itemsize
    widths = [width for width in (16, 4, 2) if row_bytes % width == 0 and width >= dtype.itemsize]
    result = np.empty((rows, out_features), dtype.carrier)
    launched = 0
    store_width = alignment(16, out_features * dtype.itemsize)
    for width in widths:
        for variant in candidates(launcher.arch, problem, width, store_width):
            call(driver.cuMemsetD8, y, 0xFF, y_bytes)
            launch = prepare(
                launcher,
                problem,
                Weights(Matrix(int(w), out_features, in_features, in_features), int(bias), PARAMETERS),
                Matrix(int(x), rows, in_features, in_features),
                Matrix(int(y), rows, out_features, out_features),
                variant=variant,
            )
            assert launch is not None
            launch.queue(0)
            call(driver.cuCtxSynchronize)
            call(driver.cuMemcpyDtoH, result.ctypes.data, y, y_bytes)
            if (result.view(np.uint8).reshape(-1, dtype.itemsize) == 0xFF).all(axis=1).any():
                sys.exit(f"{variant.description} {shape}: outputs were left unwritten")
            launched += 1
    for pointer in (x, w, bias, y):
        call(driver.cuMemFree, pointer)
    return launched


def launch_split(launcher: Launcher, shape: tuple[int, int, int]) -> int:
    """Launches every split variant with an exact row among the others, and returns how many."""
    rows, in_features, out_features = shape
    values, weights = operand("fp32", rows, in_features), operand("fp32", out_features, in_features)
    values[rows // 2, 0] = 1e30
    stride = -(-in_features // 4) * 4  # rows are aligned; what is between them must not matter
    padding = ((0, 0), (0, stride - in_features))
    x, w = (upload(np.pad(matrix, padding, constant_values=np.nan)) for matrix in (values, weights))
    bias = upload(operand("fp32", out_features))
    y_bytes = rows * out_features * 4
    y = call(driver.cuMemAlloc, y_bytes)
    float32 = parse_dtype("float32")
    problem = Problem(float32, float32, "fp32", in_features, out_features)
    split = split_weights(launcher, problem)
    assert split is not None
    split = split._replace(address=int(call(driver.cuMemAlloc, split.n_bytes)))
    weight = Matrix(int(w), out_features, in_features, stride)
    prepare_split(launcher, weight, split).queue(0)
    layer = Weights(weight, int(bias), PARAMETERS, split)
    scratch = int(call(driver.cuMemAlloc, layer.scratch_bytes(rows)))
    result = np.empty((rows, out_features), np.float32)
    variants = candidates(launcher.arch, problem, 16, alignment(16, out_features * 4))
    variants += candidates("sm_80", problem, 16)  # which run here, too
    for variant in variants:
        call(driver.cuMemsetD8, y, 0xFF, y_bytes)
        x_rows, y_rows = Matrix(int(x), rows, in_features, stride), Matrix(int(y), rows, out_features, out_features)
        launch = prepare(launcher, problem, layer, x_rows, y_rows, scratch, variant=variant)
        assert launch is not None
        launch.queue(0)
        call(driver.cuCtxSynchronize)
        call(driver.cuMemcpyDtoH, result.ctypes.data, y, y_bytes)
        if np.isnan(result).any():
            sys.exit(f"{variant.description} {shape}: outputs were left unwritten")
    for pointer in (x, w, bias, y, split.address, scratch):
        call(driver.cuMemFree, pointer)
    return len(variants)


def main() -> None:
    launcher = Launcher.for_device(0)
    with in_context(launcher.context):
        launch_all(launcher)


def launch_all(launcher: Launcher) -> None:
    for precision in ("ieee", "tf32", "bfloat16", "float16"):
        launched = sum(launch_shape(launcher, precision, shape) for shape in SHAPES)
        print(f"{launcher.name} ({launcher.arch}): {precision}: {launched} launches")
    if launcher.arch == "sm_90a":
        launched = sum(launch_split(launcher, shape) for shape in SPLIT_SHAPES)
        print(f"{launcher.name} ({launcher.arch}): fp32: {launched} launches")


if __name__ == "__main__":
    main()
