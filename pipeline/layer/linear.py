"""The fused layer with its weights: its formula and reference, and one in-memory batch of it."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import (
    HostArray,
    empty_like,
    host_tensor,
    host_view,
    is_cuda,
    is_torch,
    shape_of,
    to_float64,
)
from pipeline.dtypes import DType, parse_dtype, parse_precision
from pipeline.epilogues.base import Epilogue
from pipeline.epilogues.sigmoid_scale_residual import SigmoidScaleResidual, check_scaling_factor
from pipeline.errors import DTypeError, InputError, OptionError, ShapeError
from pipeline.layer.base import DeviceLayer, Layer, Place
from pipeline.layer.checks import check_gpu_out, check_out, check_rows, check_weights
from pipeline.layer.host import HostLayer, HostWeights
from pipeline.layer.weights_file import read_weights

if TYPE_CHECKING:
    import torch

    from pipeline.kernels.launch import PreparedLaunch
    from pipeline.layer.gpu import ScratchLaunch, TensorWeights

_FIXED = ("weight", "bias", "dtype", "precision", "in_features", "out_features")  # once a layer is made
_MAX_LAUNCHES = 1024  # prepared ones that a layer keeps


class FusedLinear(Layer):
    """The fused layer with its weights: `y = epilogue(z)`, `z = x @ weight.T + bias`.

    Args:
        weight: (out_features, in_features), NumPy array or torch tensor; float32, bfloat16, float16, or float64
            (CPU only).
        bias: (out_features,) of the weight's element type, or None for no bias.
        scaling_factor: short for `epilogue=SigmoidScaleResidual(scaling_factor)`, which makes the layer
            `y = scaling_factor * sigmoid(z) + z`: one finite number.
        epilogue: what follows the product in the same kernel, in fp32.
        precision: for float32 weights "fp32" (the default: fp32 accuracy, on Hopper GPUs from fp16 tensor cores),
            "ieee" (float32 FMA on CUDA cores) or "tf32" (tensor cores, about 2e-4 relative); other types have one
            precision of their own. Reports say which ran.

    The weights are a snapshot: memory is shared with the caller's arrays where their layout allows, so don't change
    those while the layer lives.

    Raises:
        ShapeError, DTypeError, OptionError: for the arguments above.
    """

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        scaling_factor: float = 1.0,
        *,
        epilogue: Epilogue | None = None,
        precision: str | None = None,
    ) -> None:
        expected = "a NumPy array or a torch tensor; FusedLinear.from_file reads files, from_linear takes a Linear"
        check_weights(shape_of(weight, "weight", expected), None if bias is None else shape_of(bias, "bias", expected))
        self._epilogue = _chosen_epilogue(scaling_factor, epilogue)
        self.weight, dtype = _own_weights(weight, "weight")
        own_bias, bias_dtype = (None, dtype) if bias is None else _own_weights(bias, "bias")
        self.bias: HostArray | None = own_bias
        if bias_dtype is not dtype:
            raise DTypeError(f"bias is {bias_dtype}, the weight is {dtype}: convert one of them")
        out_features, in_features = self.weight.shape
        super().__init__(in_features, out_features, dtype, precision)
        self.epilogue.check(out_features)
        self._lock = threading.Lock()
        self._host_weights: HostWeights | None = None
        self._gpu_weights: dict[int, TensorWeights] = {}
        self._launches: dict[tuple[Any, ...], PreparedLaunch | ScratchLaunch | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The weights and options, for pickle and copy; the caches of devices are made again."""
        return {**self.__dict__, "_lock": None, "_host_weights": None, "_gpu_weights": {}, "_launches": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"a FusedLinear's {name} can't be set, since devices hold copies of its weights; make a new FusedLinear"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        epilogue = self.epilogue
        short = isinstance(epilogue, SigmoidScaleResidual)
        return (
            f"FusedLinear({self.in_features} -> {self.out_features}, {self.dtype}, bias={self.bias is not None}, "
            f"{f'scaling_factor={self.scaling_factor}' if short else f'epilogue={epilogue!r}'}, "
            f"precision={self.precision!r})"
        )

    @property
    def epilogue(self) -> Epilogue:
        """What is made of z. Another one may be set: later calls have it, an open Pipeline keeps what it began with."""
        return self._epilogue

    @epilogue.setter
    def epilogue(self, epilogue: Epilogue) -> None:
        chosen = _chosen_epilogue(1.0, epilogue)
        chosen.check(self.out_features)
        with self._lock:
            self._epilogue = chosen
            self._host_weights, self._gpu_weights, self._launches = None, {}, {}

    @property
    def scaling_factor(self) -> float:
        """That of the epilogue SigmoidScaleResidual; setting it sets such an epilogue.

        Raises:
            AttributeError: the layer has another epilogue.
        """
        if not isinstance(self.epilogue, SigmoidScaleResidual):
            raise AttributeError(f"a layer with the epilogue {self.epilogue.name} has no scaling_factor")
        return self.epilogue.scaling_factor

    @scaling_factor.setter
    def scaling_factor(self, value: float) -> None:
        self.epilogue = SigmoidScaleResidual(check_scaling_factor(value))

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        scaling_factor: float = 1.0,
        *,
        epilogue: Epilogue | None = None,
        precision: str | None = None,
    ) -> FusedLinear:
        """The layer with a `torch.nn.Linear`'s weight and bias (copied to the host if they are on a GPU).

        Raises:
            InputError: something without them.
        """
        if not (hasattr(linear, "weight") and hasattr(linear, "bias")):
            raise InputError(
                f"linear is a {type(linear).__name__}, expected a torch.nn.Linear; FusedLinear(weight, bias) takes "
                f"arrays and tensors"
            )
        return cls(linear.weight, linear.bias, scaling_factor, epilogue=epilogue, precision=precision)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        scaling_factor: float = 1.0,
        *,
        epilogue: Epilogue | None = None,
        precision: str | None = None,
    ) -> FusedLinear:
        """The layer with the tensors `weight` and, if there, `bias` of a .safetensors file.

        Both names may stand behind one prefix such as `gemm.`. The weights are read-only maps of the file, which is
        read when they are first used, and nothing is copied: replace the file while the layer lives if you must (a new
        file under its name leaves the old one to the layer), but don't write to it or cut it short. Pickled and copied
        deeply, the layer has arrays of its own.

        Raises:
            FileFormatError: not a safetensors file, or no such tensors, or several candidates.
            FileNotFoundError, PermissionError: no such file, or one that can't be read.
            ShapeError, DTypeError: the tensors make no layer.
        """
        try:
            weight, bias = read_weights(path)
            return cls(weight, bias, scaling_factor, epilogue=epilogue, precision=precision)
        except (ShapeError, DTypeError) as error:
            error.add_note(f"pipeline: in {path}")
            raise

    def state(self) -> tuple[Any, ...]:
        return self.weight, self.bias, self.epilogue, self.dtype, self.precision

    def rounded_to(self, dtype: DType, narrow: Callable[[HostArray], HostArray]) -> FusedLinear:
        """The same layer with weight and bias in another element type; `narrow` rounds an array to its carrier."""
        other = copy.copy(self)
        bias = None if self.bias is None else narrow(self.bias[None])[0]
        precision = parse_precision(None, dtype)
        other.__dict__.update(weight=narrow(self.weight), bias=bias, dtype=dtype, precision=precision)
        return other

    def reference(self, x: Any) -> npt.NDArray[np.float64]:
        """The layer of x (rows, in_features) in float64 NumPy: the one definition of right."""
        check_rows(shape_of(x, "x"), self.in_features)
        weight, bias = self.weight, self.bias
        if self.dtype.widen is not None:
            weight, bias = self.dtype.widen(weight), None if bias is None else self.dtype.widen(bias)
        z = to_float64(x, "x") @ to_float64(weight, "weight").T
        if bias is not None:
            z += to_float64(bias, "bias")
        return self.epilogue.numpy(z)

    def on(self, place: Place, out_dtype: DType, chunk_rows: int) -> DeviceLayer:
        """The layer at a place: see `Layer.on`."""
        if place.kind == "host":
            return HostLayer(self.host_weights(), self.dtype, out_dtype)
        if place.kind == "cuda":
            from pipeline.layer.gpu import GpuLayer

            return GpuLayer(self, place, out_dtype, chunk_rows)
        raise OptionError(f"a FusedLinear can't be computed at a place of the kind {place.kind!r}")

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
        if is_cuda(x):
            return self._call_gpu(x, out)
        expected = "a NumPy array or a torch tensor; run_pipelined takes files and iterables"
        check_rows(shape_of(x, "x", expected), self.in_features)
        array, dtype = host_view(x, "x")
        self.check_dtype(dtype)
        if out is None:
            out = empty_like(x, (array.shape[0], self.out_features))
        elif not (is_torch(out) or isinstance(out, np.ndarray)):
            raise OptionError(f"out is a {type(out).__name__}, expected a NumPy array or a torch CPU tensor")
        out_array, out_dtype = host_view(out, "out", "pass one of these")
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
        self.host_weights().forward(host_tensor(native, dtype), host_tensor(y, out_dtype))
        np.copyto(out_array, y)
        return out

    def _call_gpu(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        import torch

        # In a loop over the same buffers all checks and preparations are done once: what they depend on is in `key`.
        key: tuple[Any, ...] = ()
        if isinstance(out, torch.Tensor):
            x_layout = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.get_device())
            out_layout = (out.data_ptr(), out.shape, out.stride(), out.dtype, out.get_device())
            key = (x_layout, out_layout, self.epilogue, self.precision)
            launch = self._launches.get(key)
            if launch is not None:
                launch.queue(torch.cuda.current_stream(x_layout[-1]).cuda_stream)
                return out
        check_rows(tuple(x.shape), self.in_features)
        self.check_dtype(parse_dtype(x.dtype, "x dtype"))
        if out is None:
            out = torch.empty((x.shape[0], self.out_features), dtype=x.dtype, device=x.device)
        else:
            check_gpu_out(x, out, self.out_features)
        from pipeline.layer.gpu import rows_for_kernel  # after the fast way out above

        weights = self.gpu_weights(x.device.index)
        with torch.cuda.device(x.device.index):  # for the copies that torch makes
            rows = rows_for_kernel(x.detach())
            launch = weights.prepare(rows, out)
            if launch is not None:
                launch.queue(torch.cuda.current_stream(x.device.index).cuda_stream)
        if key and rows.data_ptr() == x.data_ptr():
            if len(self._launches) >= _MAX_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
        return out

    def host_weights(self) -> HostWeights:
        """The weights as the CPU computes with them, made once."""
        with self._lock:
            if self._host_weights is None:
                bias = None if self.bias is None else host_tensor(self.bias, self.dtype)
                self._host_weights = HostWeights(host_tensor(self.weight, self.dtype), bias, self.epilogue)
            return self._host_weights

    def gpu_weights(self, ordinal: int) -> TensorWeights:
        """The weights on GPU `ordinal`, made once."""
        import torch

        from pipeline.layer.gpu import TensorWeights, pack_epilogue, rows_for_kernel

        with self._lock:
            if ordinal not in self._gpu_weights:
                with torch.cuda.device(ordinal):
                    bias = None if self.bias is None else host_tensor(self.bias, self.dtype).cuda(ordinal)
                    weight = rows_for_kernel(host_tensor(self.weight, self.dtype).cuda(ordinal))
                    epilogue = pack_epilogue(self.epilogue, ordinal)
                    self._gpu_weights[ordinal] = TensorWeights(weight, bias, epilogue, self.precision)
                torch.cuda.current_stream(ordinal).synchronize()  # later calls may use other streams
            return self._gpu_weights[ordinal]


def _chosen_epilogue(scaling_factor: Any, epilogue: Any) -> Epilogue:
    """The epilogue that a layer was given, by itself or by its scaling factor.

    Raises:
        OptionError: it isn't one, or both were given.
    """
    if epilogue is None:
        return SigmoidScaleResidual(check_scaling_factor(scaling_factor))
    if not isinstance(epilogue, Epilogue):
        what = f"the class {epilogue.__name__}" if isinstance(epilogue, type) else f"a {type(epilogue).__name__}"
        raise OptionError(f"epilogue is {what}, expected an object such as SigmoidScaleResidual(2.0)")
    if check_scaling_factor(scaling_factor) != 1.0:
        raise OptionError(
            f"scaling_factor is {scaling_factor} beside an epilogue ({epilogue.name}): it is short for "
            f"epilogue=SigmoidScaleResidual({scaling_factor}), pass one of them"
        )
    return epilogue


def _own_weights(value: Any, what: str) -> tuple[HostArray, DType]:
    array, dtype = host_view(value.detach().cpu() if is_torch(value) else value, what)
    return np.ascontiguousarray(array, dtype.carrier), dtype
