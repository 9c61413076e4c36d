"""y = scaling_factor * sigmoid(z) + z: the epilogue of Gemm_Sigmoid_Scaling_ResidualAdd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arrays import HostArray
from pipeline.epilogues.base import Epilogue, finite_number

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as TorchDType  # not torch.dtype: a class here has an attribute called torch

_TORCH_GRAIN = 2**15  # elements of which torch gives none to other threads


class SigmoidScaleResidual(Epilogue):
    """scaling_factor * sigmoid(z) + z. `scaling_factor` is one finite number."""

    scaling_factor: float

    # expf (2 ulp) and a correctly rounded reciprocal. Arithmetic is spelt with intrinsics, which the compiler may not
    # contract: the bits of y depend on z alone, not on the kernel that this is inlined into. z = +inf gives inf, -inf
    # gives -inf (for a finite scaling_factor), NaN gives NaN.
    cuda = """
    const float sigmoid = __frcp_rn(__fadd_rn(1.0f, expf(-z)));
    return __fmaf_rn(parameters.scaling_factor, sigmoid, z);
    """

    # The same within about 3e-7 of scaling_factor: two MUFU operations. Large -z makes 2^(..) = inf and its reciprocal
    # 0, large z makes them 0 and 1, so that infinities come out as above.
    cuda_fast = """
    constexpr float kMinusLog2E = -1.4426950408889634f;
    const float sigmoid = ptx::rcp_approx(__fadd_rn(1.0f, ptx::ex2_approx(__fmul_rn(z, kMinusLog2E))));
    return __fmaf_rn(parameters.scaling_factor, sigmoid, z);
    """

    any_threads = True

    def numpy(self, z: HostArray) -> HostArray:
        with np.errstate(over="ignore", invalid="ignore"):
            return self.scaling_factor / (1 + np.exp(-z)) + z

    def torch(self, z: Tensor) -> Tensor:
        import torch

        return torch.add(z, torch.sigmoid(z), alpha=self._alpha(z.dtype))

    def write(self, z: Tensor, out: Tensor, scratch: Tensor) -> None:
        """An element's bits don't depend on its place if there are a multiple of 64 elements: torch's vector and scalar
        code differ, and parts for its threads may end within a vector, so that none get any here."""
        import torch

        z, out, alpha = z.view(-1), out.view(-1), self._alpha(z.dtype)
        at_once = max(1, len(z)) if torch.get_num_threads() == 1 else _TORCH_GRAIN
        for first in range(0, len(z), at_once):
            part, target = z[first : first + at_once], out[first : first + at_once]
            torch.add(part, torch.sigmoid(part, out=scratch[: len(part)]), alpha=alpha, out=target)

    def _alpha(self, dtype: TorchDType) -> float:
        """scaling_factor in an element type: infinite where it is too large for that, where torch.add would raise."""
        import torch

        return float(torch.tensor(self.scaling_factor, dtype=dtype, device="cpu").item())

    def derivative(self, z: Tensor) -> Tensor:
        return self.derivative_at(z, self.scaling_factor)

    @staticmethod
    def derivative_at(z: Tensor, scaling_factor: Any) -> Tensor:
        """1 + scaling_factor * sigmoid(z) * (1 - sigmoid(z)); in compiled programs scaling_factor may be symbolic."""
        import torch

        sigmoid: Tensor = torch.sigmoid(z)
        slope: Tensor = 1 + scaling_factor * sigmoid * (1 - sigmoid)
        return slope


def check_scaling_factor(value: Any) -> float:
    """`value` as a float.

    Raises:
        OptionError: not a number, NaN or infinite.
    """
    return finite_number(value, "scaling_factor")
