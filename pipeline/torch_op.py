"""The layer for torch programs: a custom operator with gradients, and a module around it.

The operator `pipeline::fused_gemm_sigmoid_scale_add` has CPU and CUDA kernels, a fake kernel (so that torch.compile
and torch.export trace it as one node) and an autograd formula.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from pipeline.dtypes import DTYPES, FLOAT32, FLOAT64, DType, parse_dtype, parse_precision
from pipeline.epilogues.sigmoid_scale_residual import SigmoidScaleResidual, check_scaling_factor
from pipeline.errors import DTypeError, InputError
from pipeline.layer.checks import check_rows, check_weights
from pipeline.layer.gpu import PackedEpilogue, launch_on_gpu
from pipeline.layer.host import HostWeights

__all__ = ["GemmSigmoidScalingResidualAdd", "fused_gemm_sigmoid_scale_add"]

_NAME = "pipeline::fused_gemm_sigmoid_scale_add"
_ELEMENT_TYPES = {getattr(torch, name): dtype for name, dtype in DTYPES.items()}
_parse_precision = functools.cache(parse_precision)

# Not torch.library.custom_op: its wrappers cost several microseconds a call more than the bare operator.
torch.library.define(
    _NAME,
    "(Tensor A, Tensor B, Tensor C, float scaling_factor, str? precision=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPERATOR = torch.ops.pipeline.fused_gemm_sigmoid_scale_add.default


def fused_gemm_sigmoid_scale_add(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: float, *, precision: str | None = None
) -> torch.Tensor:
    """scaling_factor * sigmoid(z) + z with z = A @ B.T + C, in one kernel.

    Args:
        A: (rows, in_features), any strides; float32, bfloat16, float16, or on the CPU float64.
        B: (out_features, in_features), the weight, of A's element type and device; contiguous is fastest on CUDA.
        C: (out_features,), the bias, likewise. The residual that is added is z itself, so no residual is passed.
        scaling_factor: one finite number.
        precision: for float32 on CUDA "fp32" (the default), "ieee" or "tf32", as for `FusedLinear`. The CPU computes
            all three in float32. "fp32" splits B anew at each call, `FusedLinear` once.

    Returns:
        (rows, out_features), contiguous, of A's element type and device, rounded once. For CUDA tensors the kernel is
        queued on the current stream, and the call returns at once.

    Gradients of A, B and C compute z again with torch's own matrix product, at the precision torch is set to
    (`torch.set_float32_matmul_precision`), and can be differentiated again. Under `torch.autocast` float tensors are
    cast as for `torch.nn.functional.linear`; `precision` then applies only where that gives float32.

    Raises:
        ShapeError: a rank, or sizes that don't fit each other.
        DTypeError: an unsupported element type or a sparse tensor, float64 on CUDA, or element types that differ.
        InputError: not a tensor, or tensors on different devices.
        OptionError: scaling_factor isn't one finite number, or a precision that the element type doesn't have.
    """
    for name, value in (("A", A), ("B", B), ("C", C)):
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{name} is a {type(value).__name__}, expected a torch tensor; use torch.as_tensor({name})"
            )
        if value.layout != torch.strided:
            raise DTypeError(f"{name} is a {value.layout} tensor, expected a dense one; use .to_dense() first")
    if not isinstance(scaling_factor, (float, int)):
        scaling_factor = check_scaling_factor(scaling_factor)  # type: ignore[unreachable]
    device_type = A.device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        A, B, C = _autocast(A, dtype), _autocast(B, dtype), _autocast(C, dtype)
        if A.dtype != torch.float32:
            precision = None
    result: torch.Tensor = _OPERATOR(A, B, C, scaling_factor, precision)
    return result


class GemmSigmoidScalingResidualAdd(torch.nn.Module):
    """A linear layer, then scaling_factor * sigmoid(z) + z, as one operator.

    Args:
        input_size: in_features.
        hidden_size: out_features.
        scaling_factor, precision: as for `fused_gemm_sigmoid_scale_add`.

    The parameters are those of `gemm`, a `torch.nn.Linear`: state dict keys `gemm.weight` and `gemm.bias`.

    Raises:
        OptionError: scaling_factor or precision.
    """

    def __init__(
        self, input_size: int, hidden_size: int, scaling_factor: float, *, precision: str | None = None
    ) -> None:
        super().__init__()
        self.gemm = torch.nn.Linear(input_size, hidden_size)
        self.scaling_factor = check_scaling_factor(scaling_factor)
        if precision is not None:
            parse_precision(precision, FLOAT32)
        self.precision = precision

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer of x (rows, input_size), of the parameters' element type: (rows, hidden_size)."""
        return fused_gemm_sigmoid_scale_add(
            x, self.gemm.weight, self.gemm.bias, self.scaling_factor, precision=self.precision
        )

    def extra_repr(self) -> str:
        return f"scaling_factor={self.scaling_factor}, precision={self.precision!r}"


def _autocast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _check(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: Any, precision: str | None) -> str:
    """The precision to compute in, once every argument has been checked. For real and fake tensors.

    A symbolic scaling_factor is checked when the compiled program runs.

    Raises: as `fused_gemm_sigmoid_scale_add`.
    """
    dtype = _element_type(A, "A")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dtype != A.dtype:
            raise DTypeError(f"{name} is {_element_type(tensor, name)}, A is {dtype}: convert one of them with .to()")
        if tensor.device != A.device:
            raise InputError(f"{name} is on {tensor.device}, A is on {A.device}: move one of them with .to()")
    if dtype is FLOAT64 and A.device.type == "cuda":
        raise DTypeError("A is float64 on a GPU, which only the CPU computes; use A.float(), or .cpu() for all three")
    check_weights(tuple(B.shape), tuple(C.shape), weight="B", bias="C (the bias)")
    check_rows(tuple(A.shape), B.shape[1], "A")
    if not isinstance(scaling_factor, torch.SymFloat) and not math.isfinite(scaling_factor):
        check_scaling_factor(scaling_factor)
    return _parse_precision(precision, dtype)


def _element_type(tensor: torch.Tensor, name: str) -> DType:
    return _ELEMENT_TYPES.get(tensor.dtype) or parse_dtype(tensor.dtype, f"{name} dtype")


def _cpu(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: float, precision: str | None = None
) -> torch.Tensor:
    _check(A, B, C, scaling_factor, precision)
    out = torch.empty((A.shape[0], B.shape[0]), dtype=A.dtype, device=A.device)
    HostWeights(B, C, SigmoidScaleResidual(scaling_factor)).forward(A.detach(), out)
    return out


def _cuda(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: float, precision: str | None = None
) -> torch.Tensor:
    precision = _check(A, B, C, scaling_factor, precision)
    out = torch.empty((A.shape[0], B.shape[0]), dtype=A.dtype, device=A.device)
    launch_on_gpu(A, B, C.contiguous(), _packed(scaling_factor), precision, out)
    return out


@functools.lru_cache(maxsize=256)
def _packed(scaling_factor: float) -> PackedEpilogue:
    epilogue = SigmoidScaleResidual(scaling_factor)
    return PackedEpilogue(epilogue.code(), epilogue.pack({}))


def _fake(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, scaling_factor: float, precision: str | None = None
) -> torch.Tensor:
    _check(A, B, C, scaling_factor, precision)
    return torch.empty((A.shape[0], B.shape[0]), dtype=A.dtype, device=A.device)


def _setup_context(
    ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, str | None], output: torch.Tensor
) -> None:
    A, B, C, ctx.scaling_factor, _ = inputs
    ctx.save_for_backward(A, B, C)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients, with dy/dz in float32 for the 16-bit types."""
    A, B, C = ctx.saved_tensors
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    z = torch.addmm(C, A, B.t()).to(wide)
    grad_z_wide = grad.to(wide) * SigmoidScaleResidual.derivative_at(z, ctx.scaling_factor)
    grad_z = grad_z_wide.to(A.dtype)
    needs_A, needs_B, needs_C = ctx.needs_input_grad[:3]
    return (
        grad_z @ B if needs_A else None,
        grad_z.t() @ A if needs_B else None,
        grad_z_wide.sum(0).to(C.dtype) if needs_C else None,
        None,
        None,
    )


torch.library.impl(_NAME, "CPU", _cpu)
torch.library.impl(_NAME, "CUDA", _cuda)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
