// The fused linear layer at fp32 accuracy on Hopper's fp16 tensor cores: fused_linear_sm90.cuh with split operands.
//
// Each fp32 row v of x and w is scaled by a power of two, so that its largest magnitude is in [2^14, 2^15), and split
// into fp16 parts, v = high + low + at most 2^-22 |v| (or 2^-25 where that is more). Rows of 128 bytes, the k-tiles,
// hold 32 elements: 32 high parts, then 32 low ones. Of the four products of parts three are summed, low x low being
// below fp32's rounding; in a k-tile the small ones first. Scheme: H. Ootomo and R. Yokota, "Recovering single
// precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.
//
// NOTE: wgmma truncates its accumulator at every step, which adds up. So each k-tile starts a new one, to which only the
// two steps of high x high are added at full magnitude, and ordinary additions, rounding to nearest, sum k-tiles in
// blocks of kPartialKTiles and then blocks, so that K = 8192 meets 32 + 8 roundings and not 256.
#include "fused_linear_sm90.cuh"

struct SplitFp16 {
  using Element = __half;
  using BiasElement = float;
  static constexpr int kProducts = 6;
  static constexpr int kPartialKTiles = 32;
  static constexpr bool kScaled = true;
  // Steps 0 and 1 are high parts, 2 and 3 low ones: low x high, high x low, high x high.
  static __device__ __forceinline__ constexpr int x_step(int product) {
    return product < 2 ? product + 2 : product % 2;
  }
  static __device__ __forceinline__ constexpr int w_step(int product) {
    return product == 2 || product == 3 ? product : product % 2;
  }
};
