// y = epilogue(x w^T + bias) in fp32 on CUDA cores: every product and sum is an IEEE fp32 FMA or ADD.
//
//   x (rows, in_features), w (out_features, in_features), bias (out_features,) or null: fp32.
//   y (rows, out_features): fp32, bf16 or fp16, rounded once. Row-major with any row strides.
//
// A block computes a BLOCK_M x BLOCK_N tile of y, a thread kRows x kColumns of it. Shared memory is a ring of
// kNumStages k-tiles, each BLOCK_M rows of x above BLOCK_N rows of w, BLOCK_K floats a row plus 4 of padding. The
// pitch of 36 floats puts 16-byte reads of 8 consecutive rows into different banks.
//
// Sums: the products of each SUM_BLOCK of k are summed in order by FMA, then the block's sum is added to the total. In
// units of the squared rounding error of one addition, a running sum over K costs K / 2, and this SUM_BLOCK / 2 +
// K / (2 SUM_BLOCK): 96 instead of 4096 for K = 8192 in blocks of 64. For small K the vendor's library splits its sums
// finely; blocks of 8 with a compensated total then cost 4. The host chooses SUM_BLOCK by in_features alone, and blocks
// start at k = 0 whatever the tile, so an output's bits don't depend on the number of rows or on LOAD_BYTES.
//
// With kExactRows only the rows in args.exact_rows are computed, of which there are *args.exact_count: those that
// pairs of fp16 can't hold (split_rows.cuh). Blocks without any leave at once.
//
// Launch: grid ceil(rows / BLOCK_M) * ceil(out_features / BLOCK_N), one dimension; block kNumThreads; dynamic shared
// memory kSharedBytes. LOAD_BYTES (16 or 4) divides the addresses of x and w and their row strides in bytes.
// 0 < rows, in_features, out_features; in_features below 2^31 bytes.
#pragma once

#include "epilogue.cuh"
#include "fused_linear.cuh"
#include "ptx.cuh"

// Adds `part` to `total` and leaves in `part` what the addition rounded away (Kahan's compensation).
__device__ __forceinline__ void add_compensated(float& total, float& part) {
  const float sum = __fadd_rn(total, part);
  part = __fsub_rn(part, __fsub_rn(sum, total));
  total = sum;
}

template <typename Out, typename Epilogue, int BLOCK_M, int BLOCK_N, int THREADS_M, int THREADS_N, int kNumStages,
          int LOAD_BYTES, int SUM_BLOCK, bool kExactRows>
struct FusedLinearSimt {
  using Args = FusedLinearArgs<typename Epilogue::Parameters>;

  static constexpr int BLOCK_K = 32;
  static constexpr int kNumThreads = THREADS_M * THREADS_N;
  static constexpr int kPitchBytes = (BLOCK_K + 4) * sizeof(float);
  static constexpr int kStageBytes = (BLOCK_M + BLOCK_N) * kPitchBytes;
  static constexpr int kSharedBytes = kNumStages * kStageBytes;
  static constexpr int kRows = BLOCK_M / THREADS_M;
  static constexpr int kColumns = BLOCK_N / THREADS_N;
  static constexpr bool kCompensated = SUM_BLOCK < BLOCK_K;
  static constexpr int kUnroll = kCompensated ? 4 : 8;  // steps of 4 k; all 8 spill together with the compensation

  // One thread copies chunk `thread % 8` (16 bytes) of rows `thread / 8`, `thread / 8 + kRowsPerPass`, ...
  static constexpr int kRowsPerPass = kNumThreads / 8;
  static constexpr int kLoadsX = BLOCK_M / kRowsPerPass;
  static constexpr int kLoads = (BLOCK_M + BLOCK_N) / kRowsPerPass;

  static_assert(LOAD_BYTES == 16 || LOAD_BYTES == 4, "cp.async copies 16 or 4 bytes here");
  static_assert(BLOCK_M % THREADS_M == 0 && BLOCK_N % (4 * THREADS_N) == 0, "a thread stores groups of 4 columns");
  static_assert(THREADS_M % 4 == 0 && THREADS_N % 8 == 0, "a warp is 4 x 8 threads");
  static_assert(BLOCK_M % kRowsPerPass == 0 && BLOCK_N % kRowsPerPass == 0, "each thread copies whole chunks");
  static_assert((kRowsPerPass & (kRowsPerPass - 1)) == 0 && (THREADS_N & (THREADS_N - 1)) == 0, "see w_row");
  static_assert(kNumStages >= 2, "one stage multiplied, one arriving");
  static_assert(SUM_BLOCK % BLOCK_K == 0 || BLOCK_K % SUM_BLOCK == 0, "blocks of the sum and k-tiles nest");

  // The row of w, within the tile, kept in row `r` of shared memory: rows tn, tn + THREADS_N, ... hold four
  // neighbouring outputs, so that a thread reads without bank conflicts and stores four columns at once. A
  // permutation of r's bits, so w_row(a + b) = w_row(a) + w_row(b) where a and b have no bit in common.
  static __device__ __forceinline__ constexpr int w_row(int r) {
    return r / (4 * THREADS_N) * (4 * THREADS_N) + r % THREADS_N * 4 + r / THREADS_N % 4;
  }

  // Rows to compute, and where in x and y the n-th of them is.
  static __device__ __forceinline__ int rows_of(const Args& args) {
    return kExactRows ? __ldg(args.exact_count) : args.rows;
  }
  static __device__ __forceinline__ int place_of(const Args& args, int row) {
    return kExactRows ? __ldg(args.exact_rows + row) : row;
  }

  // This thread's share of the copies from device memory to the ring.
  struct Loader {
    const char* x;
    const char* w;
    const Args& args;
    int x_base;             // the tile's first row
    int x_row, x_last_row;  // within the tile; rows past the end repeat the last one, their outputs are dropped
    int w_row, w_last_row;
    int bytes_left;  // from this thread's chunk to the end of a row
    unsigned destination;

    __device__ __forceinline__ Loader(const Args& args, int m0, int n0, unsigned shared) : args(args) {
      const int chunk = threadIdx.x % 8;
      const int row = threadIdx.x / 8;
      x_base = kExactRows ? m0 : 0;
      x = static_cast<const char*>(args.x) + chunk * 16;
      if (!kExactRows) x += static_cast<unsigned long long>(m0) * args.x_stride_bytes;
      w = static_cast<const char*>(args.w) + static_cast<unsigned long long>(n0) * args.w_stride_bytes + chunk * 16;
      x_row = row;
      w_row = FusedLinearSimt::w_row(row);
      x_last_row = rows_of(args) - 1 - m0;
      w_last_row = args.out_features - 1 - n0;
      bytes_left = args.in_features * static_cast<int>(sizeof(float)) - chunk * 16;
      destination = shared + row * kPitchBytes + chunk * 16;
    }

    // Copies this thread's share of the current k-tile into a stage, zeros past the end of a row, and steps on.
    __device__ __forceinline__ void load_stage(int stage) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool is_x = i < kLoadsX;
        const int row = is_x ? place_of(args, x_base + min(x_row + i * kRowsPerPass, x_last_row))
                             : min(w_row + FusedLinearSimt::w_row((i - kLoadsX) * kRowsPerPass), w_last_row);
        const unsigned stride_bytes = is_x ? args.x_stride_bytes : args.w_stride_bytes;
        const char* source =
            (is_x ? x : w) + static_cast<unsigned long long>(static_cast<unsigned>(row)) * stride_bytes;
        const unsigned chunk = destination + stage * kStageBytes + i * kRowsPerPass * kPitchBytes;
        if constexpr (LOAD_BYTES == 16) {
          ptx::cp_async_16(chunk, source, min(max(bytes_left, 0), 16));
        } else {
#pragma unroll
          for (int j = 0; j < 16; j += 4) ptx::cp_async_4(chunk + j, source + j, min(max(bytes_left - j, 0), 4));
        }
      }
      x += BLOCK_K * sizeof(float);
      w += BLOCK_K * sizeof(float);
      bytes_left -= BLOCK_K * static_cast<int>(sizeof(float));
    }
  };

  // Adds this k-tile's products to `sum`, in order.
  static __device__ __forceinline__ void multiply(float (&total)[kRows][kColumns], float (&sum)[kRows][kColumns],
                                                  const char* x, const char* w) {
#pragma unroll kUnroll
    for (int k = 0; k < BLOCK_K; k += 4) {
      float4 w4[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        w4[j] = *reinterpret_cast<const float4*>(w + j * THREADS_N * kPitchBytes + k * sizeof(float));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 x4 = *reinterpret_cast<const float4*>(x + i * THREADS_M * kPitchBytes + k * sizeof(float));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] = __fmaf_rn(x4.x, w4[j].x, sum[i][j]);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] = __fmaf_rn(x4.y, w4[j].y, sum[i][j]);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] = __fmaf_rn(x4.z, w4[j].z, sum[i][j]);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] = __fmaf_rn(x4.w, w4[j].w, sum[i][j]);
      }
      if (SUM_BLOCK <= BLOCK_K && (k + 4) % SUM_BLOCK == 0) fold(total, sum);
    }
  }

  // Adds a block's sum to the total. What the addition rounds away opens the next block (Kahan's compensation) where
  // kCompensated; an infinite total leaves nothing that could turn it into NaN.
  static __device__ __forceinline__ void fold(float (&total)[kRows][kColumns], float (&sum)[kRows][kColumns]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if constexpr (kCompensated) {
          add_compensated(total[i][j], sum[i][j]);
          sum[i][j] = fabsf(total[i][j]) < __int_as_float(0x7f800000) ? sum[i][j] : 0.0f;
        } else {
          total[i][j] = __fadd_rn(total[i][j], sum[i][j]);
          sum[i][j] = 0.0f;
        }
      }
    }
  }

  static __device__ __forceinline__ void store(const Args& args, int row0, int column0,
                                               const float (&total)[kRows][kColumns]) {
    const Epilogue epilogue{args.epilogue};
    const int rows = rows_of(args);
    const float* bias = static_cast<const float*>(args.bias);
    const bool vectors = rows_allow_vectors<Out>(args.y, args.y_stride);
#pragma unroll
    for (int group = 0; group < kColumns / 4; ++group) {
      const int column = column0 + group * 4 * THREADS_N;
      float b[4] = {};
      if (bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = column + i < args.out_features ? bias[column + i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = row0 + i * THREADS_M;
        if (row >= rows) continue;
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = epilogue(__fadd_rn(total[i][group * 4 + j], b[j]), place_of(args, row), column + j);
        }
        store_4(static_cast<Out*>(args.y) + place_of(args, row) * args.y_stride, column, args.out_features, vectors, v);
      }
    }
  }

  static __device__ __forceinline__ void run(const Args& args) {
    extern __shared__ __align__(128) char shared_bytes[];
    int m0, n0;
    tile_origin<BLOCK_M, BLOCK_N>(args, m0, n0);
    if (kExactRows && m0 >= rows_of(args)) return;
    Loader loader(args, m0, n0, ptx::shared_address(shared_bytes));

#pragma unroll
    for (int stage = 0; stage < kNumStages - 1; ++stage) {
      loader.load_stage(stage);
      ptx::cp_async_commit();
    }

    // A warp's 32 threads sit 4 x 8 in the THREADS_M x THREADS_N grid, interleaved.
    // NOTE: a 16-byte shared load takes four passes, or two where lanes i and i ^ 1 (or i ^ 2) all read one address:
    // lane bit 0 belongs to m, which w's loads don't see, and bit 1 to n, which x's don't.
    constexpr int kWarpsN = THREADS_N / 8;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int thread_m = warp / kWarpsN * 4 + lane / 16 * 2 + lane % 2;
    const int thread_n = warp % kWarpsN * 8 + lane / 2 % 8;
    const char* x = shared_bytes + thread_m * kPitchBytes;
    const char* w = shared_bytes + (BLOCK_M + thread_n) * kPitchBytes;

    float total[kRows][kColumns] = {};
    float sum[kRows][kColumns] = {};
    int read_stage = 0;
    int write_stage = kNumStages - 1;
    const int k_tiles = (args.in_features + BLOCK_K - 1) / BLOCK_K;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      // This k-tile has arrived everywhere, and every warp is done with the one before, whose stage is refilled.
      ptx::cp_async_wait<kNumStages - 2>();
      __syncthreads();
      loader.load_stage(write_stage);
      ptx::cp_async_commit();
      multiply(total, sum, x + read_stage * kStageBytes, w + read_stage * kStageBytes);
      if (SUM_BLOCK > BLOCK_K && (k_tile + 1) % (SUM_BLOCK / BLOCK_K) == 0) fold(total, sum);
      read_stage = read_stage + 1 == kNumStages ? 0 : read_stage + 1;
      write_stage = write_stage + 1 == kNumStages ? 0 : write_stage + 1;
    }
    ptx::cp_async_wait<0>();
    fold(total, sum);

    store(args, m0 + thread_m, n0 + thread_n * 4, total);
  }
};
