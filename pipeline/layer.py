"""What is computed: the fused layer with its weights, its float64 reference, and one in-memory batch of it.

For x (rows, in_features), W (out_features, in_features), b (out_features,):

    z = x @ W.T + b
    y = scaling_factor * sigmoid(z) + z          y (rows, out_features)
"""

from __future__ import annotations

import math
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DTYPES, FLOAT64, DType, parse_dtype, parse_precision
from pipeline.errors import DTypeError, FileFormatError, OptionError, ShapeError

if TYPE_CHECKING:
    import torch

HostArray = npt.NDArray[Any]

# Rows are computed on the CPU at their place on this grid, with zero rows filling up both ends, so that a row's bits
# don't depend on the rows beside it. BLAS libraries change them with the row count: MKL's float32 product in tiles
# that aren't full (multiples of 4), its float64 product where it splits the sum (up to 64 rows and 32 columns) and
# where rows don't start at a cache line.
CPU_ROW_GRID = 64
_CPU_MIN_FEATURES = 64  # narrower weights get zero output features, for the same reason
_CPU_BLOCK_ROWS = 512  # rows of one matrix product on the CPU: bounds the memory of the float32 intermediate


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch tensor, without importing torch."""
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(value).__mro__)


def is_cuda(value: Any) -> bool:
    return is_torch(value) and bool(value.is_cuda)


def host_view(value: Any, what: str) -> tuple[HostArray, DType]:
    """A NumPy view of a host array or CPU tensor in its carrier type, and the element type it stands for.

    Nothing is copied: strides and byte order are the caller's.

    Raises:
        DTypeError: object, integer, complex or any other unsupported element type; a sparse or quantized tensor, a
            lazily negated one, or a masked array.
    """
    if is_torch(value):
        import torch

        if value.layout != torch.strided or value.is_quantized:
            raise DTypeError(f"{what} is a {value.layout} tensor, expected a dense one; use .to_dense() first")
        if value.device.type != "cpu":
            raise DTypeError(f"{what} is on {value.device}, expected a host tensor; use .cpu() first")
        if value.is_neg():
            raise DTypeError(f"{what} is a view that torch negates when it is read; use .resolve_neg() first")
        dtype = parse_dtype(value.dtype, f"{what} dtype")
        tensor = value.detach()
        return (tensor.view(torch.uint16) if dtype.name == "bfloat16" else tensor).numpy(), dtype
    array = np.asanyarray(value)
    if isinstance(array, np.ma.MaskedArray):
        raise DTypeError(f"{what} is a masked array, its mask would be lost; use .filled() first")
    if array.dtype.name == "bfloat16":  # the ml_dtypes package's type
        return array.view(DTYPES["bfloat16"].carrier), DTYPES["bfloat16"]
    dtype = parse_dtype(array.dtype.newbyteorder("="), f"{what} dtype")
    return array, dtype


def host_tensor(array: HostArray, dtype: DType) -> torch.Tensor:
    """A torch view of a native-endian host array in its carrier type.

    Copied where torch can't view it: read-only memory, and strides that are negative or cut through elements.
    """
    import torch

    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    tensor = torch.from_numpy(np.require(array, requirements="W"))
    return tensor.view(torch.bfloat16) if dtype.name == "bfloat16" else tensor


def to_float64(value: Any, what: str = "array") -> npt.NDArray[np.float64]:
    """A float64 NumPy copy of a host array, CPU tensor or CUDA tensor of any supported element type."""
    if is_torch(value):
        return np.asarray(value.detach().cpu().double().numpy())
    array, dtype = host_view(value, what)
    if dtype.name == "bfloat16":
        array = _widen_bfloat16(array)
    return array.astype(np.float64)


def reference(x: Any, weight: Any, bias: Any, scaling_factor: float) -> npt.NDArray[np.float64]:
    """The layer in float64 NumPy: the one definition of right. Shapes as above; bias may be None."""
    z = to_float64(x, "x") @ to_float64(weight, "weight").T
    if bias is not None:
        z += to_float64(bias, "bias")
    return sigmoid_scale_add(z, scaling_factor)


def check_scaling_factor(value: Any) -> float:
    """`value` as a float.

    Raises:
        OptionError: not a number, NaN or infinite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"scaling_factor is {value!r}, expected one finite number") from None
    if not math.isfinite(number):
        raise OptionError(f"scaling_factor is {number}, expected a finite number: every result would be lost")
    return number


def check_rows(shape: tuple[int, ...], in_features: int, what: str = "x") -> None:
    """Raises:
    ShapeError: `shape` isn't (rows, in_features).
    """
    if len(shape) != 2:
        raise ShapeError(
            f"{what} has shape {tuple(shape)}, expected 2 dimensions (rows, {in_features}); "
            f"reshape it first, for example {what}.reshape(-1, {in_features})"
        )
    if shape[1] != in_features:
        raise ShapeError(
            f"{what} has {shape[1]} features a row (shape {tuple(shape)}), the layer's weight takes {in_features}"
        )


def check_weights(
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    *,
    weight: str = "weight",
    bias: str = "the bias",
) -> None:
    """`weight` and `bias` are what messages call them.

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
        raise ShapeError(
            f"{bias} has shape {tuple(bias_shape)}, expected ({weight_shape[0]},): one value an output feature{hint}"
        )


def sigmoid_scale_add(z: HostArray, scaling_factor: float) -> HostArray:
    """scaling_factor * sigmoid(z) + z, in z's element type.

    NumPy, because its exp gives an element the same bits wherever it stands; torch's vector and scalar code differ.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        y = np.exp(-z)
        y += 1
        np.divide(scaling_factor, y, out=y)
        y += z
    return y


class HostWeights:
    """The layer's weights as the CPU computes with them: float64 for float64 data, float32 for all else."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        import torch

        self.compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.out_features = weight.shape[0]
        weight = weight.detach().to(self.compute_dtype)
        bias = None if bias is None else bias.detach().to(self.compute_dtype)
        narrow = _CPU_MIN_FEATURES - self.out_features
        if narrow > 0:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, narrow))
            bias = None if bias is None else torch.nn.functional.pad(bias, (0, narrow))
        self.transposed, self.bias = weight.t(), bias

    def forward(self, x: torch.Tensor, out: torch.Tensor, scaling_factor: float, first_row: int = 0) -> None:
        """out[:] = layer(x), rounded once. `first_row` is the row's number in its dataset (see CPU_ROW_GRID).

        x (rows, in_features), out (rows, out_features): CPU tensors of any strides and element types.
        """
        import torch

        rows, lead = x.shape[0], first_row % CPU_ROW_GRID
        for start in range(-lead, rows, _CPU_BLOCK_ROWS):
            stop = min(start + _CPU_BLOCK_ROWS, rows)
            first = max(start, 0)
            block_rows = -(-(stop - start) // CPU_ROW_GRID) * CPU_ROW_GRID
            block = x[first:stop]
            in_place = block.dtype == self.compute_dtype and block.is_contiguous() and block.data_ptr() % 64 == 0
            if block_rows != stop - first or not in_place:
                block = torch.zeros(block_rows, x.shape[1], dtype=self.compute_dtype, device="cpu")
                block[first - start : stop - start] = x[first:stop]
            with torch.autocast("cpu", enabled=False):  # the caller's autocast would round z
                if self.bias is None:
                    z = block @ self.transposed
                else:
                    z = torch.addmm(self.bias, block, self.transposed)
            z = z[first - start : stop - start, : self.out_features]
            out[first:stop] = torch.from_numpy(sigmoid_scale_add(z.numpy(), scaling_factor))


def launch_on_gpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scaling_factor: float,
    precision: str,
    out: torch.Tensor,
) -> None:
    """Queue the fused kernel on the caller's current CUDA stream: out[:] = layer(x). Returns before it has run.

    All tensors on one GPU; `x` and `out` may have any row stride, `weight` and `bias` are contiguous.
    """
    import torch

    from pipeline.kernels.launch import Launcher
    from pipeline.kernels.select import Problem

    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    ordinal = x.device.index
    problem = Problem(parse_dtype(x.dtype), parse_dtype(out.dtype), precision, weight.shape[1], weight.shape[0])
    with torch.cuda.device(ordinal):  # the launcher makes this GPU current; the caller's comes back
        Launcher.for_device(ordinal).launch(
            torch.cuda.current_stream(ordinal).cuda_stream,
            problem,
            rows=x.shape[0],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            w=weight.data_ptr(),
            w_stride=weight.stride(0),
            bias=0 if bias is None else bias.data_ptr(),
            y=out.data_ptr(),
            y_stride=out.stride(0),
            scaling_factor=scaling_factor,
        )


class FusedLinear:
    """The fused layer with its weights: `y = scaling_factor * sigmoid(z) + z`, `z = x @ weight.T + bias`.

    Args:
        weight: (out_features, in_features), NumPy array or torch tensor; float32, bfloat16, float16, or float64
            (CPU only).
        bias: (out_features,) of the weight's element type, or None for no bias.
        scaling_factor: one finite number.
        precision: for float32 weights "fp32" (the default), "ieee" (float32 FMA on CUDA cores) or "tf32" (tensor
            cores, about 2e-4 relative); other types have one precision of their own. Until the split-operand kernel
            exists "fp32" runs as "ieee"; reports say which ran.

    The weights are a snapshot: memory is shared with the caller's arrays where their layout allows, so don't change
    those while the layer lives.

    Raises:
        ShapeError, DTypeError, OptionError: for the arguments above.
    """

    def __init__(
        self, weight: Any, bias: Any = None, scaling_factor: float = 1.0, *, precision: str | None = None
    ) -> None:
        check_weights(tuple(np.shape(weight)), None if bias is None else tuple(np.shape(bias)))
        self.scaling_factor = check_scaling_factor(scaling_factor)
        self.weight, self.dtype = _own_weights(weight, "weight")
        self.bias: HostArray | None = None
        if bias is not None:
            self.bias, bias_dtype = _own_weights(bias, "bias")
            if bias_dtype is not self.dtype:
                raise DTypeError(f"bias is {bias_dtype}, the weight is {self.dtype}: convert one of them")
        self.precision = parse_precision(precision, self.dtype)
        self.out_features, self.in_features = self.weight.shape
        self._lock = threading.Lock()
        self._host_weights: HostWeights | None = None
        self._gpu_weights: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The weights and options, for pickle and copy; the caches of devices are made again."""
        return {**self.__dict__, "_lock": None, "_host_weights": None, "_gpu_weights": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        return (
            f"FusedLinear({self.in_features} -> {self.out_features}, {self.dtype}, bias={self.bias is not None}, "
            f"scaling_factor={self.scaling_factor}, precision={self.precision!r})"
        )

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, scaling_factor: float = 1.0, *, precision: str | None = None
    ) -> FusedLinear:
        """The layer with a `torch.nn.Linear`'s weight and bias (copied to the host if they are on a GPU)."""
        return cls(linear.weight, linear.bias, scaling_factor, precision=precision)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], scaling_factor: float = 1.0, *, precision: str | None = None
    ) -> FusedLinear:
        """The layer with the tensors `weight` and, if there, `bias` of a .safetensors file.

        Both names may stand behind one prefix such as `gemm.`.

        Raises:
            FileFormatError: not a safetensors file, or no such tensors, or several candidates.
            FileNotFoundError: no such file.
        """
        weight, bias = _read_safetensors(path)
        return cls(weight, bias, scaling_factor, precision=precision)

    def reference(self, x: Any) -> npt.NDArray[np.float64]:
        """The layer of x (rows, in_features) in float64 NumPy: the one definition of right."""
        check_rows(tuple(np.shape(x)), self.in_features)
        weight, bias = self.weight, self.bias
        if self.dtype.name == "bfloat16":
            weight, bias = _widen_bfloat16(weight), None if bias is None else _widen_bfloat16(bias)
        return reference(x, weight, bias, self.scaling_factor)

    def __call__(self, x: Any, *, out: Any = None) -> Any:
        """The layer of one in-memory batch, computed where the batch is.

        Args:
            x: (rows, in_features) of the layer's element type, any strides. A NumPy array or CPU tensor is computed
                on the CPU, and the call returns when it is done. For a CUDA tensor the kernel is queued on the
                caller's current stream, and the call returns at once.
            out: where to write, (rows, out_features) on the same device, of any supported element type (the
                rounding happens once, at the end); a CUDA tensor's rows must be contiguous. Default: a new array or
                tensor of x's kind and element type.

        Returns:
            `out`, or the new array or tensor.

        Raises:
            ShapeError, DTypeError, OptionError: `x` or `out` doesn't fit the layer, or they overlap.
        """
        check_rows(tuple(np.shape(x)), self.in_features)
        if is_cuda(x):
            return self._call_gpu(x, out)
        array, dtype = host_view(x, "x")
        self.check_dtype(dtype)
        if out is None:
            out = _empty_like(x, (array.shape[0], self.out_features))
        elif not (is_torch(out) or isinstance(out, np.ndarray)):
            raise OptionError(f"out is a {type(out).__name__}, expected a NumPy array or a torch CPU tensor")
        out_array, out_dtype = host_view(out, "out")
        check_out(out_array.shape, (array.shape[0], self.out_features))
        if not out_array.flags.writeable:
            raise OptionError("out is read-only; pass an array that can be written")
        strides = zip(out_array.strides, out_array.shape, strict=True)
        if out_array.size and any(stride == 0 and size > 1 for stride, size in strides):
            raise OptionError(f"out has strides {out_array.strides} bytes: its elements overlap each other")
        if np.may_share_memory(array, out_array):
            raise OptionError("out overlaps x; pass other memory, the layer can't run in place")
        native = array if array.dtype.isnative else array.astype(dtype.carrier)
        y = np.empty(out_array.shape, out_dtype.carrier)
        self.host_weights().forward(host_tensor(native, dtype), host_tensor(y, out_dtype), self.scaling_factor)
        np.copyto(out_array, y)
        return out

    def _call_gpu(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        import torch

        self.check_dtype(parse_dtype(x.dtype, "x dtype"))
        if out is None:
            out = torch.empty((x.shape[0], self.out_features), dtype=x.dtype, device=x.device)
        else:
            check_gpu_out(x, out, self.out_features)
        weight, bias = self.gpu_weights(x.device.index)
        launch_on_gpu(x.detach(), weight, bias, self.scaling_factor, self.precision, out)
        return out

    def check_dtype(self, dtype: DType, what: str = "x") -> None:
        """Raises:
        DTypeError: `dtype` isn't the layer's.
        """
        if dtype is not self.dtype:
            raise DTypeError(
                f"{what} is {dtype}, the layer's weights are {self.dtype}: convert one, for example with "
                f".astype('{self.dtype}') in NumPy or .to(torch.{self.dtype}) in torch"
            )

    def host_weights(self) -> HostWeights:
        """The weights as the CPU computes with them, made once."""
        with self._lock:
            if self._host_weights is None:
                bias = None if self.bias is None else host_tensor(self.bias, self.dtype)
                self._host_weights = HostWeights(host_tensor(self.weight, self.dtype), bias)
            return self._host_weights

    def gpu_weights(self, ordinal: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weights as tensors on GPU `ordinal`, copied there once."""
        with self._lock:
            if ordinal not in self._gpu_weights:
                bias = None if self.bias is None else host_tensor(self.bias, self.dtype).cuda(ordinal)
                self._gpu_weights[ordinal] = (host_tensor(self.weight, self.dtype).cuda(ordinal), bias)
            return self._gpu_weights[ordinal]


def check_out(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Raises:
    ShapeError: an output's shape isn't the expected one.
    """
    if tuple(shape) != expected:
        raise ShapeError(
            f"out has shape {tuple(shape)}, expected {expected}: one row a source row, (rows, out_features)"
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
    if parse_dtype(out.dtype, "out dtype") is FLOAT64:
        raise DTypeError("out is float64, which only the CPU computes; pass float32, bfloat16 or float16")
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise OptionError(f"out has strides {out.stride()}, expected contiguous rows (the last stride 1)")
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise OptionError(f"out has strides {out.stride()}: its rows overlap each other")
    if overlaps(byte_range(x), byte_range(out)):
        raise OptionError("out overlaps x; pass other memory, the layer can't run in place")


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and the one after the last that a torch tensor's elements take up."""
    if tensor.numel() == 0:
        return (tensor.data_ptr(), tensor.data_ptr())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def overlaps(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two address ranges share a byte."""
    return a[0] < b[1] and b[0] < a[1]


def _own_weights(value: Any, what: str) -> tuple[HostArray, DType]:
    array, dtype = host_view(value.detach().cpu() if is_torch(value) else value, what)
    return np.ascontiguousarray(array, dtype.carrier), dtype


def _widen_bfloat16(carrier: HostArray) -> HostArray:
    return np.asarray((carrier.astype(np.uint32) << 16).view(np.float32))


def _empty_like(x: Any, shape: tuple[int, int]) -> Any:
    if is_torch(x):
        import torch

        return torch.empty(shape, dtype=x.dtype, device=x.device)
    return np.empty(shape, np.asanyarray(x).dtype.newbyteorder("="))


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(path):
        raise FileFormatError(f"{path} is a directory, expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = [name for name in names if name == "weight" or name.endswith(".weight")]
            if len(found) != 1:
                raise FileFormatError(
                    f"{path} holds the tensors {', '.join(sorted(names)[:8]) or '(none)'}, expected exactly one called "
                    f"'weight' or '<prefix>.weight' (found {len(found)}); save the layer alone in a file"
                )
            bias_name = found[0].removesuffix("weight") + "bias"
            return file.get_tensor(found[0]), file.get_tensor(bias_name) if bias_name in names else None
    except SafetensorError as error:
        raise FileFormatError(f"{path} isn't a readable .safetensors file: {error}") from error
