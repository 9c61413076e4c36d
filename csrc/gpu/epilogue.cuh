// The layer's tail as functor types: a new tail is a new functor, not a new kernel.
//
// A functor is built once a thread from the launch's scaling factor and maps one fp32 z = x . w + b to one fp32 y.
// Arithmetic is spelt with intrinsics, which the compiler may not contract: the bits of y depend on z alone, not on
// the kernel a functor is inlined into.
#pragma once

#include "ptx.cuh"

namespace epilogue {

// y = s * sigmoid(z) + z, for kernels that promise fp32 accuracy: expf (2 ulp) and a correctly rounded reciprocal.
// z = +inf gives inf, -inf gives -inf (for finite s), NaN gives NaN.
struct SigmoidScaleResidual {
  float scaling_factor;

  __device__ __forceinline__ float operator()(float z) const {
    const float sigmoid = __frcp_rn(__fadd_rn(1.0f, expf(-z)));
    return __fmaf_rn(scaling_factor, sigmoid, z);
  }
};

// The same within about 3e-7 of s, for kernels whose operands are rounded to tf32, bf16 or fp16: two MUFU operations.
// Large -z makes 2^(..) = inf and its reciprocal 0, large z makes them 0 and 1, so infinities come out as above.
struct FastSigmoidScaleResidual {
  float scaling_factor;

  __device__ __forceinline__ float operator()(float z) const {
    constexpr float kMinusLog2E = -1.4426950408889634f;
    const float sigmoid = ptx::rcp_approx(__fadd_rn(1.0f, ptx::ex2_approx(__fmul_rn(z, kMinusLog2E))));
    return __fmaf_rn(scaling_factor, sigmoid, z);
  }
};

}  // namespace epilogue
