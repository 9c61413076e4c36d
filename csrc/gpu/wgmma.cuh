// Warpgroup matrix products (wgmma) with both operands in shared memory, K-major, 128-byte swizzle; sm_90a.
//
// `Wgmma<In, N>::multiply` does d = a b + (accumulate ? d : 0) for a 64 x N output and 32 bytes of k. Of the 64 x N
// values, thread t of the warpgroup holds in d[4 j + 2 h + c] the one at row 16 (t / 32) + 8 h + t % 32 / 4, column
// 8 j + 2 (t % 4) + c (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ptx {

// Orders this thread's register and shared-memory accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Blocks until at most `kPending` of the newest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes rows of 128 bytes at `address`, swizzled in atoms of 8 rows of which each starts at a multiple of 1024.
// Adding 2 advances 32 bytes along k, adding 64 n advances 8 n rows.
__device__ __forceinline__ unsigned long long wgmma_descriptor(unsigned address) {
  constexpr unsigned long long kStrideBytes = 1024;  // from one atom to the next
  constexpr unsigned long long kSwizzle128 = 1;
  return (address & 0x3FFFF) >> 4 | kStrideBytes >> 4 << 32 | kSwizzle128 << 62;
}

template <typename In, int N>
struct Wgmma;

// clang-format off
// Each list extends the one before it by eight accumulators, that of 168 by four.
#define WGMMA_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_144 WGMMA_REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_REGISTERS_160 WGMMA_REGISTERS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_REGISTERS_168 WGMMA_REGISTERS_160 ", %80, %81, %82, %83"
#define WGMMA_REGISTERS_176 WGMMA_REGISTERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_REGISTERS_192 WGMMA_REGISTERS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_OPERANDS_16 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WGMMA_OPERANDS_32 WGMMA_OPERANDS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WGMMA_OPERANDS_48 WGMMA_OPERANDS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define WGMMA_OPERANDS_64 WGMMA_OPERANDS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WGMMA_OPERANDS_80 WGMMA_OPERANDS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define WGMMA_OPERANDS_96 WGMMA_OPERANDS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define WGMMA_OPERANDS_112 WGMMA_OPERANDS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define WGMMA_OPERANDS_128 WGMMA_OPERANDS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_OPERANDS_144 WGMMA_OPERANDS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define WGMMA_OPERANDS_160 WGMMA_OPERANDS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define WGMMA_OPERANDS_168 WGMMA_OPERANDS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define WGMMA_OPERANDS_176 WGMMA_OPERANDS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define WGMMA_OPERANDS_192 WGMMA_OPERANDS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])

// A, B, P number the operands after the accumulators: the two descriptors and `accumulate`.
#define WGMMA(N, IN, K, TYPES, SCALES, A, B, P)                                                                     \
  template <>                                                                                                       \
  struct Wgmma<IN, N> {                                                                                             \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], unsigned long long a, unsigned long long b,  \
                                                    int accumulate) {                                               \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #P ", 0;\n"                               \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32." TYPES " {" WGMMA_REGISTERS_##N "}, "       \
                   "%" #A ", %" #B ", accumulate, " SCALES ";\n}"                                                   \
                   : WGMMA_OPERANDS_##N                                                                             \
                   : "l"(a), "l"(b), "r"(accumulate));                                                              \
    }                                                                                                               \
  };
#define WGMMA_ALL_TYPES(N, A, B, P)                                           \
  WGMMA(N, __nv_bfloat16, 16, "bf16.bf16", "1, 1, 0, 0", A, B, P)             \
  WGMMA(N, __half, 16, "f16.f16", "1, 1, 0, 0", A, B, P)                      \
  WGMMA(N, float, 8, "tf32.tf32", "1, 1", A, B, P)

WGMMA_ALL_TYPES(64, 32, 33, 34)
WGMMA_ALL_TYPES(128, 64, 65, 66)
WGMMA_ALL_TYPES(144, 72, 73, 74)
WGMMA_ALL_TYPES(160, 80, 81, 82)
WGMMA_ALL_TYPES(168, 84, 85, 86)
WGMMA_ALL_TYPES(192, 96, 97, 98)
// clang-format on

#undef WGMMA_ALL_TYPES
#undef WGMMA

}  // namespace ptx
