// y = epilogue(x w^T + bias): tensor cores through mma.sync, for any shape on sm_80 and later.
//
//   x (rows, in_features), w (out_features, in_features), y (rows, out_features), bias (out_features,) or null.
//   Row-major with any row strides. bf16, fp16, fp32 rounded to tf32 (nearest, ties away) on the way to the tensor
//   core, or fp32 split into fp16 pairs (operands.cuh); fp32 accumulation; one rounding to y's element type at the end.
//
// A block computes a BLOCK_M x BLOCK_N tile of y. Shared memory is a ring of kNumStages k-tiles, each BLOCK_M rows of
// x above BLOCK_N rows of w, 128 bytes a row. The 16-byte chunk c of row r lies at chunk c ^ (r & 7), so the eight
// rows an ldmatrix reads always cover all banks. While a stage is multiplied, the ring's other stages arrive by
// cp.async, and within a stage the fragments of k-step s + 1 are loaded while step s is multiplied.
//
// Inside each group of 16, rows of w are permuted on their way to shared memory so that a thread's accumulators
// belong to four neighbouring columns of y (see `w_row`); stores are then 8 or 16 bytes without a trip through
// shared memory.
//
// NOTE: an output's bits must not depend on the number of rows, so every configuration sums over k in the same order
// with the same instruction, without split-k. LOAD_BYTES and the tile change speed only.
//
// Launch: grid ceil(rows / BLOCK_M) * ceil(out_features / BLOCK_N), one dimension; block kNumThreads; dynamic shared
// memory kSharedBytes. LOAD_BYTES (16, 4, or 2 for 16-bit types) divides the addresses of x and w and their row
// strides in bytes. 0 < rows, in_features, out_features; in_features below 2^31 bytes.
#pragma once

#include "epilogue.cuh"
#include "fused_linear.cuh"
#include "operands.cuh"
#include "ptx.cuh"

template <typename In>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                            unsigned b1) {
  ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ptx::mma_m16n8k16_fp16(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void multiply_add<float>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ptx::mma_m16n8k8_tf32(d, a, b0, b1);
}

// Prepares a fragment register: fp32 is rounded to tf32, 16-bit pairs stay as they are.
//
// NOTE: the tensor core ignores the low 13 bits, so adding half of their range rounds as cvt.rna.tf32 does, in two
// instructions instead of three. Infinity and NaN stay as they are: a carry would turn NaN 0x7fffffff into -0.
template <typename In>
__device__ __forceinline__ unsigned to_operand(unsigned bits) {
  if constexpr (sizeof(In) == 4) {
    return fabsf(__uint_as_float(bits)) < __int_as_float(0x7f800000) ? bits + 0x1000u : bits;
  }
  return bits;
}

// Copies up to 16 bytes to shared memory, zeros where `bytes_left` ends.
template <int LOAD_BYTES>
__device__ __forceinline__ void load_chunk(unsigned destination, const char* source, int bytes_left) {
  if constexpr (LOAD_BYTES == 16) {
    ptx::cp_async_16(destination, source, min(max(bytes_left, 0), 16));
  } else if constexpr (LOAD_BYTES == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      ptx::cp_async_4(destination + i, source + i, min(max(bytes_left - i, 0), 4));
    }
  } else {
    const unsigned short* halves = reinterpret_cast<const unsigned short*>(source);
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned low = bytes_left > 4 * i ? __ldg(halves + 2 * i) : 0;
      const unsigned high = bytes_left > 4 * i + 2 ? __ldg(halves + 2 * i + 1) : 0;
      v[i] = low | high << 16;
    }
    ptx::st_shared_16(destination, v);
  }
}

template <typename Operands, typename Out, typename Epilogue, int BLOCK_M, int BLOCK_N, int WARPS_M, int WARPS_N,
          int kNumStages, int LOAD_BYTES>
struct FusedLinearSm80 {
  using Args = FusedLinearArgs<typename Epilogue::Parameters>;
  using In = typename Operands::Element;
  using BiasElement = typename Operands::BiasElement;
  static constexpr bool kPromoted = Operands::kPromoteEvery > 0;

  static constexpr int kNumThreads = WARPS_M * WARPS_N * 32;
  static constexpr int kRowBytes = 128;
  static constexpr int kStageBytes = (BLOCK_M + BLOCK_N) * kRowBytes;
  static constexpr int kSharedBytes = kNumStages * kStageBytes;
  static constexpr int BLOCK_K = kRowBytes / sizeof(In);
  static constexpr int kSteps = Operands::kProducts;  // in a k-tile, 32 bytes of x and w each: one mma's k

  static constexpr int WARP_M = BLOCK_M / WARPS_M;
  static constexpr int WARP_N = BLOCK_N / WARPS_N;
  static constexpr int kFragmentsM = WARP_M / 16;
  static constexpr int kFragmentsN = WARP_N / 16;

  // One thread copies chunk `thread % 8` of rows `thread / 8`, `thread / 8 + kRowsPerPass`, ...
  static constexpr int kRowsPerPass = kNumThreads / 8;
  static constexpr int kLoadsX = BLOCK_M / kRowsPerPass;
  static constexpr int kLoadsW = BLOCK_N / kRowsPerPass;
  static constexpr int kLoads = kLoadsX + kLoadsW;

  static_assert(sizeof(In) == 2 || sizeof(In) == 4, "bf16, fp16, or fp32 as tf32");
  static_assert(LOAD_BYTES == 16 || LOAD_BYTES == 4 || (LOAD_BYTES == 2 && sizeof(In) == 2), "see load_chunk");
  static_assert(BLOCK_M % (16 * WARPS_M) == 0 && BLOCK_N % (16 * WARPS_N) == 0, "warp tiles are whole fragments");
  static_assert(BLOCK_M % kRowsPerPass == 0 && BLOCK_N % kRowsPerPass == 0, "each thread copies whole chunks");
  static_assert(kRowsPerPass % 16 == 0, "a pass keeps the swizzle and w_row's permutation of its first row");
  static_assert(kNumStages >= 3, "one stage multiplied, one arriving, one free");
  static_assert(kSteps % 2 == 0, "fragment buffers alternate across k-tiles");
  static_assert(Operands::kPromoteEvery <= 1, "accumulators are promoted after every k-tile or never");

  // The row of w, within the tile, kept in row `r` of shared memory: column 8 j + c of a 16-wide fragment holds
  // output 4 (c / 2) + 2 j + c % 2, so the pairs that mma gives a thread join to four neighbours.
  static __device__ __forceinline__ constexpr int w_row(int r) {
    return (r & ~15) + 4 * ((r & 7) >> 1) + 2 * ((r >> 3) & 1) + (r & 1);
  }

  // This thread's share of the copies from device memory to the ring.
  struct Loader {
    const char* x;
    const char* w;
    const Args& args;
    int x_row, x_last_row;  // within the tile; rows past the end repeat the last one, their outputs are dropped
    int w_row, w_last_row;
    int bytes_left;  // from this thread's chunk to the end of a row
    unsigned destination;

    __device__ __forceinline__ Loader(const Args& args, int m0, int n0, unsigned shared) : args(args) {
      const int chunk = threadIdx.x % 8;
      const int row = threadIdx.x / 8;
      x = static_cast<const char*>(args.x) + static_cast<unsigned long long>(m0) * args.x_stride_bytes + chunk * 16;
      w = static_cast<const char*>(args.w) + static_cast<unsigned long long>(n0) * args.w_stride_bytes + chunk * 16;
      x_row = row;
      w_row = FusedLinearSm80::w_row(row);
      x_last_row = args.rows - 1 - m0;
      w_last_row = args.out_features - 1 - n0;
      bytes_left = args.in_features * static_cast<int>(sizeof(In)) - chunk * 16;
      destination = shared + row * kRowBytes + (chunk ^ (row & 7)) * 16;
    }

    // Copy `i` of kLoads of the current k-tile into the stage at `stage_offset`.
    __device__ __forceinline__ void load(int i, unsigned stage_offset) const {
      const bool is_x = i < kLoadsX;
      const int pass = is_x ? i : i - kLoadsX;
      const int row =
          is_x ? min(x_row + pass * kRowsPerPass, x_last_row) : min(w_row + pass * kRowsPerPass, w_last_row);
      const unsigned stride_bytes = is_x ? args.x_stride_bytes : args.w_stride_bytes;
      const char* source = (is_x ? x : w) + static_cast<unsigned long long>(static_cast<unsigned>(row)) * stride_bytes;
      load_chunk<LOAD_BYTES>(destination + stage_offset + i * kRowsPerPass * kRowBytes, source, bytes_left);
    }

    __device__ __forceinline__ void advance() {
      x += kRowBytes;
      w += kRowBytes;
      bytes_left -= kRowBytes;
      // NOTE: hides from the compiler that rows don't change. It would keep each copy's row in a register and spill.
      asm volatile("" : "+r"(x_row), "+r"(w_row));
    }
  };

  struct Fragments {
    unsigned x[kFragmentsM][4];
    unsigned w[kFragmentsN][4];
  };

  static __device__ __forceinline__ void load_fragments(Fragments& f, unsigned x_address, unsigned w_address) {
#pragma unroll
    for (int m = 0; m < kFragmentsM; ++m) ptx::ldmatrix_x4(f.x[m], x_address + m * 16 * kRowBytes);
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) ptx::ldmatrix_x4(f.w[n], w_address + n * 16 * kRowBytes);
  }

  // A thread's accumulators, and the i-th of them.
  using Accumulators = float[kFragmentsM][2 * kFragmentsN][4];
  static constexpr int kAccumulators = kFragmentsM * 2 * kFragmentsN * 4;
  static __device__ __forceinline__ float& at(Accumulators& d, int i) {
    return d[i / (8 * kFragmentsN)][i / 4 % (2 * kFragmentsN)][i % 4];
  }

  static __device__ __forceinline__ void multiply(Accumulators& d, Fragments& f) {
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f.w[n][i] = to_operand<In>(f.w[n][i]);
    }
#pragma unroll
    for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f.x[m][i] = to_operand<In>(f.x[m][i]);
#pragma unroll
      for (int step = 0; step < 2 * kFragmentsN; ++step) {
        const int n = m % 2 ? 2 * kFragmentsN - 1 - step : step;  // back and forth: neighbours share an operand
        multiply_add<In>(d[m][n], f.x[m], f.w[n / 2][n % 2 * 2], f.w[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  // Sums of accumulators that are promoted: rest + leading (`set_aside`).
  struct Totals {
    Accumulators rest = {};
    __nv_bfloat162 leading[kAccumulators / 2] = {};

    // Adds `d` and clears it.
    __device__ __forceinline__ void add(Accumulators& d) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) {
        at(rest, i) = __fadd_rn(at(rest, i), at(d, i));
        at(d, i) = 0.0f;
      }
    }
    __device__ __forceinline__ void set_aside() {
#pragma unroll
      for (int i = 0; i < kAccumulators; i += 2) ::set_aside(leading[i / 2], at(rest, i), at(rest, i + 1));
    }
    __device__ __forceinline__ void put_back() {
#pragma unroll
      for (int i = 0; i < kAccumulators; i += 2) ::put_back(leading[i / 2], at(rest, i), at(rest, i + 1));
    }
  };

  static __device__ __forceinline__ void store(const Args& args, int row0, int column0, const Accumulators& d) {
    const Epilogue epilogue{args.epilogue};
    const BiasElement* bias = static_cast<const BiasElement*>(args.bias);
    const bool vectors = rows_allow_vectors<Out>(args.y, args.y_stride);
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) {
      const int column = column0 + n * 16;
      float b[4] = {};
      if (bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = column + i < args.out_features ? to_float(bias[column + i]) : 0.0f;
      }
      float w_scales[4] = {};
      if constexpr (Operands::kScaled) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w_scales[i] = column + i < args.out_features ? args.w_scales[column + i] : 0.0f;
      }
#pragma unroll
      for (int m = 0; m < 2 * kFragmentsM; ++m) {  // the two 8-row halves of each fragment
        const int row = row0 + m * 8;
        if (row >= args.rows) continue;
        const float (&even)[4] = d[m / 2][2 * n];
        const float (&odd)[4] = d[m / 2][2 * n + 1];
        const int half = m % 2 * 2;
        float v[4] = {even[half], even[half + 1], odd[half], odd[half + 1]};
        if constexpr (Operands::kScaled) {  // powers of two: exact
          const float x_scale = args.x_scales[row];
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = __fmul_rn(__fmul_rn(v[i], w_scales[i]), x_scale);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = epilogue(__fadd_rn(v[i], b[i]), row, column + i);
        store_4(static_cast<Out*>(args.y) + row * args.y_stride, column, args.out_features, vectors, v);
      }
    }
  }

  static __device__ __forceinline__ void run(const Args& args) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const unsigned shared = ptx::shared_address(shared_bytes);
    int m0, n0;
    tile_origin<BLOCK_M, BLOCK_N>(args, m0, n0);
    Loader loader(args, m0, n0, shared);

#pragma unroll
    for (int stage = 0; stage < kNumStages - 1; ++stage) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) loader.load(i, stage * kStageBytes);
      loader.advance();
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<kNumStages - 2>();
    __syncthreads();

    // Addresses of this lane's ldmatrix rows in stage 0 at step 0; step s flips chunk bits: address ^ (32 s).
    const int lane = threadIdx.x % 32;
    const int warp_m = threadIdx.x / 32 % WARPS_M * WARP_M;
    const int warp_n = threadIdx.x / 32 / WARPS_M * WARP_N;
    const int w_lane_row = lane % 8 + lane / 16 * 8;
    const unsigned x_lane = shared + (warp_m + lane % 16) * kRowBytes + (lane / 16 ^ lane % 8) * 16;
    const unsigned w_lane = shared + (BLOCK_M + warp_n + w_lane_row) * kRowBytes + (lane / 8 % 2 ^ lane % 8) * 16;

    Accumulators d = {};
    [[maybe_unused]] Totals totals;  // where accumulators are promoted
    Fragments fragments[2];
    unsigned read_offset = 0;
    load_fragments(fragments[0], x_lane ^ Operands::x_step(0) * 32, w_lane ^ Operands::w_step(0) * 32);

    const int k_tiles = (args.in_features + BLOCK_K - 1) / BLOCK_K;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step == kSteps - 1) {
          // The next k-tile has arrived everywhere, and every warp has read the last of this one's fragments, so
          // that the coming round may overwrite it.
          ptx::cp_async_wait<kNumStages - 2>();
          __syncthreads();
          read_offset = read_offset + kStageBytes == kSharedBytes ? 0 : read_offset + kStageBytes;
        }
        const int next = (step + 1) % kSteps;
        load_fragments(fragments[next % 2], (x_lane + read_offset) ^ Operands::x_step(next) * 32,
                       (w_lane + read_offset) ^ Operands::w_step(next) * 32);
        // Copies for the k-tile kNumStages - 1 ahead, spread over the steps, into the stage before the one being
        // read; past the end they fill zeros.
        const unsigned write_offset = (read_offset == 0 ? kSharedBytes : read_offset) - kStageBytes;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          if (i * (kSteps - 1) / kLoads == step) loader.load(i, write_offset);
        }
        if (step == kSteps - 2) {
          ptx::cp_async_commit();
          loader.advance();
        }
        multiply(d, fragments[step % 2]);
      }
      if constexpr (kPromoted) {
        totals.add(d);
        if ((k_tile + 1) % fold_interval(k_tiles) == 0) totals.set_aside();
      }
    }
    ptx::cp_async_wait<0>();

    if constexpr (kPromoted) totals.put_back();
    store(args, m0 + warp_m + lane / 4, n0 + warp_n + lane % 4 * 4, kPromoted ? totals.rest : d);
  }
};
