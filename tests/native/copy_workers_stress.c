// Stresses csrc/host/copy_workers.c under the sanitizers: jobs of every kind, all
// instruction sets, several submitting threads, calls that fail.
// tests/staging/test_sanitizers.py builds and runs it. Exits 0 and says what it
// did, or aborts.

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

// The calls of copy_workers.c go through functions of ours, which call these.
static ssize_t troubled_pread(int fd, void* target, size_t bytes, off_t offset);
static ssize_t troubled_pwrite(int fd, const void* source, size_t bytes, off_t offset);
#define pread troubled_pread
#define pwrite troubled_pwrite
#include "../../csrc/host/copy_workers.c"
#undef pread
#undef pwrite
#include "stress.h"

// One call in three moves a part only, one in seven is interrupted; `broken`
// makes all fail from its position on.
static atomic_int calls;
static atomic_llong broken = -1;

static int trouble(size_t* bytes, off_t offset) {
  int n = atomic_fetch_add(&calls, 1);
  if (atomic_load(&broken) >= 0 && offset >= atomic_load(&broken)) {
    errno = EIO;
    return 1;
  }
  if (n % 7 == 3) {
    errno = EINTR;
    return 1;
  }
  if (n % 3 == 1 && *bytes > 5) *bytes = *bytes / 2 + 1;
  return 0;
}

static ssize_t troubled_pread(int fd, void* target, size_t bytes, off_t offset) {
  return trouble(&bytes, offset) ? -1 : pread(fd, target, bytes, offset);
}

static ssize_t troubled_pwrite(int fd, const void* source, size_t bytes, off_t offset) {
  return trouble(&bytes, offset) ? -1 : pwrite(fd, source, bytes, offset);
}

static job* submitted(pool* p, const copy_request* request) {
  job* j = malloc(copy_workers_job_bytes());
  CHECK(j && !copy_workers_submit(p, j, request));
  return j;
}

static copy_result finish(pool* p, job* j, dice* d) {
  copy_result result;
  CHECK(j);
  if (roll(d, 2)) copy_workers_wait(p, j);
  while (!copy_workers_done(j, &result)) relax();
  free(j);
  CHECK(result.start_ns <= result.end_ns);
  return result;
}

static uint32_t odd_fp32(dice* d) {
  static const uint32_t edges[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffffffff,
                                   0x7f7fffff, 0x00000001, 0x3f808000, 0x3f818000, 0x477fefff, 0x477ff000, 0x33000000,
                                   0x33000001, 0x387fe000, 0x38800000, 0x337fffff, 0x007fffff, 0x3f801000, 0x3f803000};
  if (roll(d, 4) == 0) return edges[roll(d, sizeof edges / sizeof *edges)];
  return (uint32_t)(roll(d, 1u << 16) << 16 | roll(d, 1u << 16));
}

typedef struct {
  job* job;
  char *source, *memory, *target, *expected;
  size_t bytes;
} copy_case;

// A copy or cast of rows with random lengths, strides and alignment, and what
// the portable code makes of it, row by row. Exactly the bytes of the request
// lie in the buffers, so that the address sanitizer sees one too many.
static copy_case begin_copy(pool* p, dice* d) {
  int cast = (int)roll(d, kNumCasts);
  int64_t in = source_itemsize(cast), out = target_itemsize(cast);
  int64_t rows = (int64_t)roll(d, 9), length = (int64_t)roll(d, roll(d, 8) ? 300 : 150000);
  if (roll(d, 40) == 0) rows = 1, length = (int64_t)roll(d, 1500000);  // over huge pages
  int64_t source_row = length * in + (int64_t)roll(d, 3) * 7, target_row = length * out + (int64_t)roll(d, 3) * 5;
  int64_t shift = (int64_t)roll(d, 70);
  size_t source_bytes = (size_t)(rows ? (rows - 1) * source_row + length * in : 0);
  size_t target_bytes = (size_t)(rows ? (rows - 1) * target_row + length * out : 0);
  char *source = malloc(source_bytes + 1), *memory = malloc(target_bytes + (size_t)shift + 1), *target = memory + shift;
  char* expected = malloc(target_bytes + 1);
  for (size_t i = 0; i + 4 <= source_bytes; i += 4) {
    uint32_t bits = odd_fp32(d);
    memcpy(source + i, &bits, 4);
  }
  for (size_t i = source_bytes & ~(size_t)3; i < source_bytes; i++) source[i] = 1;
  memset(target, 0x5a, target_bytes);
  memset(expected, 0x5a, target_bytes);

  int backward = rows > 1 && roll(d, 4) == 0;
  copy_request r = {.kind = COPY, .cast = cast, .streaming = (int)roll(d, 2), .fresh = (int)roll(d, 2)};
  r.rows = rows, r.length = length, r.target = target, r.target_stride = target_row;
  r.source = backward ? source + (rows - 1) * source_row : source;
  r.source_stride = backward ? -source_row : source_row;
  job* j = submitted(p, &r);
  for (int64_t i = 0; i < rows; i++) {
    copy_row(&kPortableCode, cast, 0, expected + i * target_row, (const char*)r.source + i * r.source_stride, length);
  }
  return (copy_case){j, source, memory, target, expected, target_bytes};
}

static void end_copy(pool* p, dice* d, copy_case* c) {
  CHECK(finish(p, c->job, d).error == 0);
  CHECK(!memcmp(c->target, c->expected, c->bytes));
  free(c->source);
  free(c->memory);
  free(c->expected);
}

// Up to five at once, so that workers move those that stream and those that
// don't by turns.
static void copy_cases(pool* p, dice* d) {
  copy_case cases[5];
  int count = 1 + (int)roll(d, 5);
  for (int i = 0; i < count; i++) cases[i] = begin_copy(p, d);
  for (int i = 0; i < count; i++) end_copy(p, d, &cases[i]);
}

static void file_case(pool* p, dice* d) {
  int fd = nameless_file();
  size_t bytes = roll(d, 3 << 19) + 1;
  char *there = malloc(bytes), *back = malloc(bytes);
  for (size_t i = 0; i < bytes; i++) there[i] = (char)roll(d, 256);
  copy_request w = {.kind = WRITE_FILE, .fd = fd, .source = there, .rows = 1, .length = (int64_t)bytes, .offset = 77};
  copy_request r = {.kind = READ_FILE, .fd = fd, .target = back, .rows = 1, .length = (int64_t)bytes, .offset = 77};
  CHECK(finish(p, submitted(p, &w), d).error == 0);
  CHECK(finish(p, submitted(p, &r), d).error == 0);
  CHECK(!memcmp(there, back, bytes));
  for (int cast = FP32_TO_BF16; cast < kNumCasts; cast++) {
    // Through the file with a cast, against the cast in memory.
    copy_request with = w;
    with.cast = cast, with.length = (int64_t)bytes / 4;
    char* expected = malloc((size_t)with.length * 4 + 1);
    copy_row(&kPortableCode, cast, 0, expected, there, with.length);
    CHECK(finish(p, submitted(p, &with), d).error == 0);
    copy_request plain = r;
    plain.length = with.length * target_itemsize(cast);
    CHECK(finish(p, submitted(p, &plain), d).error == 0);
    CHECK(!memcmp(back, expected, (size_t)plain.length));
    CHECK(finish(p, submitted(p, &w), d).error == 0);
    with = r;
    with.cast = cast, with.length = (int64_t)bytes / 4;
    CHECK(finish(p, submitted(p, &with), d).error == 0);
    CHECK(!memcmp(back, expected, (size_t)plain.length));
    free(expected);
  }
  CHECK(!ftruncate(fd, (off_t)(77 + bytes - 1)));
  copy_result cut = finish(p, submitted(p, &r), d);
  CHECK(cut.error == -1 && cut.position == (int64_t)(77 + bytes - 1));
  close(fd);
  free(there);
  free(back);
}

// Writes through a map of the file, with and without casts, against what pwrite makes of the same; then through one of
// a file that was cut meanwhile.
static void map_case(pool* p, dice* d) {
  int fd = nameless_file();
  size_t bytes = roll(d, 3 << 20) + 8192, end = bytes + 77;
  char *there = malloc(bytes), *back = malloc(bytes), *expected = malloc(bytes);
  for (size_t i = 0; i < bytes; i++) there[i] = (char)roll(d, 256);
  CHECK(!ftruncate(fd, (off_t)end));
  char* map = mmap(NULL, end, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CHECK(map != MAP_FAILED);
  copy_request w = {.kind = WRITE_FILE, .fd = fd, .source = there, .rows = 1, .offset = 77};
  for (int cast = NO_CAST; cast < kNumCasts; cast++) {
    w.cast = cast, w.length = (int64_t)bytes / (cast ? 4 : 1);
    ssize_t written = (ssize_t)(w.length * target_itemsize(cast));
    w.map = NULL;
    CHECK(finish(p, submitted(p, &w), d).error == 0);
    CHECK(pread(fd, expected, (size_t)written, 77) == written);
    memset(map, 0, end);
    w.map = map, w.fd = -1;  // which pwrite couldn't write to
    CHECK(finish(p, submitted(p, &w), d).error == 0);
    w.fd = fd;
    CHECK(pread(fd, back, (size_t)written, 77) == written);
    CHECK(!memcmp(back, expected, (size_t)written));
  }
  CHECK(!ftruncate(fd, 4096));
  w.cast = NO_CAST, w.length = (int64_t)bytes;
  copy_result cut = finish(p, submitted(p, &w), d);
  CHECK(cut.error == EFAULT && cut.position >= 4096 && cut.position < (int64_t)end);
  munmap(map, end);
  close(fd);
  free(there);
  free(back);
  free(expected);
}

static pool* shared;

static void* submit_and_finish(void* seed) {
  dice d = {(uint64_t)(uintptr_t)seed};
  for (int i = 0; i < 8; i++) {
    copy_cases(shared, &d);
    if (i % 8 == 0) file_case(shared, &d);
  }
  return NULL;
}

// Many small jobs in flight, their counters polled as the executor does it; the
// pool is closed while some go on.
static void burst_case(int workers) {
  enum { kJobs = 500, kBytes = 3000 };
  pool* p = copy_workers_open(workers, kBestIsa);
  CHECK(p);
  char* source = calloc(kJobs, kBytes);
  char* target = malloc((size_t)kJobs * kBytes);
  job* jobs[kJobs];
  for (int i = 0; i < kJobs; i++) {
    copy_request r = {.kind = COPY, .streaming = i & 1, .fresh = i % 5 == 0, .rows = 3, .length = 1000};
    r.source = source + i * kBytes, r.target = target + i * kBytes, r.source_stride = r.target_stride = 1000;
    jobs[i] = submitted(p, &r);
  }
  copy_workers_close(p);
  for (int i = 0; i < kJobs; i++) {
    copy_result result;
    CHECK(copy_workers_done(jobs[i], &result) && !result.error);
    free(jobs[i]);
  }
  CHECK(!memcmp(source, target, (size_t)kJobs * kBytes));
  free(source);
  free(target);
}

int main(void) {
  dice d = {1};
  for (int isa = kBestIsa; isa <= kPortable; isa++) {
    for (int workers = 1; workers <= 4; workers += 3) {
      pool* p = copy_workers_open(workers, isa);
      CHECK(p);
      printf("%s, %d workers\n", copy_workers_isa(p), workers);
      for (int i = 0; i < 16; i++) copy_cases(p, &d);
      for (int i = 0; i < 3; i++) file_case(p, &d);
      for (int i = 0; i < 3 && workers >= kMapWorkers; i++) map_case(p, &d);
      atomic_store(&broken, 100);
      copy_request w = {.kind = WRITE_FILE, .fd = -1, .source = &d, .rows = 1, .length = 8, .offset = 100};
      copy_result failed = finish(p, submitted(p, &w), &d);
      CHECK(failed.error == EIO && failed.position == 100);
      atomic_store(&broken, -1);
      copy_request unknown = {.kind = kNumKinds};
      job refused;
      CHECK(copy_workers_submit(p, &refused, &unknown) == EINVAL);
      CHECK(copy_workers_pending(p) == 0);
      copy_workers_close(p);
    }
  }
  CHECK(copy_workers_use_maps());
  CHECK(!copy_workers_open(0, kBestIsa) && errno == EINVAL);
  for (int i = 0; i < 8; i++) burst_case(1 + i % 4);
  shared = copy_workers_open(3, kBestIsa);
  pthread_t threads[3];
  for (uintptr_t i = 0; i < 3; i++) CHECK(!pthread_create(&threads[i], NULL, submit_and_finish, (void*)(i + 2)));
  for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
  copy_workers_close(shared);
  puts("done");
  return 0;
}
