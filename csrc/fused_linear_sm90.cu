// y = epilogue(x w^T + bias): Hopper's tensor cores fed by the bulk tensor copy engine (TMA + wgmma), sm_90a.
//
//   x (rows, in_features), w (out_features, in_features), y (rows, out_features), bias (out_features,) or null.
//   Row-major. bf16, fp16, or fp32 that the copy engine rounds to tf32 (nearest) on the way in; fp32 accumulation; one
//   rounding to y's element type at the end.
//
// The kernel is persistent: clusters of CLUSTER_M x CLUSTER_N blocks walk the output together, each block computing a
// BLOCK_M x BLOCK_N tile at a time. One thread, the producer, keeps a ring of kNumStages k-tiles full; the consumer
// warpgroups, each with 64 rows of the tile in registers, multiply them. Blocks of a cluster that share
// rows of x load a part of them each and multicast it to the others; the same for w. So a stage is free when the
// consumers of all blocks that receive the same data have read it, and consumers release it to each of those blocks.
//
// Consumers wait for nothing but full stages. Outputs leave through small buffers of each warp's own and TMA stores,
// while the producer loads the next tile.
//
// Shared memory: x and w rows are 128 bytes, swizzled in atoms of 8 rows (TMA's and wgmma's 128-byte swizzle: chunk c
// of row r lies at c ^ (r & 7)), each tile at a multiple of 1024.
//
// NOTE: an output's bits must not depend on the number of rows, so every configuration sums over k in the same order,
// in steps of 32 bytes, in one accumulator, without split-k. The width of a wgmma doesn't change them (measured).
//
// Launch: cluster of CLUSTER_M CLUSTER_N blocks (compiled in); grid of one dimension, a multiple of it; block
// kNumThreads; dynamic shared memory kSharedBytes. Tensor maps, all with the 128-byte swizzle and boxes of 128 bytes:
// x's of x_box_rows rows, w's of BLOCK_N / CLUSTER_M, y's of 16. x, w and their row strides are multiples of 16 bytes;
// so are y and its stride if kTmaStore. 0 < rows, in_features, out_features.
#include "epilogue.cuh"
#include "fused_linear.cuh"
#include "ptx_sm90.cuh"
#include "wgmma.cuh"

// The one kernel argument. Host twin: `FusedLinearSm90Args` in pipeline/kernels/launch.py.
struct FusedLinearSm90Args {
  TensorMap x;
  TensorMap w;
  TensorMap y;
  const void* bias;
  void* y_data;  // and y_stride, in elements: y once more, for stores without the copy engine
  long long y_stride;
  int rows;
  int in_features;
  int out_features;
  int band_rows;   // rows of clusters in a band: see Walk
  int x_box_rows;  // of x's map: BLOCK_M / CLUSTER_N, or fewer if x has fewer
  float scaling_factor;
};
static_assert(sizeof(FusedLinearSm90Args) == 448, "the host twin packs 448 bytes");

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

template <typename In, typename Out, typename Epilogue, int BLOCK_M, int BLOCK_N, int CLUSTER_M, int CLUSTER_N,
          int kNumStages, bool kTmaStore>
struct FusedLinearSm90 {
  static constexpr int kConsumers = BLOCK_M >= 128 ? 2 : 1;
  static constexpr int kConsumerThreads = kConsumers * 128;
  static constexpr int kNumThreads = kConsumerThreads + (kConsumers == 2 ? 128 : 32);
  static constexpr int kClusterBlocks = CLUSTER_M * CLUSTER_N;

  static constexpr int kRowBytes = 128;
  static constexpr int BLOCK_K = kRowBytes / sizeof(In);
  static constexpr int kSteps = 4;  // 32 bytes of k: one wgmma
  static constexpr int kBytesX = BLOCK_M * kRowBytes;
  static constexpr int kStageBytes = (BLOCK_M + BLOCK_N) * kRowBytes;
  static constexpr int kPartX = BLOCK_M / CLUSTER_N;  // rows that one block loads
  static constexpr int kPartW = BLOCK_N / CLUSTER_M;

  // A warp's output leaves in slices of 16 rows x 128 bytes, through two buffers.
  static constexpr int kSliceColumns = kRowBytes / sizeof(Out);
  static constexpr int kSlices = (BLOCK_N + kSliceColumns - 1) / kSliceColumns;
  static constexpr int kSliceBytes = 16 * kRowBytes;
  static constexpr int kStoreBuffers = 2;
  static constexpr int kStoreBytes = kTmaStore ? kConsumerThreads / 32 * kStoreBuffers * kSliceBytes : 0;

  static constexpr int kBarriersOffset = kNumStages * kStageBytes + kStoreBytes;
  static constexpr int kSharedBytes = kBarriersOffset + kNumStages * 16;

  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  static_assert(sizeof(In) == 2 || sizeof(In) == 4, "bf16, fp16, or fp32 as tf32");
  static_assert(BLOCK_M == 64 * kConsumers, "a wgmma has 64 rows");
  static_assert(BLOCK_N <= 256, "accumulators fit the registers");
  static_assert(kPartX % 8 == 0 && kPartX <= 256 && kPartW % 8 == 0 && kPartW <= 256, "whole atoms, TMA's box limit");
  static_assert(BLOCK_N % 16 == 0 && BLOCK_N >= kSliceColumns, "see finish and store");
  static_assert(kBytesX % 1024 == 0 && kStageBytes % 1024 == 0, "swizzle atoms are aligned");
  static_assert(kNumStages >= 2 && kClusterBlocks <= 8, "portable cluster size");

  // The tile's accumulators of one thread; wgmma.cuh says which element is where.
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
  };

  // The walk over the output, in units of clusters. `band_rows` rows of clusters form a band; within a band the
  // walk goes down a column of it, then to the next column, so that w is read once a band while x's rows of the band
  // stay in L2.
  struct Walk {
    unsigned rows, columns, tiles, band_rows;

    __device__ __forceinline__ explicit Walk(const FusedLinearSm90Args& args) {
      rows = (static_cast<unsigned>(args.rows) + BLOCK_M * CLUSTER_M - 1) / (BLOCK_M * CLUSTER_M);
      columns = (static_cast<unsigned>(args.out_features) + BLOCK_N * CLUSTER_N - 1) / (BLOCK_N * CLUSTER_N);
      tiles = rows * columns;
      band_rows = args.band_rows;
    }

    // First row and column of the cluster's tile.
    __device__ __forceinline__ void origin(unsigned tile, int& m0, int& n0) const {
      const unsigned band = tile / (band_rows * columns);
      const unsigned in_band = tile - band * band_rows * columns;
      const unsigned height = min(band_rows, rows - band * band_rows);
      const unsigned column = in_band / height;
      m0 = static_cast<int>((band * band_rows + in_band - column * height) * (BLOCK_M * CLUSTER_M));
      n0 = static_cast<int>(column * (BLOCK_N * CLUSTER_N));
    }
  };

  // Place of this block in its cluster.
  struct Place {
    unsigned rank, m, n;
    __device__ __forceinline__ Place() : rank(kClusterBlocks == 1 ? 0 : ptx::cluster_rank()) {
      m = rank / CLUSTER_N;
      n = rank % CLUSTER_N;
    }
  };

  static __device__ __forceinline__ void load(unsigned destination, const TensorMap* map, int column, int row,
                                              unsigned barrier, int receivers, unsigned short mask) {
    if (receivers == 1) {
      ptx::tma_load(destination, map, column, row, barrier);
    } else {
      ptx::tma_load_multicast(destination, map, column, row, barrier, mask);
    }
  }

  // One thread: fills the ring, tile after tile.
  static __device__ __forceinline__ void produce(const FusedLinearSm90Args& args, Ring ring, const Walk& walk,
                                                 const Place& place, int k_tiles) {
    const auto x_mask = static_cast<unsigned short>(((1u << CLUSTER_N) - 1) << (place.m * CLUSTER_N));
    unsigned w_mask = 0;
#pragma unroll
    for (int m = 0; m < CLUSTER_M; ++m) w_mask |= 1u << (m * CLUSTER_N + place.n);
    const unsigned stage_bytes = (args.x_box_rows * CLUSTER_N + BLOCK_N) * kRowBytes;
    const unsigned x_part = place.n * kPartX, w_part = place.m * kPartW;

    for (unsigned tile = blockIdx.x / kClusterBlocks; tile < walk.tiles; tile += gridDim.x / kClusterBlocks) {
      int m0, n0;
      walk.origin(tile, m0, n0);
      const int x_row = m0 + place.m * BLOCK_M + x_part;
      const int w_row = n0 + place.n * BLOCK_N + w_part;
#pragma unroll 1
      for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
        ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);  // the first round finds every stage free
        ptx::mbarrier_arrive_expect_tx(ring.full(), stage_bytes);
        const unsigned x = ring.data(), w = x + kBytesX;
        load(x + x_part * kRowBytes, &args.x, k_tile * BLOCK_K, x_row, ring.full(), CLUSTER_N, x_mask);
        load(w + w_part * kRowBytes, &args.w, k_tile * BLOCK_K, w_row, ring.full(), CLUSTER_M, w_mask);
        ring.advance();
      }
    }
  }

  // Tells every block whose copies land in this stage, with one lane for each, that this warp has read it.
  static __device__ __forceinline__ void release(unsigned empty_barrier, const Place& place, unsigned lane) {
    if constexpr (kClusterBlocks == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty_barrier);
    } else {
      if (lane < kClusterBlocks && (lane / CLUSTER_N == place.m || lane % CLUSTER_N == place.n)) {
        ptx::mbarrier_arrive_cluster(empty_barrier, lane);
      }
    }
  }

  // Keeps the compiler from moving accumulators about while products are in flight.
  static __device__ __forceinline__ void pin(Accumulators& d) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }

  // One consumer warpgroup's products for a tile. One group of them is in flight while the next is issued.
  static __device__ __forceinline__ void multiply(Accumulators& d, Ring& ring, const Place& place, int k_tiles,
                                                  unsigned warpgroup, unsigned lane) {
    unsigned unreleased = 0;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      ptx::mbarrier_wait(ring.full(), ring.parity);
      const unsigned long long x = ptx::wgmma_descriptor(ring.data() + warpgroup * 64 * kRowBytes);
      const unsigned long long w = ptx::wgmma_descriptor(ring.data() + kBytesX);
      pin(d);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        ptx::Wgmma<In, BLOCK_N>::multiply(d, x + 2 * step, w + 2 * step, k_tile + step);
      }
      ptx::wgmma_commit();
      pin(d);
      ptx::wgmma_wait<1>();
      if (k_tile > 0) release(unreleased, place, lane);
      unreleased = ring.empty();
      ring.advance();
    }
    ptx::wgmma_wait<0>();
    pin(d);
    release(unreleased, place, lane);
  }

  // The biases of a tile, spread over a warp: lane l holds those of columns 64 i + 2 l and the next.
  struct Bias {
    static constexpr int kChunks = (BLOCK_N + 63) / 64;
    unsigned words[kChunks][2];

    // Starts the loads, which arrive while the tile is multiplied.
    __device__ __forceinline__ Bias(const FusedLinearSm90Args& args, int n0, unsigned lane) {
      const In* bias = static_cast<const In*>(args.bias);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = n0 + i * 64 + 2 * static_cast<int>(lane) + c;
          words[i][c] = 0;
          if (bias != nullptr && column < args.out_features) {
            if constexpr (sizeof(In) == 2) {
              words[i][c] = __ldg(reinterpret_cast<const unsigned short*>(bias) + column);
            } else {
              words[i][c] = __float_as_uint(__ldg(bias + column));
            }
          }
        }
      }
    }

    // Joins 16-bit pairs in words[..][0], so that one shuffle moves both. Once, before the first `of`.
    __device__ __forceinline__ void join() {
      if constexpr (sizeof(In) == 2) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) words[i][0] |= words[i][1] << 16;
      }
    }

    // The two biases that go with this thread's accumulators 4 j to 4 j + 3. All lanes call it.
    __device__ __forceinline__ float2 of(int j, unsigned lane) const {
      const unsigned source = 4 * (j % 8) + lane % 4;
      const unsigned first = __shfl_sync(0xffffffff, words[j / 8][0], source);
      if constexpr (sizeof(In) == 2) {
        const unsigned short low = first & 0xffff, high = first >> 16;
        return {to_float(*reinterpret_cast<const In*>(&low)), to_float(*reinterpret_cast<const In*>(&high))};
      } else {
        return {__uint_as_float(first), __uint_as_float(__shfl_sync(0xffffffff, words[j / 8][1], source))};
      }
    }
  };

  // y for this thread's accumulators 4 j to 4 j + 7, j even: in its upper row the columns 8 j + 2 (lane % 4), the next,
  // and those 8 further on, and the same in the row 8 below. Tiles start at multiples of 16 columns, so that these
  // four are the same for every tile size.
  static __device__ __forceinline__ void finish(float (&upper)[4], float (&lower)[4], const float* d, int j,
                                                const Bias& bias, unsigned lane, const Epilogue& epilogue) {
    const float2 b0 = bias.of(j, lane), b1 = bias.of(j + 1, lane);
    const float b[4] = {b0.x, b0.y, b1.x, b1.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = 4 * j + i / 2 * 4 + i % 2;
      upper[i] = __fadd_rn(d[from], b[i]);
      lower[i] = __fadd_rn(d[from + 2], b[i]);
    }
    epilogue(upper);
    epilogue(lower);
  }

  // Stores a warp's rows `row` to `row` + 15 of the tile, slice by slice, through its own buffers. A last slice that
  // would reach past the tile starts earlier and stores some columns once more.
  static __device__ __forceinline__ void store(const FusedLinearSm90Args& args, const float* d, int row, int column,
                                               const Bias& bias, unsigned lane, unsigned buffers) {
    const Epilogue epilogue{args.scaling_factor};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const int first =
          slice * kSliceColumns + kSliceColumns <= BLOCK_N ? slice * kSliceColumns : BLOCK_N - kSliceColumns;
      const unsigned buffer = buffers + slice % kStoreBuffers * kSliceBytes;
      if (lane == 0) {  // the last tile's final slice may have gone through this same buffer
        if (slice == 0) {
          ptx::bulk_wait_read<0>();
        } else {
          ptx::bulk_wait_read<kStoreBuffers - 1>();
        }
      }
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kSliceColumns / 8; j += 2) {
        float upper[4], lower[4];
        finish(upper, lower, d, first / 8 + j, bias, lane, epilogue);
        if constexpr (sizeof(Out) == 2) {
          const unsigned lane_row = buffer + lane % 16 * kRowBytes;
          ptx::stmatrix_x4(lane_row + ((j + lane / 16) ^ (lane & 7)) * 16, pack<Out>(upper[0], upper[1]),
                           pack<Out>(lower[0], lower[1]), pack<Out>(upper[2], upper[3]), pack<Out>(lower[2], lower[3]));
        } else {
          const unsigned lane_row = buffer + lane / 4 * kRowBytes + lane % 2 * 8;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const unsigned address = lane_row + ((2 * (j + i) + lane % 4 / 2) ^ (lane / 4)) * 16;
            ptx::st_shared_8(address, upper[2 * i], upper[2 * i + 1]);
            ptx::st_shared_8(address + 8 * kRowBytes, lower[2 * i], lower[2 * i + 1]);
          }
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

  // The same straight from registers, for a y that the copy engine can't write.
  static __device__ __forceinline__ void store_directly(const FusedLinearSm90Args& args, const float* d, int row,
                                                        int column, const Bias& bias, unsigned lane) {
    const Epilogue epilogue{args.scaling_factor};
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; j += 2) {
      float v[2][4];
      finish(v[0], v[1], d, j, bias, lane, epilogue);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int y_row = row + static_cast<int>(lane) / 4 + i / 4 * 8;
        const int y_column = column + 8 * j + static_cast<int>(lane) % 4 * 2 + i % 4 / 2 * 8 + i % 2;
        if (y_row < args.rows && y_column < args.out_features) {
          static_cast<Out*>(args.y_data)[y_row * args.y_stride + y_column] = from_float<Out>(v[i / 4][i % 4]);
        }
      }
    }
  }

  // One consumer warpgroup, tile after tile.
  static __device__ __forceinline__ void consume(const FusedLinearSm90Args& args, Ring ring, const Walk& walk,
                                                 const Place& place, int k_tiles, unsigned buffers) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned warp = threadIdx.x / 32;
    const unsigned warpgroup = warp / 4;
    Accumulators d;
    for (unsigned tile = blockIdx.x / kClusterBlocks; tile < walk.tiles; tile += gridDim.x / kClusterBlocks) {
      int m0, n0;
      walk.origin(tile, m0, n0);
      m0 += place.m * BLOCK_M + warp * 16;
      n0 += place.n * BLOCK_N;
      Bias bias(args, n0, lane);
      multiply(d, ring, place, k_tiles, warpgroup, lane);
      bias.join();
      if constexpr (kTmaStore) {
        store(args, d, m0, n0, bias, lane, buffers + warp * kStoreBuffers * kSliceBytes);
      } else {
        store_directly(args, d, m0, n0, bias, lane);
      }
    }
    if (lane == 0) ptx::bulk_wait_read<0>();
  }

  static __device__ __forceinline__ void run(const FusedLinearSm90Args& args) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    const unsigned shared = ptx::shared_address(shared_bytes);
    const Ring ring(shared);
    const Walk walk(args);
    const Place place;
    const int k_tiles = (args.in_features + BLOCK_K - 1) / BLOCK_K;

    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kNumStages; ++stage) {
        ptx::mbarrier_init(ring.barriers + stage * 16, 1);
        ptx::mbarrier_init(ring.barriers + stage * 16 + 8, kConsumerThreads / 32 * (CLUSTER_M + CLUSTER_N - 1));
      }
      ptx::fence_mbarrier_init();
    }
    if (threadIdx.x == kConsumerThreads) {
      ptx::prefetch_tensormap(&args.x);
      ptx::prefetch_tensormap(&args.w);
      if constexpr (kTmaStore) ptx::prefetch_tensormap(&args.y);
    }
    __syncthreads();
    if constexpr (kClusterBlocks > 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }

    if (threadIdx.x >= kConsumerThreads) {
      if constexpr (kConsumers == 2) ptx::setmaxnreg_dec<kProducerRegisters>();
      if (threadIdx.x == kConsumerThreads) produce(args, ring, walk, place, k_tiles);
      __syncwarp();
    } else {
      if constexpr (kConsumers == 2) ptx::setmaxnreg_inc<kConsumerRegisters>();
      consume(args, ring, walk, place, k_tiles, shared + kNumStages * kStageBytes);
    }
    if constexpr (kClusterBlocks > 1) {  // no block leaves while another may still signal its barriers
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }
};
