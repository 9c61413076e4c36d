// The interface of the copy workers: see copy_workers.c. pipeline/staging/host_library.py has the structures' twins.

#pragma once

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { COPY, READ_FILE, WRITE_FILE, kNumKinds };
enum { NO_CAST, FP32_TO_BF16, FP32_TO_FP16, BF16_TO_FP32, FP16_TO_FP32, kNumCasts };

// `rows` rows of `length` elements (with a cast) or bytes (without), `*_stride` bytes from one row to the next.
// READ_FILE takes a file for the source, WRITE_FILE for the target, both from byte `offset` on. With a file, each row
// follows the one before at both ends. `map` is where the file's first byte is mapped, shared and to be written, up to
// the last byte of the request: WRITE_FILE may store through it. NULL where the file isn't mapped.
typedef struct {
  int32_t kind, cast, streaming, fresh, fd;
  void* target;
  const void* source;
  int64_t target_stride, source_stride;
  int64_t rows, length;
  int64_t offset;
  void* map;
} copy_request;

// Times are CLOCK_MONOTONIC. `error` is an errno, or -1 for a file that ended before its last byte at `position`.
// EFAULT is that of a page at `position` that couldn't be had: the file was cut, or there is no room.
typedef struct {
  int64_t start_ns, end_ns;
  int64_t position;
  int32_t error;
} copy_result;

typedef struct pool pool;
typedef struct job job;

pool* copy_workers_open(int workers, int isa);
size_t copy_workers_job_bytes(void);
int copy_workers_submit(pool* p, job* j, const copy_request* request);
int copy_workers_done(job* j, copy_result* result);
void copy_workers_wait(pool* p, job* j);
int copy_workers_pending(pool* p);
void copy_workers_close(pool* p);
const char* copy_workers_isa(const pool* p);
int copy_workers_use_maps(void);

static inline int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Called in each turn of a loop that spins.
static inline void relax(void) {
#if defined(__x86_64__)
  _mm_pause();
#else
  atomic_signal_fence(memory_order_seq_cst);
#endif
}
