"""What an epilogue says about itself: its parameters, its CUDA source, and the same function in NumPy and torch.

    class ScaledShift(Epilogue):
        scale: float
        shift: ByFeature
        cuda = "return parameters.scale * z + parameters.shift[column];"

        def numpy(self, z):
            return self.scale * z + self.shift

        torch = numpy

    FusedLinear(weight, bias, epilogue=ScaledShift(2.0, shift))

Parameters are declared as the fields of a dataclass, which a subclass becomes by itself. Their kinds:

    float      one finite number; in CUDA `float`
    ByFeature  one number for each output feature, (out_features,); in CUDA `[column]` gives it

Kernels take parameters as fp32. Epilogues of one class share their compiled kernels, whatever their parameters.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, dataclass_transform

import numpy as np

from pipeline.arrays import HostArray, host_tensor, host_view, is_torch
from pipeline.dtypes import FLOAT32
from pipeline.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as TorchDType  # not torch.dtype: a class here has an attribute called torch

ByFeature: TypeAlias = Any
"""The kind of a parameter with one value for each output feature: an array or a tensor, (out_features,), of any
supported element type. Kept as float32."""


class _Kind(NamedTuple):
    """A kind of parameter: its type in CUDA and that one's host twin."""

    cuda: str
    twin: Any


class _Parameters(ctypes.Structure):
    """The base of packed parameters: objects that differ from each other whatever they hold, so that prepared launches
    can be remembered by them."""

    def __hash__(self) -> int:
        return id(self)


class _Vector(ctypes.Structure):
    """The host twin of epilogue::ByFeature (csrc/gpu/epilogue.cuh)."""

    _fields_ = (("values", ctypes.c_void_p), ("last", ctypes.c_int))


_KINDS = {"float": _Kind("float", ctypes.c_float), "ByFeature": _Kind("ByFeature", _Vector)}


@dataclass(frozen=True, eq=False)
class EpilogueCode:
    """What kernels are compiled with: one object for each class of epilogues.

    `source` is C++ that defines epilogue::Parameters, epilogue::Exact and epilogue::Fast (csrc/gpu/epilogue.cuh).
    `parameters` is the host twin of the first: a ctypes structure.
    """

    name: str
    source: str
    parameters: type[ctypes.Structure]


@dataclass_transform(frozen_default=True, eq_default=False)
class Epilogue(ABC):
    """A function of z = x @ W.T + b, element by element, which the kernel applies before it rounds to y's type.

    Attributes of a subclass:
        name: for messages and reports; the class's name by default.
        cuda: the body of a C++ function that returns y, a float. It sees `z` (float), `row` and `column` (of y, int)
            and `parameters`, whose fields are named as here. For kernels that promise fp32 accuracy.
        cuda_fast: the same for kernels whose operands are rounded to tf32, bf16 or fp16 anyway; `cuda` by default.
        any_threads: an element's bits from `write` don't depend on how many threads torch uses.

    Raises:
        OptionError: a parameter that isn't a finite number, or of a kind that isn't supported.
        ShapeError: a parameter by feature that isn't a vector.
    """

    name: ClassVar[str]
    cuda: ClassVar[str] = ""
    cuda_fast: ClassVar[str] = ""
    any_threads: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__dict__.get("name", cls.__name__)
        dataclass(frozen=True, eq=False)(cls)

    def __post_init__(self) -> None:
        for name, kind in self._kinds().items():
            parse = finite_number if kind == "float" else _vector
            object.__setattr__(self, name, parse(getattr(self, name), name))

    # -- the function ------------------------------------------------------------------------------------------------

    @abstractmethod
    def numpy(self, z: HostArray) -> HostArray:
        """y for z (rows, out_features) in z's element type, float64: the definition of right."""

    @abstractmethod
    def torch(self, z: Tensor) -> Tensor:
        """y for z (rows, features), of z's element type. Parameters by feature are tensors like z here, of as many
        features."""

    def write(self, z: Tensor, out: Tensor, scratch: Tensor) -> None:
        """out[:] = y for z; both contiguous and of one element type. `out` may be z; `scratch` is free memory, 1-D and
        of at least as many elements."""
        out.copy_(self.torch(z))

    def derivative(self, z: Tensor) -> Tensor:
        """dy/dz for z, by autograd from `torch`. It can be differentiated where z requires a gradient."""
        import torch

        with torch.enable_grad():
            leaf = z if z.requires_grad else z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.torch(leaf).sum(), leaf, create_graph=z.requires_grad)
        return slope

    # -- its parameters ----------------------------------------------------------------------------------------------

    @classmethod
    def _kinds(cls) -> dict[str, str]:
        """The kind of each parameter: a key of _KINDS.

        Raises:
            OptionError: none of them.
        """
        kinds = {}
        for field in fields(cls):  # type: ignore[arg-type]  # a dataclass: see __init_subclass__
            text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            kind = "ByFeature" if field.type is ByFeature else text.rpartition(".")[2]
            if kind not in _KINDS:
                raise OptionError(
                    f"{cls.name}.{field.name} is of the kind {kind}, which epilogues don't have yet; expected one of "
                    f"{', '.join(_KINDS)}"
                )
            kinds[field.name] = kind
        return kinds

    def by_feature(self) -> dict[str, HostArray]:
        """The parameters with a value for each output feature, as contiguous float32 arrays."""
        return {name: getattr(self, name) for name, kind in self._kinds().items() if kind == "ByFeature"}

    def check(self, out_features: int) -> None:
        """Check the parameters against a layer.

        Raises:
            ShapeError: a parameter by feature of another length.
        """
        for name, vector in self.by_feature().items():
            if vector.shape != (out_features,):
                raise ShapeError(
                    f"{self.name}.{name} has shape {vector.shape}, expected ({out_features},): one value an output "
                    f"feature"
                )

    def on_columns(self, columns: slice, dtype: TorchDType) -> Epilogue:
        """This epilogue for some columns of z, for `torch` and `write` on the CPU: its parameters by feature are
        tensors. Columns past the last have zeros."""
        vectors = self.by_feature()
        if not vectors:
            return self
        part = copy.copy(self)
        for name, vector in vectors.items():
            values = np.zeros(columns.stop - columns.start, np.float32)
            values[: max(0, len(vector) - columns.start)] = vector[columns]
            object.__setattr__(part, name, host_tensor(values, FLOAT32).to(dtype))
        return part

    # -- its kernels -------------------------------------------------------------------------------------------------

    @classmethod
    def code(cls) -> EpilogueCode:
        """What kernels are compiled with.

        Raises:
            OptionError: there is no CUDA source.
        """
        return _code(cls)

    def pack(self, addresses: Mapping[str, int]) -> ctypes.Structure:
        """The parameters as kernels take them; `addresses` are those of the parameters by feature in device memory."""
        values = {name: getattr(self, name) for name, kind in self._kinds().items() if kind == "float"}
        vectors = {name: _Vector(addresses[name], len(vector) - 1) for name, vector in self.by_feature().items()}
        return self.code().parameters(**values, **vectors)


@functools.cache
def _code(cls: type[Epilogue]) -> EpilogueCode:
    if not cls.cuda:
        raise OptionError(f"epilogue {cls.name} has no CUDA source (its attribute `cuda`); use devices='cpu'")
    kinds = cls._kinds()
    # A structure without fields would have no byte in C, where it has one.
    twins: list[tuple[str, Any]] = [(name, _KINDS[kind].twin) for name, kind in kinds.items()]
    parameters = type("Parameters", (_Parameters,), {"_fields_": twins or [("none", ctypes.c_int)]})
    members = "\n".join(f"  {_KINDS[kind].cuda} {name};" for name, kind in kinds.items()) or "  int none;"
    functors = [_FUNCTOR.format(name="Exact", body=cls.cuda.strip())]
    functors.append(
        _FUNCTOR.format(name="Fast", body=cls.cuda_fast.strip()) if cls.cuda_fast else "using Fast = Exact;"
    )
    source = _SOURCE.format(
        members=members, functors="\n".join(functors), n_bytes=ctypes.sizeof(parameters), name=cls.__name__
    )
    return EpilogueCode(cls.name, source, parameters)


_FUNCTOR = """\
struct {name} {{
  using Parameters = epilogue::Parameters;
  Parameters parameters;
  __device__ __forceinline__ float operator()(float z, int row, int column) const {{
    {body}
  }}
}};"""

_SOURCE = """\
namespace epilogue {{  // {name}
struct Parameters {{
{members}
}};
static_assert(sizeof(Parameters) == {n_bytes}, "host twin");
{functors}
}}  // namespace epilogue
"""


def finite_number(value: Any, what: str) -> float:
    """`value` as a float.

    Raises:
        OptionError: not a number, NaN or infinite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{what} is {value!r}, expected one finite number") from None
    if not math.isfinite(number):
        raise OptionError(f"{what} is {number}, expected a finite number: every result would be lost")
    return number


def _vector(value: Any, what: str) -> HostArray:
    """A read-only float32 copy of a vector."""
    array, dtype = host_view(value.detach().cpu() if is_torch(value) else value, what)
    if array.ndim != 1:
        raise ShapeError(f"{what} has shape {array.shape}, expected one value an output feature, (out_features,)")
    vector = np.array(array if dtype.widen is None else dtype.widen(array), np.float32)
    vector.setflags(write=False)
    return vector
