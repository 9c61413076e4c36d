// The fused linear layer for bf16, fp16 and tf32 on Hopper: fused_linear_sm90.cuh with operands as they are.
#include "fused_linear_sm90.cuh"

// A k-tile's four steps of 32 bytes, each times its like.
template <typename T>
struct Plain {
  using Element = T;
  using BiasElement = T;
  static constexpr int kProducts = 4;
  static constexpr int kPromoteEvery = 0;
  static constexpr bool kScaled = false;
  static __device__ __forceinline__ constexpr int x_step(int product) { return product; }
  static __device__ __forceinline__ constexpr int w_step(int product) { return product; }
};
