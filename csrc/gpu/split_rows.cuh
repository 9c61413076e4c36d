// Splits fp32 rows into scaled fp16 pairs, the operands of fused_linear_split_sm90 and _sm80 (operands.cuh says what
// they are), and lists the rows that pairs can't hold well enough.
//
//   v (rows, columns) fp32, row-major, v and its row stride multiples of 16 bytes.
//   parts (rows, 64 ceil(columns / 32)) fp16: for each 32 elements 32 high parts, then 32 low ones; zeros past the
//   last. scales (rows,): the power of two that undoes the row's scaling. exact_rows, exact_count: the rows, in any
//   order, that need exact fp32; the caller sets *exact_count to 0 before. total_exact: grows by that count.
//
// A pair holds an element v to 2^-23 |v|, or to 2^-40 of its row's largest magnitude where that is more. The second
// bound is what a sum sees of the elements far below the largest one, should their weights be much larger than that
// one's. So a row needs exact fp32 if its elements are typically far below the largest: if the mean exponent of those
// that aren't 0 is more than kExponentsBelow below the largest. So do rows with an infinity or a NaN, and rows whose
// largest magnitude is subnormal or, for weights, outside 2^-60 to 2^60, where scales could overflow. If any row of the
// weights needs it (*all_exact > 0), so does every row of x.
//
// Rows of x with fewer than kFewProducts elements that aren't 0 (and not none) need it, too: a sum of few products
// gains nothing from averaging, and exact fp32 rounds each of them less.
//
// Launch: one block a row at a time, any grid; block kNumThreads; no dynamic shared memory.
#pragma once

#include <cuda_fp16.h>

struct SplitRowsArgs {
  const float* v;
  __half* parts;
  float* scales;
  int* exact_rows;
  int* exact_count;
  const int* all_exact;             // null for weights
  unsigned long long* total_exact;  // grows by the count; null for weights
  long long v_stride;               // elements
  int rows;
  int columns;
};

struct SplitRows {
  using Args = SplitRowsArgs;
  static constexpr int kNumThreads = 256;
  static constexpr int kSharedBytes = 0;
  static constexpr int kWarps = kNumThreads / 32;
  static constexpr int kLargestExponent = 14;  // a scaled row's: fp16 reaches 2^16
  static constexpr int kWeightExponents = 60;
  static constexpr int kExponentsBelow = 24;
  static constexpr int kFewProducts = 128;
  static constexpr int kWidth = 4;  // elements that a thread takes at a time

  // 2^exponent, -126 <= exponent <= 127.
  static __device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

  // floor(log2) of a magnitude given by its bits; -127 for zero and subnormal numbers, 128 for those not finite.
  static __device__ __forceinline__ int exponent_of(unsigned bits) { return static_cast<int>(bits >> 23) - 127; }

  struct Summary {
    long long exponents;  // their sum
    int nonzero;
  };

  // Over the block; all threads get the result.
  static __device__ __forceinline__ unsigned largest_of_block(unsigned value) {
    __shared__ unsigned warps[kWarps];
    value = __reduce_max_sync(0xffffffff, value);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) value = max(value, warps[warp]);
    __syncthreads();
    return value;
  }

  static __device__ __forceinline__ Summary sum_of_block(Summary mine) {
    __shared__ Summary warps[kWarps];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      mine.exponents += __shfl_xor_sync(0xffffffff, mine.exponents, step);
      mine.nonzero += __shfl_xor_sync(0xffffffff, mine.nonzero, step);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Summary total{0, 0};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      total.exponents += warps[warp].exponents;
      total.nonzero += warps[warp].nonzero;
    }
    __syncthreads();
    return total;
  }

  struct alignas(kWidth * sizeof(__half)) Parts {
    __half of[kWidth];
  };

  // Elements [i, i + kWidth) of a row, zeros past its end; i is a multiple of kWidth.
  static __device__ __forceinline__ void load(float (&values)[kWidth], const float* v, int i, int columns) {
    if (i + kWidth <= columns) {
      *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(v + i);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = i + j < columns ? v[i + j] : 0.0f;
    }
  }

  static __device__ __forceinline__ void run(const Args& args) {
    const int groups = (args.columns + 31) / 32;
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
      const float* v = args.v + row * args.v_stride;
      unsigned bits = 0;  // magnitudes are ordered as their bits are; NaN is above infinity
      alignas(16) float values[kWidth];
      for (int i = threadIdx.x * kWidth; i < args.columns; i += kNumThreads * kWidth) {
        load(values, v, i, args.columns);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) bits = max(bits, __float_as_uint(values[j]) & 0x7fffffff);
      }
      bits = largest_of_block(bits);

      const int largest_exponent = exponent_of(bits);
      bool exact = largest_exponent == 128 || (largest_exponent == -127 && bits != 0);
      if (args.all_exact == nullptr) {
        exact = exact || (bits != 0 && (largest_exponent < -kWeightExponents || largest_exponent > kWeightExponents));
      } else {
        exact = exact || *args.all_exact > 0;
      }
      // Two factors, each an ordinary number. Rows that don't matter here (exact, zeros) are left as they are.
      const int exponent = exact || bits == 0 ? 0 : kLargestExponent - largest_exponent;
      const float scale0 = power_of_two(exponent / 2), scale1 = power_of_two(exponent - exponent / 2);

      __half* parts = args.parts + static_cast<long long>(row) * groups * 64;
      Summary summary{0, 0};
      for (int i = threadIdx.x * kWidth; i < groups * 32; i += kNumThreads * kWidth) {
        load(values, v, i, args.columns);
        Parts high, low;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float scaled = __fmul_rn(__fmul_rn(values[j], scale0), scale1);
          high.of[j] = __float2half_rn(scaled);
          low.of[j] = __float2half_rn(__fsub_rn(scaled, __half2float(high.of[j])));
          if (values[j] != 0.0f) {
            summary.exponents += exponent_of(__float_as_uint(values[j]) & 0x7fffffff);
            ++summary.nonzero;
          }
        }
        *reinterpret_cast<Parts*>(parts + i / 32 * 64 + i % 32) = high;
        *reinterpret_cast<Parts*>(parts + i / 32 * 64 + 32 + i % 32) = low;
      }
      summary = sum_of_block(summary);
      if (threadIdx.x == 0) {
        const long long lowest = largest_exponent - kExponentsBelow;
        exact = exact || summary.exponents < lowest * summary.nonzero;
        if (args.all_exact != nullptr) exact = exact || (summary.nonzero > 0 && summary.nonzero < kFewProducts);
        args.scales[row] = 1.0f / scale0 / scale1;
        if (exact) {
          args.exact_rows[atomicAdd(args.exact_count, 1)] = row;
          if (args.total_exact != nullptr) atomicAdd(args.total_exact, 1ull);
        }
      }
    }
  }
};
