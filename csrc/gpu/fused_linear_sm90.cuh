// y = epilogue(x w^T + bias): Hopper's tensor cores fed by the bulk tensor copy engine (TMA + wgmma), sm_90a.
//
//   x (rows, in_features), w (out_features, in_features), y (rows, out_features), bias (out_features,) or null.
//   Row-major. bf16, fp16, fp32 that the copy engine rounds to tf32 (nearest) on the way in, or fp32 split into fp16
//   pairs (operands.cuh); fp32 accumulation; one rounding to y's element type at the end.
//
// The kernel is persistent: as many blocks as the GPU holds walk over the output, computing one BLOCK_M x BLOCK_N tile
// after the other. One thread, the producer, keeps a ring of kNumStages k-tiles full. Two consumer warpgroups multiply
// them in turns, each every other tile with accumulators in registers: one finishes and stores its tile while the other
// keeps the tensor cores busy ("ping-pong"). Consumers wait for nothing but full stages and their turn. Outputs leave
// through a small buffer of each warp's own and TMA stores. Operands whose accumulators are promoted need registers for
// two and a half sets of them: there the consumers multiply side by side, each half of the rows of every tile.
//
// NOTE: no clusters and no multicast. They save nothing here: the GPU joins reads of the same lines by neighbouring
// multiprocessors on their way to L2 by itself, and then reads no more than with multicast in clusters of two
// (docs/notes/kernels.md), while clusters cost whole tiles at the edges.
//
// Shared memory: x and w rows are 128 bytes, swizzled in atoms of 8 rows (TMA's and wgmma's 128-byte swizzle: chunk c
// of row r lies at c ^ (r & 7)), each tile at a multiple of 1024.
//
// NOTE: an output's bits must not depend on the number of rows, so every configuration sums over k in the same order,
// in steps of 32 bytes, without split-k. The width of a wgmma doesn't change them (docs/notes/kernels.md).
//
// Launch: grid of one dimension, any size up to the number of tiles; block kNumThreads; dynamic shared memory
// kSharedBytes. Tensor maps, all with the 128-byte swizzle and boxes of 128 bytes: x's of x_box_rows rows, w's of
// BLOCK_N, y's of 16. x, w and their row strides are multiples of 16 bytes; so are y and its stride if kTmaStore.
// 0 < rows, in_features, out_features.
#pragma once

#include "epilogue.cuh"
#include "fused_linear.cuh"
#include "operands.cuh"
#include "ptx_sm90.cuh"
#include "wgmma.cuh"

// The one kernel argument. Host twin: pipeline/kernels/fused_linear_sm90.py.
template <typename EpilogueParameters>
struct FusedLinearSm90Args {
  TensorMap x;
  TensorMap w;
  TensorMap y;
  const void* bias;
  void* y_data;  // and y_stride, in elements: y once more, for stores without the copy engine
  long long y_stride;
  const float* x_scales;  // factors of sums, by row and by output feature; null if not kScaled
  const float* w_scales;
  int rows;
  int in_features;
  int out_features;
  int band_rows;   // rows of tiles in a band: see Walk
  int x_box_rows;  // the rows of a box of x's map: BLOCK_M, or fewer if x has fewer
  EpilogueParameters epilogue;
};

template <typename Out>
__device__ __forceinline__ unsigned pack(float v0, float v1);
template <>
__device__ __forceinline__ unsigned pack<__half>(float v0, float v1) {
  const __half2 packed = __floats2half2_rn(v0, v1);
  return *reinterpret_cast<const unsigned*>(&packed);
}
template <>
__device__ __forceinline__ unsigned pack<__nv_bfloat16>(float v0, float v1) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(v0, v1);
  return *reinterpret_cast<const unsigned*>(&packed);
}

template <typename Operands, typename Out, typename Epilogue, int BLOCK_M, int BLOCK_N, int kNumStages, bool kTmaStore>
struct FusedLinearSm90 {
  using Args = FusedLinearSm90Args<typename Epilogue::Parameters>;
  using In = typename Operands::Element;
  using BiasElement = typename Operands::BiasElement;
  static constexpr bool kPromoted = Operands::kPromoteEvery > 0;
  static constexpr bool kInTurns = !kPromoted;

  static constexpr int kConsumerThreads = 2 * 128;
  static constexpr int kNumThreads = kConsumerThreads + 128;
  static constexpr int kWarpgroupRows = kInTurns ? BLOCK_M : BLOCK_M / 2;  // rows of a tile
  static constexpr int kParts = kWarpgroupRows / 64;                       // a wgmma has 64 rows

  static constexpr int kRowBytes = 128;
  static constexpr int BLOCK_K = kRowBytes / sizeof(In);
  static constexpr int kBytesX = BLOCK_M * kRowBytes;
  static constexpr int kStageBytes = (BLOCK_M + BLOCK_N) * kRowBytes;

  // A warp's output leaves in slices of 16 rows x 128 bytes, through buffers of its own: two if they fit.
  static constexpr int kSliceColumns = kRowBytes / sizeof(Out);
  static constexpr int kSlices = (BLOCK_N + kSliceColumns - 1) / kSliceColumns;
  static constexpr int kSliceBytes = 16 * kRowBytes;
  static constexpr int kBufferBytes = kConsumerThreads / 32 * kSliceBytes;  // one for each warp
  static constexpr int kStoreBuffers = kNumStages * (kStageBytes + 16) + 16 + 2 * kBufferBytes <= 227 * 1024 ? 2 : 1;
  static constexpr int kStoreBytes = kTmaStore ? kStoreBuffers * kBufferBytes : 0;

  static constexpr int kBarriersOffset = kNumStages * kStageBytes + kStoreBytes;
  static constexpr int kTurnsOffset = kBarriersOffset + kNumStages * 16;
  static constexpr int kSharedBytes = kTurnsOffset + 16;

  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static_assert(sizeof(In) == 2 || sizeof(In) == 4, "bf16, fp16, or fp32 as tf32");
  static_assert(kWarpgroupRows % 64 == 0 && BLOCK_N <= 256, "whole wgmmas");
  // Two sets of accumulators and half a one where they are promoted; some registers are needed for all else.
  static_assert(kParts * BLOCK_N * (kPromoted ? 5 : 2) / 4 <= 216, "accumulators fit the registers");
  static_assert(BLOCK_N % 8 == 0 && BLOCK_N >= kSliceColumns, "see store");
  static_assert(kBytesX % 1024 == 0 && kStageBytes % 1024 == 0, "swizzle atoms are aligned");
  static_assert(kNumStages >= 2, "loads overlap products");

  // One thread's accumulators of 64 rows; wgmma.cuh says which element is where.
  using Accumulators = float[BLOCK_N / 2];

  struct Ring {
    unsigned stages, barriers;
    unsigned stage = 0, parity = 0;

    __device__ __forceinline__ Ring(unsigned shared) : stages(shared), barriers(shared + kBarriersOffset) {}
    __device__ __forceinline__ unsigned data() const { return stages + stage * kStageBytes; }
    __device__ __forceinline__ unsigned full() const { return barriers + stage * 16; }
    __device__ __forceinline__ unsigned empty() const { return barriers + stage * 16 + 8; }
    __device__ __forceinline__ void advance() {
      if (++stage == kNumStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    __device__ __forceinline__ void skip(unsigned k_tiles) {
      const unsigned end = stage + k_tiles;
      stage = end % kNumStages;
      parity ^= end / kNumStages & 1;
    }
  };

  // The walk over the output. `band_rows` rows of tiles form a band; within a band the walk goes down a column of it,
  // then to the next column, so that w is read once a band while x's rows of the band stay in L2.
  struct Walk {
    unsigned rows, columns, tiles, band_rows;

    __device__ __forceinline__ explicit Walk(const Args& args) {
      rows = (static_cast<unsigned>(args.rows) + BLOCK_M - 1) / BLOCK_M;
      columns = (static_cast<unsigned>(args.out_features) + BLOCK_N - 1) / BLOCK_N;
      tiles = rows * columns;
      band_rows = args.band_rows;
    }

    // First row and column of a tile.
    __device__ __forceinline__ void origin(unsigned tile, int& m0, int& n0) const {
      const unsigned band = tile / (band_rows * columns);
      const unsigned in_band = tile - band * band_rows * columns;
      const unsigned height = min(band_rows, rows - band * band_rows);
      const unsigned column = in_band / height;
      m0 = static_cast<int>((band * band_rows + in_band - column * height) * BLOCK_M);
      n0 = static_cast<int>(column * BLOCK_N);
    }
  };

  // What the producer, one thread, does: it fills the ring, tile after tile.
  static __device__ __forceinline__ void produce(const Args& args, Ring ring, const Walk& walk, int k_tiles) {
    const unsigned stage_bytes = (args.x_box_rows + BLOCK_N) * kRowBytes;
    for (unsigned tile = blockIdx.x; tile < walk.tiles; tile += gridDim.x) {
      int m0, n0;
      walk.origin(tile, m0, n0);
#pragma unroll 1
      for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
        ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);  // the first round finds every stage free
        ptx::mbarrier_arrive_expect_tx(ring.full(), stage_bytes);
        ptx::tma_load(ring.data(), &args.x, k_tile * BLOCK_K, m0, ring.full());
        ptx::tma_load(ring.data() + kBytesX, &args.w, k_tile * BLOCK_K, n0, ring.full());
        ring.advance();
      }
    }
  }

  // Keeps the compiler from moving accumulators about while products are in flight.
  static __device__ __forceinline__ void pin(Accumulators (&d)[kParts]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < BLOCK_N / 2; ++i) asm volatile("" : "+f"(d[part][i])::"memory");
    }
  }

  // Whose turn it is to multiply. A barrier of the ring tells one round of its stage from the next, but not from the
  // one after that: a warpgroup may only wait for its first k-tile once the other has seen its own last one arrive.
  struct Turn {
    unsigned mine, others;
    unsigned parity;

    __device__ __forceinline__ Turn(unsigned shared, unsigned warpgroup)
        : mine(shared + kTurnsOffset + warpgroup * 8),
          others(shared + kTurnsOffset + (warpgroup ^ 1) * 8),
          parity(warpgroup ^ 1) {}  // the first turn is warpgroup 0's at once
    __device__ __forceinline__ void wait() {
      ptx::mbarrier_wait(others, parity);
      parity ^= 1;
    }
    __device__ __forceinline__ void pass(unsigned lane) const {
      if (lane == 0) ptx::mbarrier_arrive(mine);
    }
  };

  // Queues products `first` to `last` - 1 of the k-tile in shared memory at `stage`. `first_row` is the warpgroup's in
  // the tile; `begin`: the accumulators start anew.
  static __device__ __forceinline__ void queue_products(Accumulators (&d)[kParts], unsigned stage, unsigned first_row,
                                                        int first, int last, bool begin) {
    constexpr unsigned kPartStep = 64 * kRowBytes / 16;  // in a descriptor
    const unsigned long long x = ptx::wgmma_descriptor(stage + first_row * kRowBytes);
    const unsigned long long w = ptx::wgmma_descriptor(stage + kBytesX);
#pragma unroll
    for (int product = first; product < last; ++product) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        ptx::Wgmma<In, BLOCK_N>::multiply(d[part], x + part * kPartStep + 2 * Operands::x_step(product),
                                          w + 2 * Operands::w_step(product), product > first || !begin);
      }
    }
  }

  // One consumer warpgroup's products for a tile, in one accumulator each. One group of them is in flight while the
  // next is queued.
  static __device__ __forceinline__ void multiply(Accumulators (&d)[kParts], Ring& ring, Turn& turn, int k_tiles,
                                                  unsigned lane) {
    unsigned unreleased = 0;
    turn.wait();
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      ptx::mbarrier_wait(ring.full(), ring.parity);
      if (k_tile == k_tiles - 1) turn.pass(lane);
      pin(d);
      ptx::wgmma_fence();
      queue_products(d, ring.data(), 0, 0, Operands::kProducts, k_tile == 0);
      ptx::wgmma_commit();
      pin(d);
      ptx::wgmma_wait<1>();
      if (k_tile > 0 && lane == 0) ptx::mbarrier_arrive(unreleased);
      unreleased = ring.empty();
      ring.advance();
    }
    ptx::wgmma_wait<0>();
    pin(d);
    if (lane == 0) ptx::mbarrier_arrive(unreleased);
  }

  // The leading bits of a thread's sums, two sums a pair.
  using LeadingBits = __nv_bfloat162[BLOCK_N / 4];

  // Sets aside the leading bits of every eighth 8 columns' totals, so that in 8 turns it is all columns' once. `turn`
  // goes by a column's place in y, not in the tile: its bits don't depend on BLOCK_N.
  //
  // NOTE: all columns at once took longer than the products in flight behind which it is meant to vanish, since it has
  // few registers for its chains of additions (docs/notes/kernels.md).
  static constexpr int kFoldTurns = 8;
  static __device__ __forceinline__ void set_some_aside(LeadingBits (&leading)[kParts], Accumulators (&total)[kParts],
                                                        unsigned turn) {
#pragma unroll
    for (unsigned columns = 0; columns < kFoldTurns; ++columns) {
      if (turn != columns) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 4 * columns; i < BLOCK_N / 2; i += 4 * kFoldTurns) {
          set_aside(leading[part][i / 2], total[part][i], total[part][i + 1]);
          set_aside(leading[part][i / 2 + 1], total[part][i + 2], total[part][i + 3]);
        }
      }
    }
  }

  // As `multiply`, with promotion: each group of kPromoteEvery k-tiles starts the accumulators anew, small products of
  // the whole group first, and its sums are added to `total`. `first_column` is the tile's.
  static __device__ __forceinline__ void multiply_promoted(Accumulators (&total)[kParts], Ring& ring, int k_tiles,
                                                           unsigned first_row, unsigned first_column, unsigned lane) {
    constexpr int kGroup = Operands::kPromoteEvery;
    static_assert(kNumStages > kGroup, "the next group loads meanwhile");
    Accumulators d[kParts];
    LeadingBits leading[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < BLOCK_N / 2; ++i) total[part][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) leading[part][i] = __floats2bfloat162_rn(0.0f, 0.0f);
    }
    const int groups = k_tiles / kGroup;
    const int groups_per_turn = fold_interval(k_tiles) / (kFoldTurns * kGroup);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      unsigned stages[kGroup], unreleased[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        ptx::mbarrier_wait(ring.full(), ring.parity);
        stages[i] = ring.data();
        unreleased[i] = ring.empty();
        ring.advance();
      }
      pin(d);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        queue_products(d, stages[i], first_row, 0, Operands::kSmallProducts, i == 0);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        queue_products(d, stages[i], first_row, Operands::kSmallProducts, Operands::kProducts, false);
      }
      ptx::wgmma_commit();
      pin(d);
      if (group % groups_per_turn == 0) {
        set_some_aside(leading, total, (group / groups_per_turn - first_column / 8) % kFoldTurns);
      }
      ptx::wgmma_wait<0>();
      pin(d);
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) ptx::mbarrier_arrive(unreleased[i]);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) total[part][i] = __fadd_rn(total[part][i], d[part][i]);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float* sums = total[part];
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) put_back(leading[part][i], sums[2 * i], sums[2 * i + 1]);
    }
  }

  // Values that belong to a tile's columns, spread over a warp: lane l holds those of columns 64 i + 2 l and the next.
  template <typename T>
  struct ColumnValues {
    static constexpr int kChunks = (BLOCK_N + 63) / 64;
    unsigned words[kChunks][2];

    // Starts the loads, which arrive while the tile is multiplied. Zeros if `values` is null.
    __device__ __forceinline__ ColumnValues(const void* values, int n0, int columns, unsigned lane) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = n0 + i * 64 + 2 * static_cast<int>(lane) + c;
          words[i][c] = 0;
          if (values != nullptr && column < columns) {
            if constexpr (sizeof(T) == 2) {
              words[i][c] = __ldg(static_cast<const unsigned short*>(values) + column);
            } else {
              words[i][c] = __ldg(static_cast<const unsigned*>(values) + column);
            }
          }
        }
      }
    }

    // Joins 16-bit pairs in words[..][0], so that one shuffle moves both. Once, before the first `of`.
    __device__ __forceinline__ void join() {
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) words[i][0] |= words[i][1] << 16;
      }
    }

    // The two values that go with this thread's accumulators 4 j to 4 j + 3. All lanes call it.
    __device__ __forceinline__ float2 of(int j, unsigned lane) const {
      const unsigned source = 4 * (j % 8) + lane % 4;
      const unsigned first = __shfl_sync(0xffffffff, words[j / 8][0], source);
      if constexpr (sizeof(T) == 2) {
        const unsigned short low = first & 0xffff, high = first >> 16;
        return {to_float(*reinterpret_cast<const T*>(&low)), to_float(*reinterpret_cast<const T*>(&high))};
      } else {
        return {__uint_as_float(first), __uint_as_float(__shfl_sync(0xffffffff, words[j / 8][1], source))};
      }
    }
  };

  // What turns a tile's sums into outputs.
  struct Finish {
    ColumnValues<BiasElement> bias;
    ColumnValues<float> w_scales;
    float x_scales[2];  // this thread's upper row's and that of the one 8 below
    Epilogue epilogue;
    unsigned lane;

    __device__ __forceinline__ Finish(const Args& args, int n0, unsigned lane)
        : bias(args.bias, n0, args.out_features, lane),
          w_scales(Operands::kScaled ? args.w_scales : nullptr, n0, args.out_features, lane),
          epilogue{args.epilogue},
          lane(lane) {}

    __device__ __forceinline__ void load_rows(const Args& args, int row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int mine = row + static_cast<int>(lane) / 4 + 8 * i;
        x_scales[i] = Operands::kScaled && mine < args.rows ? __ldg(args.x_scales + mine) : 0.0f;
      }
    }

    // y for this thread's accumulators 4 j to 4 j + 3: columns 8 j + 2 (lane % 4) and the next, in its upper row and in
    // the one 8 below. `row` and `column` are those of the warp's first row and of the tile's first column.
    __device__ __forceinline__ float4 operator()(const float* d, int j, int row, int column) const {
      float z[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
      if constexpr (Operands::kScaled) {  // powers of two: exact
        const float2 scale = w_scales.of(j, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i] = __fmul_rn(__fmul_rn(z[i], i % 2 ? scale.y : scale.x), x_scales[i / 2]);
      }
      const float2 b = bias.of(j, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        z[i] = epilogue(__fadd_rn(z[i], i % 2 ? b.y : b.x), row + static_cast<int>(lane) / 4 + i / 2 * 8,
                        column + 8 * j + static_cast<int>(lane) % 4 * 2 + i % 2);
      }
      return {z[0], z[1], z[2], z[3]};
    }
  };

  // Stores a warp's rows `row` to `row` + 15 of the tile, slice by slice, through its own buffers. A last slice that
  // would reach past the tile starts earlier and stores some columns once more.
  static __device__ __forceinline__ void store(const Args& args, const float* d, int row, int column,
                                               const Finish& finish, unsigned lane, unsigned buffers) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const int first =
          slice * kSliceColumns + kSliceColumns <= BLOCK_N ? slice * kSliceColumns : BLOCK_N - kSliceColumns;
      const unsigned buffer = buffers + slice % kStoreBuffers * kSliceBytes;
      if (lane == 0) {  // the final slice of the 64 rows before may have gone through this same buffer
        if (slice == 0) {
          ptx::bulk_wait_read<0>();
        } else {
          ptx::bulk_wait_read<kStoreBuffers - 1>();
        }
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kSliceColumns / 8; j += 2) {
        const float4 v0 = finish(d, first / 8 + j, row, column);
        const float4 v1 = finish(d, first / 8 + j + 1, row, column);
        if constexpr (sizeof(Out) == 2) {
          const unsigned lane_row = buffer + lane % 16 * kRowBytes;
          ptx::stmatrix_x4(lane_row + ((j + lane / 16) ^ (lane & 7)) * 16, pack<Out>(v0.x, v0.y), pack<Out>(v0.z, v0.w),
                           pack<Out>(v1.x, v1.y), pack<Out>(v1.z, v1.w));
        } else {
          const unsigned lane_row = buffer + lane / 4 * kRowBytes + lane % 2 * 8;
          const unsigned address0 = lane_row + ((2 * j + lane % 4 / 2) ^ (lane / 4)) * 16;
          const unsigned address1 = lane_row + ((2 * j + 2 + lane % 4 / 2) ^ (lane / 4)) * 16;
          ptx::st_shared_8(address0, v0.x, v0.y);
          ptx::st_shared_8(address0 + 8 * kRowBytes, v0.z, v0.w);
          ptx::st_shared_8(address1, v1.x, v1.y);
          ptx::st_shared_8(address1 + 8 * kRowBytes, v1.z, v1.w);
        }
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        ptx::tma_store(&args.y, column + first, row, buffer);
        ptx::bulk_commit();
      }
    }
  }

  // Stores the same rows straight from registers, for a y that the copy engine can't write.
  static __device__ __forceinline__ void store_directly(const Args& args, const float* d, int row, int column,
                                                        const Finish& finish, unsigned lane) {
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; ++j) {
      const float4 v = finish(d, j, row, column);
      const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int y_row = row + static_cast<int>(lane) / 4 + i / 2 * 8;
        const int y_column = column + 8 * j + static_cast<int>(lane) % 4 * 2 + i % 2;
        if (y_row < args.rows && y_column < args.out_features) {
          static_cast<Out*>(args.y_data)[y_row * args.y_stride + y_column] = from_float<Out>(values[i]);
        }
      }
    }
  }

  // One consumer warpgroup, tile after tile.
  static __device__ __forceinline__ void consume(const Args& args, Ring ring, const Walk& walk, int k_tiles,
                                                 unsigned shared) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // in a uniform register, for descriptors
    const unsigned warpgroup = warp / 4;
    const unsigned buffers = shared + kNumStages * kStageBytes + warp * kStoreBuffers * kSliceBytes;
    const unsigned first_row = kInTurns ? 0 : warpgroup * kWarpgroupRows;
    unsigned tile = blockIdx.x;
    if (kInTurns && warpgroup == 1) {
      ring.skip(k_tiles);
      tile += gridDim.x;
    }
    Turn turn(shared, warpgroup);
    Accumulators sums[kParts];
    for (; tile < walk.tiles; tile += (kInTurns ? 2 : 1) * gridDim.x) {
      int m0, n0;
      walk.origin(tile, m0, n0);
      m0 += first_row + warp % 4 * 16;
      Finish finish(args, n0, lane);
      if constexpr (kInTurns) {
        multiply(sums, ring, turn, k_tiles, lane);
        ring.skip(k_tiles);  // the other's
      } else {
        multiply_promoted(sums, ring, k_tiles, first_row, n0, lane);
      }
      finish.bias.join();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        finish.load_rows(args, m0 + part * 64);
        if constexpr (kTmaStore) {
          store(args, sums[part], m0 + part * 64, n0, finish, lane, buffers);
        } else {
          store_directly(args, sums[part], m0 + part * 64, n0, finish, lane);
        }
      }
    }
    if (lane == 0) ptx::bulk_wait_read<0>();
  }

  static __device__ __forceinline__ void run(const Args& args) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const unsigned shared = ptx::shared_address(shared_bytes);
    const Ring ring(shared);
    const Walk walk(args);
    constexpr int kGroup = kPromoted ? Operands::kPromoteEvery : 1;  // past in_features the copy engine reads zeros
    const int k_tiles = (args.in_features + BLOCK_K * kGroup - 1) / (BLOCK_K * kGroup) * kGroup;

    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kNumStages; ++stage) {
        ptx::mbarrier_init(ring.barriers + stage * 16, 1);
        ptx::mbarrier_init(ring.barriers + stage * 16 + 8, kInTurns ? 4 : 8);  // a warp each
      }
      for (int warpgroup = 0; warpgroup < 2; ++warpgroup) ptx::mbarrier_init(shared + kTurnsOffset + warpgroup * 8, 4);
      ptx::fence_mbarrier_init();
    }
    if (threadIdx.x == kConsumerThreads) {
      ptx::prefetch_tensormap(&args.x);
      ptx::prefetch_tensormap(&args.w);
      if constexpr (kTmaStore) ptx::prefetch_tensormap(&args.y);
    }
    __syncthreads();

    if (threadIdx.x >= kConsumerThreads) {
      ptx::setmaxnreg_dec<kProducerRegisters>();
      if (threadIdx.x == kConsumerThreads) produce(args, ring, walk, k_tiles);
    } else {
      ptx::setmaxnreg_inc<kConsumerRegisters>();
      consume(args, ring, walk, k_tiles, shared);
    }
  }
};
