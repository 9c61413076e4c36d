// What the fused linear kernels share: the launch argument, element conversions, the order of tiles and the stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The one argument of the sm80 and SIMT kernels. Host twin: pipeline/kernels/fused_linear.py.
//   x (rows, in_features), w (out_features, in_features), y (rows, out_features): row-major, inner stride 1.
//   bias (out_features,), of x's element type, or null.
// Row strides: y's in elements, those of x and w in bytes, which kernels multiply by 32-bit rows to 64-bit offsets.
template <typename EpilogueParameters>
struct FusedLinearArgs {
  const void* x;
  const void* w;
  const void* bias;
  void* y;
  long long y_stride;
  const int* exact_rows;  // and how many they are, where only those rows are computed (fused_linear_simt)
  const int* exact_count;
  const float* x_scales;  // factors of sums of split operands, by row and by output feature
  const float* w_scales;
  unsigned x_stride_bytes;
  unsigned w_stride_bytes;
  int rows;
  int in_features;
  int out_features;
  EpilogueParameters epilogue;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename Out>
__device__ __forceinline__ Out from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// First row and first output feature of this block's tile.
//
// Tiles are numbered so that `kGroupBlocks` blocks of rows share one block of W before the next one is fetched: W
// then comes from device memory once per group, and the blocks of x in a group stay in L2.
template <int BLOCK_M, int BLOCK_N, int kGroupBlocks = 8, typename Args>
__device__ __forceinline__ void tile_origin(const Args& args, int& m0, int& n0) {
  const unsigned m_blocks = (static_cast<unsigned>(args.rows) + BLOCK_M - 1) / BLOCK_M;
  const unsigned n_blocks = (static_cast<unsigned>(args.out_features) + BLOCK_N - 1) / BLOCK_N;
  const unsigned tile = blockIdx.x;
  const unsigned group = tile / (kGroupBlocks * n_blocks);
  const unsigned in_group = tile - group * (kGroupBlocks * n_blocks);
  const unsigned group_m = min(static_cast<unsigned>(kGroupBlocks), m_blocks - group * kGroupBlocks);
  m0 = static_cast<int>((group * kGroupBlocks + in_group % group_m) * BLOCK_M);
  n0 = static_cast<int>((in_group / group_m) * BLOCK_N);
}

// Four neighbouring outputs; the pointer is aligned to all four of them.
template <typename Out>
struct alignas(4 * sizeof(Out)) Out4 {
  Out v[4];
};

// Stores four neighbouring outputs of a row, as one access if `vectors` and all four exist.
template <typename Out>
__device__ __forceinline__ void store_4(Out* row, int column, int columns, bool vectors, const float (&v)[4]) {
  if (vectors && column + 3 < columns) {
    Out4<Out> packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.v[i] = from_float<Out>(v[i]);
    *reinterpret_cast<Out4<Out>*>(row + column) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < columns) row[column + i] = from_float<Out>(v[i]);
    }
  }
}

// Whether every row of y allows `store_4` its vector access.
template <typename Out>
__device__ __forceinline__ bool rows_allow_vectors(const void* y, long long y_stride) {
  return reinterpret_cast<unsigned long long>(y) % sizeof(Out4<Out>) == 0 && y_stride % 4 == 0;
}
