// How bytes move: copies and casts of one contiguous row, for the instructions that the processor turns out to have.
//
// Casts round to the nearest, ties to even; NaN stays NaN (its payload may not); infinities, denormals and signed
// zeros are kept. All instruction sets give the same bits. `streaming` stores go past the caches, where the
// instructions and the target's alignment allow it; `fence_streaming` ends a series of them. Any alignment will do.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

enum { kBestIsa, kAtMostAvx2, kPortable };
enum { kLineBytes = 64 };  // a cache line

typedef struct {
  const char* name;
  void (*copy)(char*, const char*, int64_t bytes, int streaming);
  void (*to_bf16)(char*, const char*, int64_t elements);
  void (*to_fp16)(char*, const char*, int64_t elements);
  void (*from_bf16)(char*, const char*, int64_t elements, int streaming);
  void (*from_fp16)(char*, const char*, int64_t elements, int streaming);
} instructions;

// Orders streaming stores: what was stored before it reaches other threads before what is stored after it. Stores that
// don't stream are ordered by whatever tells other threads of them.
static inline void fence_streaming(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- casts, one element ----------------------------------------------------------------------------------------------

static uint32_t load32(const char* p) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  return bits;
}

static uint16_t load16(const char* p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return bits;
}

static uint16_t bf16_of(uint32_t x) {
  if ((x & 0x7fffffff) > 0x7f800000) return (uint16_t)(x >> 16 | 0x40);
  return (uint16_t)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

static uint16_t fp16_of(uint32_t x) {
  uint32_t sign = x >> 16 & 0x8000, size = x & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (size >> 13 & 0x1ff));
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more round to infinity
  if (size < 0x33000001) return (uint16_t)sign;              // 2**-25 and less round to zero
  uint32_t shift = 13, mantissa = size;
  if (size < 0x38800000) {  // a denormal of fp16
    shift = 126 - (size >> 23);
    mantissa = (size & 0x7fffff) | 0x800000;
  } else {
    mantissa -= 112u << 23;
  }
  uint32_t odd = mantissa >> shift & 1;
  return (uint16_t)(sign | ((mantissa + (1u << (shift - 1)) - 1 + odd) >> shift));
}

static uint32_t fp32_of(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0);
  if (exponent) return sign | (exponent + 112) << 23 | mantissa << 13;
  if (!mantissa) return sign;
  uint32_t zeros = (uint32_t)__builtin_clz(mantissa) - 21;  // up to the first 1 of 11 bits
  return sign | (113 - zeros) << 23 | (mantissa << (13 + zeros) & 0x7fffff);
}

static void to_bf16(char* target, const char* source, int64_t elements) {
  for (int64_t i = 0; i < elements; i++) {
    uint16_t y = bf16_of(load32(source + 4 * i));
    memcpy(target + 2 * i, &y, 2);
  }
}

static void to_fp16(char* target, const char* source, int64_t elements) {
  for (int64_t i = 0; i < elements; i++) {
    uint16_t y = fp16_of(load32(source + 4 * i));
    memcpy(target + 2 * i, &y, 2);
  }
}

static void from_bf16(char* target, const char* source, int64_t elements, int streaming) {
  (void)streaming;
  for (int64_t i = 0; i < elements; i++) {
    uint32_t y = (uint32_t)load16(source + 2 * i) << 16;
    memcpy(target + 4 * i, &y, 4);
  }
}

static void from_fp16(char* target, const char* source, int64_t elements, int streaming) {
  (void)streaming;
  for (int64_t i = 0; i < elements; i++) {
    uint32_t y = fp32_of(load16(source + 2 * i));
    memcpy(target + 4 * i, &y, 4);
  }
}

static void copy(char* target, const char* source, int64_t bytes, int streaming) {
  (void)streaming;
  memcpy(target, source, (size_t)bytes);
}

static const instructions kPortableCode = {"portable", copy, to_bf16, to_fp16, from_bf16, from_fp16};

// --- the same with vector instructions -------------------------------------------------------------------------------

#if defined(__x86_64__)

// Bytes, a multiple of `unit`, until `target` lies on the boundary of a cache line; all of them if it never does.
//
// NOTE: streaming stores are for whole lines. Where other stores go to the same line, the processor writes it to memory
// in parts, which is several times slower (docs/notes/staging.md).
static int64_t head_of(const char* target, int64_t unit, int64_t bytes) {
  int64_t head = -(int64_t)(uintptr_t)target & (kLineBytes - 1);
  return head % unit || head > bytes ? bytes : head;
}

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

AVX512 static void copy_avx512(char* target, const char* source, int64_t bytes, int streaming) {
  int64_t i = streaming ? head_of(target, 1, bytes) : bytes;
  memcpy(target, source, (size_t)i);
  for (; i + 256 <= bytes; i += 256) {
    __m512i a = _mm512_loadu_si512(source + i), b = _mm512_loadu_si512(source + i + 64);
    __m512i c = _mm512_loadu_si512(source + i + 128), d = _mm512_loadu_si512(source + i + 192);
    _mm512_stream_si512((void*)(target + i), a);
    _mm512_stream_si512((void*)(target + i + 64), b);
    _mm512_stream_si512((void*)(target + i + 128), c);
    _mm512_stream_si512((void*)(target + i + 192), d);
  }
  memcpy(target + i, source + i, (size_t)(bytes - i));
}

// How many bytes ahead the casts ask for what has to come from memory: a page, since the processor's own prefetching
// stops at the end of one (docs/notes/staging.md).
enum { kAhead = 4096 };

// The rounded upper halves of 16 fp32 as the upper halves of 16 words.
// NOTE: not VCVTNE2PS2BF16: it takes denormals for zero, whatever MXCSR says (Intel SDM, volume 2).
AVX512 static __m512i rounded_avx512(const char* source) {
  __m512i x = _mm512_loadu_si512(source);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(x), _mm512_castsi512_ps(x), _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, x, _mm512_set1_epi32(0x400000));
}

AVX512 static void to_bf16_avx512(char* target, const char* source, int64_t elements) {
  static const uint16_t kOddWords[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                         33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_loadu_si512(kOddWords);
  int64_t i = 0;
  for (; i + 32 <= elements; i += 32) {
    _mm_prefetch(source + 4 * i + kAhead, _MM_HINT_T0);
    _mm_prefetch(source + 4 * i + kAhead + 64, _MM_HINT_T0);
    __m512i low = rounded_avx512(source + 4 * i), high = rounded_avx512(source + 4 * i + 64);
    _mm512_storeu_si512(target + 2 * i, _mm512_permutex2var_epi16(low, upper, high));
  }
  to_bf16(target + 2 * i, source + 4 * i, elements - i);
}

AVX512 static void to_fp16_avx512(char* target, const char* source, int64_t elements) {
  int64_t i = 0;
  for (; i + 16 <= elements; i += 16) {
    _mm_prefetch(source + 4 * i + kAhead, _MM_HINT_T0);
    __m256i y = _mm512_cvtps_ph(_mm512_loadu_ps(source + 4 * i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((void*)(target + 2 * i), y);
  }
  to_fp16(target + 2 * i, source + 4 * i, elements - i);
}

AVX512 static inline void store_avx512(char* target, __m512i x, int streaming) {
  if (streaming) {
    _mm512_stream_si512((void*)target, x);
  } else {
    _mm512_storeu_si512(target, x);
  }
}

AVX512 static void from_bf16_avx512(char* target, const char* source, int64_t elements, int streaming) {
  int64_t i = streaming ? head_of(target, 4, 4 * elements) / 4 : 0;
  from_bf16(target, source, i, 0);
  for (; i + 16 <= elements; i += 16) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void*)(source + 2 * i)));
    store_avx512(target + 4 * i, _mm512_slli_epi32(x, 16), streaming);
  }
  from_bf16(target + 4 * i, source + 2 * i, elements - i, 0);
}

AVX512 static void from_fp16_avx512(char* target, const char* source, int64_t elements, int streaming) {
  int64_t i = streaming ? head_of(target, 4, 4 * elements) / 4 : 0;
  from_fp16(target, source, i, 0);
  for (; i + 16 <= elements; i += 16) {
    __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const void*)(source + 2 * i)));
    store_avx512(target + 4 * i, _mm512_castps_si512(x), streaming);
  }
  from_fp16(target + 4 * i, source + 2 * i, elements - i, 0);
}

static const instructions kAvx512Code = {"AVX-512",      copy_avx512,      to_bf16_avx512,
                                         to_fp16_avx512, from_bf16_avx512, from_fp16_avx512};

#define AVX2 __attribute__((target("avx2,f16c")))

AVX2 static void copy_avx2(char* target, const char* source, int64_t bytes, int streaming) {
  int64_t i = streaming ? head_of(target, 1, bytes) : bytes;
  memcpy(target, source, (size_t)i);
  for (; i + 128 <= bytes; i += 128) {
    __m256i a = _mm256_loadu_si256((const void*)(source + i)), b = _mm256_loadu_si256((const void*)(source + i + 32));
    __m256i c = _mm256_loadu_si256((const void*)(source + i + 64));
    __m256i d = _mm256_loadu_si256((const void*)(source + i + 96));
    _mm256_stream_si256((void*)(target + i), a);
    _mm256_stream_si256((void*)(target + i + 32), b);
    _mm256_stream_si256((void*)(target + i + 64), c);
    _mm256_stream_si256((void*)(target + i + 96), d);
  }
  memcpy(target + i, source + i, (size_t)(bytes - i));
}

// The rounded upper halves of 8 fp32 as the lower halves of 8 words.
AVX2 static __m256i rounded_avx2(const char* source) {
  __m256i x = _mm256_loadu_si256((const void*)source);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(x), _CMP_UNORD_Q);
  __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
}

AVX2 static void to_bf16_avx2(char* target, const char* source, int64_t elements) {
  int64_t i = 0;
  for (; i + 16 <= elements; i += 16) {
    __m256i y = _mm256_packus_epi32(rounded_avx2(source + 4 * i), rounded_avx2(source + 4 * i + 32));
    _mm256_storeu_si256((void*)(target + 2 * i), _mm256_permute4x64_epi64(y, _MM_SHUFFLE(3, 1, 2, 0)));
  }
  to_bf16(target + 2 * i, source + 4 * i, elements - i);
}

AVX2 static void to_fp16_avx2(char* target, const char* source, int64_t elements) {
  int64_t i = 0;
  for (; i + 8 <= elements; i += 8) {
    __m128i y = _mm256_cvtps_ph(_mm256_loadu_ps((const void*)(source + 4 * i)), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((void*)(target + 2 * i), y);
  }
  to_fp16(target + 2 * i, source + 4 * i, elements - i);
}

AVX2 static inline void store_avx2(char* target, __m256i x, int streaming) {
  if (streaming) {
    _mm256_stream_si256((void*)target, x);
  } else {
    _mm256_storeu_si256((void*)target, x);
  }
}

AVX2 static void from_bf16_avx2(char* target, const char* source, int64_t elements, int streaming) {
  int64_t i = streaming ? head_of(target, 4, 4 * elements) / 4 : 0;
  from_bf16(target, source, i, 0);
  for (; i + 16 <= elements; i += 16) {
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void*)(source + 2 * i)));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void*)(source + 2 * i + 16)));
    store_avx2(target + 4 * i, _mm256_slli_epi32(low, 16), streaming);
    store_avx2(target + 4 * i + 32, _mm256_slli_epi32(high, 16), streaming);
  }
  from_bf16(target + 4 * i, source + 2 * i, elements - i, 0);
}

AVX2 static void from_fp16_avx2(char* target, const char* source, int64_t elements, int streaming) {
  int64_t i = streaming ? head_of(target, 4, 4 * elements) / 4 : 0;
  from_fp16(target, source, i, 0);
  for (; i + 16 <= elements; i += 16) {
    __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const void*)(source + 2 * i)));
    __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const void*)(source + 2 * i + 16)));
    store_avx2(target + 4 * i, _mm256_castps_si256(low), streaming);
    store_avx2(target + 4 * i + 32, _mm256_castps_si256(high), streaming);
  }
  from_fp16(target + 4 * i, source + 2 * i, elements - i, 0);
}

static const instructions kAvx2Code = {"AVX2", copy_avx2, to_bf16_avx2, to_fp16_avx2, from_bf16_avx2, from_fp16_avx2};

static const instructions* best_instructions(int isa) {
  unsigned a, b, c = 0, d;
  int f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  int avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == kBestIsa && avx512) return &kAvx512Code;
  if (isa <= kAtMostAvx2 && f16c && __builtin_cpu_supports("avx2")) return &kAvx2Code;
  return &kPortableCode;
}

#else

static const instructions* best_instructions(int isa) {
  (void)isa;
  return &kPortableCode;
}

#endif
