// What a k-tile of 128 bytes a row holds and how it is multiplied: data as they are, or fp32 split into fp16 pairs.
//
// A k-tile has four steps of 32 bytes, one tensor core instruction's k each. Of kProducts products the i-th multiplies
// step x_step(i) of x's rows with step w_step(i) of w's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Data as they are: each step times its like.
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

// fp32 split into fp16 pairs (split_rows.cuh).
//
// Each fp32 row v of x and w is scaled by a power of two, so that its largest magnitude is in [2^14, 2^15), and split
// into fp16 parts, v = high + low + at most 2^-23 |v| (or 2^-25 where that is more). Rows of 128 bytes, the k-tiles,
// hold 32 elements: 32 high parts, then 32 low ones. Of the four products of parts three are summed; low x low is at
// most 2^-22 of the whole. Scheme: H. Ootomo and R. Yokota, "Recovering single precision accuracy from Tensor Cores
// while surpassing the FP32 theoretical peak performance", 2022.
//
// NOTE: tensor cores truncate their accumulators at every step (no document says how: docs/notes/kernels.md),
// which adds up. So accumulators start anew every kPromoteEvery k-tiles, and their sums are added up by ordinary
// additions, which round to nearest. The small products come first, while the accumulators are small: two truncations a
// k-tile are left at full magnitude.
//
// NOTE: each ordinary addition rounds the total, by 2^-25 of it on average; over a long sum that adds up to more than
// all else. So every `fold_interval` k-tiles the leading bits of the total are set aside (`set_aside`) and additions go
// on with the small rest: they round as if sums were that long. It takes half a register a sum, where Kahan's
// compensation takes a whole one and three additions for each.
template <int kPromoteEvery_>
struct SplitFp16 {
  using Element = __half;
  using BiasElement = float;
  static constexpr int kProducts = 6;
  static constexpr int kSmallProducts = 4;
  static constexpr int kPromoteEvery = kPromoteEvery_;
  static constexpr bool kScaled = true;
  // Steps 0 and 1 are high parts, 2 and 3 low ones: low x high, high x low, high x high.
  static __device__ __forceinline__ constexpr int x_step(int product) {
    return product < 2 ? product + 2 : product % 2;
  }
  static __device__ __forceinline__ constexpr int w_step(int product) {
    return product == 2 || product == 3 ? product : product % 2;
  }
};

// How many k-tiles lie between two times that a total's leading bits are set aside: a power of two, about a quarter of
// all. NOTE: shorter intervals take away error that is small beside the vendor's, and cost power, so time
// (docs/notes/kernels.md).
__device__ __forceinline__ int fold_interval(int k_tiles) { return k_tiles >= 256 ? 64 : k_tiles >= 128 ? 32 : 16; }

__device__ __forceinline__ unsigned& bits_of(__nv_bfloat162& pair) { return reinterpret_cast<unsigned&>(pair); }

// The two values of a pair, each one instruction where the conversions of cuda_bf16.h take two.
__device__ __forceinline__ float2 widened(__nv_bfloat162 pair) {
  return {__uint_as_float(bits_of(pair) << 16), __uint_as_float(bits_of(pair) & 0xffff0000)};
}

// Moves the leading 8 bits of two sums leading + rest into `leading`. Nothing is lost, to 2^-32 of the sums; but where
// `rest` is 2^16 times `leading` and more, after a cancellation, it is rounded once more.
__device__ __forceinline__ void set_aside(__nv_bfloat162& leading, float& rest0, float& rest1) {
  const float2 before = widened(leading);
  leading = __floats2bfloat162_rn(__fadd_rn(before.x, rest0), __fadd_rn(before.y, rest1));
  const float2 after = widened(leading);
  rest0 = __fadd_rn(rest0, __fsub_rn(before.x, after.x));
  rest1 = __fadd_rn(rest1, __fsub_rn(before.y, after.y));
}

// Makes `rest0` and `rest1` the two sums, rounded once.
__device__ __forceinline__ void put_back(__nv_bfloat162 leading, float& rest0, float& rest1) {
  const float2 values = widened(leading);
  rest0 = __fadd_rn(values.x, rest0);
  rest1 = __fadd_rn(values.y, rest1);
}
