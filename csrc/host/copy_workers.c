// Copies between the caller's memory or files and pinned pieces, by a pool of threads that Python never waits for.
//
//   copy_workers_open(workers, isa)          start a pool; NULL with errno set where threads can't be started
//   copy_workers_job_bytes()                 the memory of a job, which belongs to the caller
//   copy_workers_submit(pool, job, request)  queue a job and return at once: 0, or an errno
//   copy_workers_done(job, result)           0 while the job goes on; else fill in `result` and return 1
//   copy_workers_wait(pool, job)             block until the job is done
//   copy_workers_pending(pool)               how many jobs aren't done
//   copy_workers_close(pool)                 let queued jobs end, join the threads
//   copy_workers_isa(pool)                   which instructions move the bytes: "AVX-512", "AVX2" or "portable"
//   copy_workers_use_maps()                  whether the system lets them store through maps of files
//
// A job is cut into grains that the workers take one at a time, so that one job uses all of them. The memory of a job
// and of its request belongs to the caller, who keeps it until the job is done. All functions may be called from any
// thread, but for one job at a time from one only.
//
// Jobs that write the caller's memory or files (drains) queue apart from the others (fills), and workers take from
// both. Where both queues begin with a copy, a worker takes a grain of each and moves the two by turns, block by block:
// one waits for what it reads from memory, the other for what it writes there. Reads and writes of files go alone, as
// do copies to `fresh` targets.
//
// Streaming stores (past the caches) are for targets that nobody reads soon: a job that asks for them is a drain. A
// `fresh` target has never been written: the system maps and clears its pages as they are written first. The grains of
// such a job are whole huge pages, so that one worker maps each page. If several did, each would clear a page of its
// own and all but one would be thrown away (docs/notes/staging.md).
//
// Called through ctypes (pipeline/staging/native.py) and by the mover (mover.c).

#define _GNU_SOURCE
#include "copy_workers.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "file_bytes.h"
#include "move_bytes.h"

struct job {
  copy_request request;
  pool* owner;
  struct job* after;      // the next one in the queue
  int64_t grains, taken;  // `taken` is guarded by the pool's lock
  int64_t grain_length, grains_per_row, rows_per_grain;
  int64_t missing;  // elements by which the first grain of a row is shorter than the others
  int64_t start_ns, end_ns, position;
  atomic_int error;
  atomic_llong left;  // grains not yet done
  atomic_int done;
};

typedef struct {
  job *first, *last;
} queue;

struct pool {
  const instructions* isa;
  pthread_mutex_t lock;
  pthread_cond_t work, finished;
  queue queues[2];      // fills, and drains
  int turn;             // the queue that was asked first the last time
  atomic_llong queued;  // grains that nobody has taken: what idle workers look at
  int sleeping;         // workers that wait for `work`
  int waiting;          // threads in copy_workers_wait
  int pending;          // jobs that aren't done
  int closing;
  int workers;
  pthread_t threads[];
};

// --- grains ----------------------------------------------------------------------------------------------------------

enum { kGrainBytes = 256 << 10 };                // a copy's grain: workers share a piece, and each moves enough at once
enum { kBlockBytes = 16 << 10 };                 // what a turn moves (docs/notes/staging.md)
static const int64_t kFileGrainBytes = 1 << 20;  // what one system call moves
static const int64_t kHugePageBytes = 2 << 20;   // on x86-64, and on ARM with pages of 4 KiB
static const int kMapWorkers = 4;                // fewer write files as fast by pwrite (docs/notes/formats.md)
static const int64_t kSpinNs = 200000;           // the bus takes about as long for a piece; then the next job comes

static int64_t source_itemsize(int cast) {
  if (cast == FP32_TO_BF16 || cast == FP32_TO_FP16) return 4;
  return cast == NO_CAST ? 1 : 2;
}

static int64_t target_itemsize(int cast) {
  if (cast == BF16_TO_FP32 || cast == FP16_TO_FP32) return 4;
  return cast == NO_CAST ? 1 : 2;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static void cut_into_grains(job* j) {
  copy_request* r = &j->request;
  int64_t source_bytes = r->length * source_itemsize(r->cast), target_bytes = r->length * target_itemsize(r->cast);
  if (r->rows > 1 && r->source_stride == source_bytes && r->target_stride == target_bytes) {
    r->length *= r->rows;  // contiguous at both ends: one long row
    r->rows = 1;
  }
  int64_t grain_bytes = kGrainBytes;
  if (!r->cast && r->kind != COPY) grain_bytes = kFileGrainBytes;
  int64_t itemsize = larger(source_itemsize(r->cast), target_itemsize(r->cast));
  if (r->kind == COPY && r->fresh) {
    grain_bytes = kHugePageBytes;
    itemsize = target_itemsize(r->cast);
    if (r->rows == 1) j->missing = (int64_t)((uintptr_t)r->target % (uintptr_t)kHugePageBytes) / itemsize;
  }
  j->grain_length = grain_bytes / itemsize;
  j->grains_per_row = larger(1, (j->missing + r->length + j->grain_length - 1) / j->grain_length);
  j->rows_per_grain = larger(1, grain_bytes / larger(1, r->length * itemsize));
  if (r->rows <= 0 || r->length <= 0) {
    j->grains = 0;
  } else if (j->grains_per_row > 1) {
    j->grains = r->rows * j->grains_per_row;
  } else {
    j->grains = (r->rows + j->rows_per_grain - 1) / j->rows_per_grain;
  }
}

static void copy_row(const instructions* isa, int cast, int streaming, char* target, const char* source,
                     int64_t length) {
  switch (cast) {
    case NO_CAST:
      isa->copy(target, source, length, streaming);
      break;
    case FP32_TO_BF16:
      isa->to_bf16(target, source, length);
      break;
    case FP32_TO_FP16:
      isa->to_fp16(target, source, length);
      break;
    case BF16_TO_FP32:
      isa->from_bf16(target, source, length, streaming);
      break;
    case FP16_TO_FP32:
      isa->from_fp16(target, source, length, streaming);
      break;
  }
}

static void fail(job* j, int error, int64_t position) {
  int none = 0;
  if (atomic_compare_exchange_strong(&j->error, &none, error)) j->position = position;
}

// Moves all of `bytes` from or to the file at `position`; 0 where that failed.
static int move_part(job* j, char* memory, int64_t bytes, int64_t position) {
  int error = move_file_bytes(&j->request, memory, bytes, &position);
  if (error) fail(j, error, position);
  return !error;
}

// Moves `length` elements, from the `first` on. A cast goes through `scratch`, which stays in the worker's own cache.
static void move_file_grain(job* j, int64_t first, int64_t length, char* scratch) {
  const copy_request* r = &j->request;
  int64_t source_size = source_itemsize(r->cast), target_size = target_itemsize(r->cast);
  if (r->kind == READ_FILE) {
    char* target = (char*)r->target + first * target_size;
    char* memory = r->cast ? scratch : target;
    int read = move_part(j, memory, length * source_size, r->offset + first * source_size);
    if (read && r->cast) copy_row(j->owner->isa, r->cast, 0, target, scratch, length);
  } else {
    char* source = (char*)(uintptr_t)r->source + first * source_size;
    if (r->cast) copy_row(j->owner->isa, r->cast, 0, scratch, source, length);
    move_part(j, r->cast ? scratch : source, length * target_size, r->offset + first * target_size);
  }
}

// What a worker has taken of a job, and how far it has come.
typedef struct {
  job* of;
  int64_t row, end;       // the rows that aren't moved yet
  int64_t first, length;  // the elements to move of each of these rows
  int64_t at;             // how many elements of row `row` have been moved
} grain;

static grain grain_of(job* j, int64_t number) {
  const copy_request* r = &j->request;
  if (j->grains_per_row > 1) {
    int64_t begin = number % j->grains_per_row * j->grain_length - j->missing, end = begin + j->grain_length;
    int64_t row = number / j->grains_per_row, first = larger(begin, 0);
    return (grain){j, row, row + 1, first, (end < r->length ? end : r->length) - first, 0};
  }
  int64_t row = number * j->rows_per_grain, end = row + j->rows_per_grain;
  return (grain){j, row, end < r->rows ? end : r->rows, 0, r->length, 0};
}

// At most `length` elements, fewer by what reaches beyond the last boundary of a cache line; all where there is none.
static int64_t up_to_a_line(const char* target, int64_t itemsize, int64_t length) {
  int64_t over = (int64_t)((uintptr_t)(target + length * itemsize) % kLineBytes) / itemsize;
  return over < length ? length - over : length;
}

// Copies the grain's next block: at most kBlockBytes, of one row or several. 0 where nothing was left to copy.
static int move_block(grain* g) {
  if (g->row == g->end) return 0;
  job* j = g->of;
  const copy_request* r = &j->request;
  int64_t source_size = source_itemsize(r->cast), target_size = target_itemsize(r->cast);
  for (int64_t room = kBlockBytes / larger(source_size, target_size); room && g->row < g->end;) {
    int64_t first = g->first + g->at, length = g->length - g->at;
    char* target = (char*)r->target + g->row * r->target_stride + first * target_size;
    if (length > room) length = up_to_a_line(target, target_size, room);
    const char* source = (const char*)r->source + g->row * r->source_stride + first * source_size;
    copy_row(j->owner->isa, r->cast, r->streaming, target, source, length);
    room -= length;
    g->at += length;
    if (g->at < g->length) break;
    g->row++, g->at = 0;
  }
  return 1;
}

static void run_grain(grain* g, char* scratch) {
  job* j = g->of;
  if (j->request.kind == COPY) {
    while (move_block(g)) continue;
  } else if (!atomic_load(&j->error)) {
    move_file_grain(j, g->first, g->length, scratch);
  }
}

// Moves two grains of copies, a block of the one and a block of the other by turns, until both are at their ends.
static void run_by_turns(grain* a, grain* b) {
  while (move_block(a) | move_block(b)) continue;
}

// --- the pool --------------------------------------------------------------------------------------------------------

// Takes the next grain of the queue's oldest job. Called with the lock held.
static grain take_from(pool* p, queue* q) {
  job* j = q->first;
  if (!j->taken) j->start_ns = now_ns();
  grain g = grain_of(j, j->taken++);
  atomic_fetch_sub(&p->queued, 1);
  if (j->taken == j->grains) {
    q->first = j->after;
    if (!j->after) q->last = NULL;
  }
  return g;
}

// Whether a job's grains may be moved by turns with another's. Copies to fresh memory may not: while the system clears
// a page for them, the other grain would wait.
static int goes_by_turns(const job* j) { return j && j->request.kind == COPY && !j->request.fresh; }

// Takes one grain, or two to move by turns, and returns how many. Called with the lock held.
static int take_grains(pool* p, grain* taken) {
  queue *fills = &p->queues[0], *drains = &p->queues[1];
  if (goes_by_turns(fills->first) && goes_by_turns(drains->first)) {
    taken[0] = take_from(p, fills);
    taken[1] = take_from(p, drains);
    return 2;
  }
  p->turn = !p->turn;
  queue* q = &p->queues[p->queues[p->turn].first ? p->turn : !p->turn];
  if (!q->first) return 0;
  taken[0] = take_from(p, q);
  return 1;
}

static void end_job(job* j) {
  pool* p = j->owner;
  j->end_ns = now_ns();
  pthread_mutex_lock(&p->lock);
  p->pending--;
  atomic_store(&j->done, 1);  // from here on the caller may free the job
  if (p->waiting) pthread_cond_broadcast(&p->finished);
  pthread_mutex_unlock(&p->lock);
}

static void end_grain(job* j) {
  fence_streaming();
  if (atomic_fetch_sub(&j->left, 1) > 1) return;
  copy_request request = j->request;
  int64_t bytes = request.length * target_itemsize(request.cast);
  leave_map(&request, bytes);
  end_job(j);
  start_writing(&request, bytes);
}

// Spins until there are grains, for kSpinNs at most.
static void spin(pool* p) {
  int64_t until = 0;
  for (int i = 0; !atomic_load_explicit(&p->queued, memory_order_relaxed); i++) {
    if (i % 64 == 0) {
      int64_t now = now_ns();
      if (!until) until = now + kSpinNs;
      if (now > until) return;
    }
    relax();
  }
}

// Sleeps until a signal, for a second at most. Called with the lock held.
//
// NOTE: glibc from 2.27 on can lose one of several signals (its bug 25847). A worker that sleeps looks
// for work once a second, so that a run would stand still for a second and not for good.
static void sleep_until_work(pool* p) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_sec++;
  p->sleeping++;
  pthread_cond_timedwait(&p->work, &p->lock, &until);
  p->sleeping--;
}

// A worker: takes grains and moves them until the pool is closed.
//
// NOTE: waking a thread costs the thread that does it microseconds. So each wakes one worker at most, after it has left
// the lock: whoever submits a job wakes the first, and a worker that leaves grains behind wakes the next.
static void* work(void* argument) {
  char scratch[kGrainBytes];
  pool* p = argument;
  for (;;) {
    spin(p);
    grain taken[2];
    int count;
    pthread_mutex_lock(&p->lock);
    while (!(count = take_grains(p, taken)) && !p->closing) sleep_until_work(p);
    int wake = (p->queues[0].first || p->queues[1].first) && p->sleeping;
    pthread_mutex_unlock(&p->lock);
    if (wake) pthread_cond_signal(&p->work);
    if (!count) return NULL;
    if (count == 2) {
      run_by_turns(&taken[0], &taken[1]);
    } else {
      run_grain(&taken[0], scratch);
    }
    for (int i = 0; i < count; i++) end_grain(taken[i].of);
  }
}

void copy_workers_close(pool* p) {
  pthread_mutex_lock(&p->lock);
  p->closing = 1;
  pthread_cond_broadcast(&p->work);
  pthread_mutex_unlock(&p->lock);
  for (int i = 0; i < p->workers; i++) pthread_join(p->threads[i], NULL);
  pthread_cond_destroy(&p->finished);
  pthread_cond_destroy(&p->work);
  pthread_mutex_destroy(&p->lock);
  free(p);
}

pool* copy_workers_open(int workers, int isa) {
  if (workers < 1) {
    errno = EINVAL;
    return NULL;
  }
  pool* p = calloc(1, sizeof *p + (size_t)workers * sizeof p->threads[0]);
  if (!p) return NULL;
  p->isa = best_instructions(isa);
  pthread_mutexattr_t kind;
  pthread_mutexattr_init(&kind);
#ifdef __GLIBC__
  pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ADAPTIVE_NP);  // spins a little, since the lock is never held for long
#endif
  pthread_mutex_init(&p->lock, &kind);
  pthread_mutexattr_destroy(&kind);
  pthread_condattr_t clock;
  pthread_condattr_init(&clock);
  pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  pthread_cond_init(&p->work, &clock);
  pthread_condattr_destroy(&clock);
  pthread_cond_init(&p->finished, NULL);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's threads
  int error = 0;
  while (p->workers < workers && !(error = pthread_create(&p->threads[p->workers], NULL, work, p))) {
#ifdef __linux__
    pthread_setname_np(p->threads[p->workers], "pipeline-copy");
#endif
    p->workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) {
    copy_workers_close(p);
    errno = error;
    return NULL;
  }
  return p;
}

int copy_workers_submit(pool* p, job* j, const copy_request* request) {
  if (request->kind < 0 || request->kind >= kNumKinds || request->cast < 0 || request->cast >= kNumCasts) {
    return EINVAL;
  }
  *j = (job){.request = *request, .owner = p};
  if (p->workers < kMapWorkers) j->request.map = NULL;
  cut_into_grains(j);
  if (request->kind != COPY && j->request.rows > 1) return EINVAL;  // there are gaps between rows
  atomic_init(&j->left, j->grains);
  if (!j->grains) {
    j->start_ns = j->end_ns = now_ns();
    atomic_store(&j->done, 1);
    return 0;
  }
  queue* q = &p->queues[request->streaming || request->kind == WRITE_FILE];
  pthread_mutex_lock(&p->lock);
  if (q->last) {
    q->last->after = j;
  } else {
    q->first = j;
  }
  q->last = j;
  p->pending++;
  atomic_fetch_add(&p->queued, j->grains);
  int wake = p->sleeping;
  pthread_mutex_unlock(&p->lock);
  if (wake) pthread_cond_signal(&p->work);
  return 0;
}

size_t copy_workers_job_bytes(void) { return sizeof(job); }

int copy_workers_done(job* j, copy_result* result) {
  if (!atomic_load(&j->done)) return 0;
  *result = (copy_result){j->start_ns, j->end_ns, j->position, atomic_load(&j->error)};
  return 1;
}

int copy_workers_pending(pool* p) {
  pthread_mutex_lock(&p->lock);
  int pending = p->pending;
  pthread_mutex_unlock(&p->lock);
  return pending;
}

void copy_workers_wait(pool* p, job* j) {
  pthread_mutex_lock(&p->lock);
  p->waiting++;
  while (!atomic_load(&j->done)) pthread_cond_wait(&p->finished, &p->lock);
  p->waiting--;
  pthread_mutex_unlock(&p->lock);
}

const char* copy_workers_isa(const pool* p) { return p->isa->name; }
