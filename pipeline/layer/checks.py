"""Checks of what a layer is given: shapes, layouts, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.arrays import byte_range, is_cuda, is_torch, overlaps
from pipeline.dtypes import FLOAT64, DType, parse_dtype
from pipeline.errors import DTypeError, OptionError, ShapeError

if TYPE_CHECKING:
    import torch


def check_rows(shape: tuple[int, ...], in_features: int, what: str = "x", example: str = "") -> None:
    """Check the shape of input rows; `what` is what the message calls them, `example` how they are reshaped.

    Raises:
        ShapeError: `shape` isn't (rows, in_features).
    """
    if len(shape) != 2:
        example = example or f"{what if what.isidentifier() else 'x'}.reshape(-1, {in_features})"
        raise ShapeError(
            f"{what} has shape {tuple(shape)}, expected 2 dimensions (rows, {in_features}); reshape it first, for "
            f"example {example}"
        )
    if shape[1] != in_features:
        raise ShapeError(
            f"{what} has {shape[1]} features a row (shape {tuple(shape)}), the layer's weight takes {in_features}; "
            f"pass the rows and the weights that belong together"
        )


def check_dtype(dtype: DType, expected: DType, what: str = "x", remedy: str = "") -> None:
    """Check the element type of rows against the layer's; `remedy` is what the message says to do.

    Raises:
        DTypeError: `dtype` isn't the expected one.
    """
    if dtype is not expected:
        in_numpy = f".astype('{expected}') in NumPy or " if expected.in_numpy else ""
        remedy = remedy or f"convert one, for example with {in_numpy}.to(torch.{expected}) in torch"
        raise DTypeError(f"{what} is {dtype}, the layer's weights are {expected}: {remedy}")


def check_weights(
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    *,
    weight: str = "weight",
    bias: str = "the bias",
) -> None:
    """Check the shapes of weight and bias; `weight` and `bias` are what messages call them.

    Raises:
        ShapeError: the weight isn't (out_features, in_features) with both at least 1, or the bias isn't
            (out_features,).
    """
    if len(weight_shape) != 2:
        raise ShapeError(f"{weight} has shape {tuple(weight_shape)}, expected 2 dimensions (out_features, in_features)")
    if 0 in weight_shape:
        raise ShapeError(f"{weight} has shape {tuple(weight_shape)}: a layer needs at least 1 feature in and out")
    if bias_shape is not None and tuple(bias_shape) != (weight_shape[0],):
        hint = ""
        if len(bias_shape) == 2:
            hint = "; the residual is the layer's own linear output, so no residual tensor is passed"
        elif tuple(bias_shape) == (weight_shape[1],):
            hint = f"; transpose {weight}, (out_features, in_features) is expected"
        raise ShapeError(
            f"{bias} has shape {tuple(bias_shape)}, expected ({weight_shape[0]},): one value an output feature, "
            f"{weight} has shape {tuple(weight_shape)}{hint}"
        )


def check_out(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Check the shape of an output.

    Raises:
        ShapeError: an output's shape isn't the expected one.
    """
    if tuple(shape) != expected:
        raise ShapeError(
            f"out has shape {tuple(shape)}, expected {expected}: one row a source row, (rows, out_features); pass one "
            f"of that shape, or leave it out"
        )


def check_gpu_out(x: torch.Tensor, out: Any, out_features: int) -> None:
    """Check a CUDA output tensor against its input.

    Raises:
        ShapeError, DTypeError, OptionError: shape, element type, device, layout, or memory shared with `x`.
    """
    if not is_cuda(out) or out.device != x.device:
        where = out.device if is_torch(out) else type(out).__name__
        raise OptionError(f"out is on {where}, x is on {x.device}; they must be on one GPU")
    check_out(tuple(out.shape), (x.shape[0], out_features))
    check_gpu_layout(out)
    if overlaps(byte_range(x), byte_range(out)):
        raise OptionError("out overlaps x; pass other memory, the layer can't run in place")


def check_gpu_layout(out: torch.Tensor) -> None:
    """Check that kernels can write a CUDA tensor.

    Raises:
        DTypeError, OptionError: element type or strides.
    """
    if parse_dtype(out.dtype, "out dtype", "pass one of these") is FLOAT64:
        raise DTypeError("out is float64, which only the CPU computes; pass float32, bfloat16 or float16")
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise OptionError(f"out has strides {out.stride()}, expected contiguous rows (the last stride 1)")
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise OptionError(f"out has strides {out.stride()}: its rows overlap each other")
