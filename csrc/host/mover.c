// Moves whole chunks between the host and a device, through two rings of pinned pieces, without Python.
//
//   in    host --copy workers--> piece --H2D--> device        out    device --D2H--> piece --copy workers--> host
//
//   mover_open(workers, device, poison)  start the thread that moves the pieces of both directions; NULL, errno set
//   mover_use(mover, out, ring)          the pieces of a direction, before its first transfer: 0, or an errno
//   mover_transfer_bytes()               the memory of a transfer, which belongs to the caller
//   mover_submit(mover, transfer, request)  queue a transfer behind those of its direction and return at once
//   mover_queued(transfer)               in: NULL at first; once the last copy is queued, the event behind it
//   mover_done(transfer, result)         0 while the transfer goes on; else fill in `result` and return 1
//   mover_cancel(mover)                  give up all transfers; returns when nothing uses a piece any more
//   mover_close(mover)                   cancel, and end the thread
//   mover_has_ranges()                   whether profilers see NVTX ranges: built with NVTX's headers
//
// A transfer is cut into pieces of whole rows. Each direction moves its pieces in order, by a copy of the workers
// (copy_workers.c) and one of the device; the directions differ only in which of the two comes first. The next piece's
// first copy starts as soon as the ring has room. One thread serves both directions: it asks workers and device what is
// done, and queues what can follow. Python was too slow for that (docs/notes/staging.md).
//
// What the device does is called through pointers to the CUDA driver's functions (`mover_device`); nothing of CUDA is
// linked. The device memory that a transfer in writes must be free when it is submitted. A transfer out waits for an
// event: that of the kernel which writes the memory it reads. A kernel that reads what comes in may be queued behind
// the event of `mover_queued`. By then a later piece may use this event as well, and the kernel waits for that one too.
//
// The memory of a transfer and of its spans belongs to the caller, who keeps it until the transfer is done or
// cancelled.

#define _GNU_SOURCE
#include "mover.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "copy_workers.h"
#ifdef HOST_NVTX
#include <nvtx3/nvToolsExt.h>
#endif
#ifdef __linux__
#include <sys/prctl.h>
#endif

enum { kNotReady = 600 };                       // CUDA_ERROR_NOT_READY
static const int64_t kActiveNs = 100000;        // the thread spins for this long after the last piece moved,
static const struct timespec kNap = {0, 5000};  // then it sleeps for this long between two looks

struct transfer {
  transfer_request request;
  transfer_result result;
  struct transfer* after;       // the next one in the queue
  int64_t pieces, begun, over;  // `pieces` shrinks to `begun` where something fails
  atomic_uintptr_t queued;      // in: the event behind the last copy, once that is queued
  atomic_int done;
};

typedef struct {
  transfer* of;                 // the transfer that its rows belong to
  int64_t number, first, rows;  // its place among the transfer's pieces and rows
  void *memory, *event;
  job* copy;
  int asked;       // whether the copy that the piece waits for was really begun
  uint64_t range;  // the profiler's range around the workers' copy
} piece;

typedef struct {
  int out;
  int64_t count, bytes;  // the ring's pieces and the bytes of each; set before `current` is
  piece* ring;
  // Pieces by running numbers: those before `ended` have left the ring, those before `second` have begun their second
  // copy, those before `begun` their first.
  int64_t ended, second, begun;
  int64_t device_free_ns;  // when the last of the device's copies ended
  transfer* current;       // the transfer whose pieces are being begun
  transfer *first, *last;  // the queue behind it; guarded by the lock
} direction;

struct mover {
  mover_device device;
  pool* workers;
  int poison;
  direction in, out;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t work, calm;
  atomic_int queued;  // transfers that no direction has taken
  atomic_int cancelling;
  int sleeping, closing;
};

// --- ranges for profilers --------------------------------------------------------------------------------------------

// They look like those that pipeline/instrument.py makes.

enum { FILL, H2D, D2H, DRAIN };

#ifdef HOST_NVTX

static pthread_once_t domain_once = PTHREAD_ONCE_INIT;
static nvtxDomainHandle_t domain;

static void create_domain(void) { domain = nvtxDomainCreateA("pipeline"); }

static nvtxEventAttributes_t attributes(int stage, int64_t chunk) {
  static const struct {
    const char* name;
    uint32_t color;
  } kStages[] = {{"fill", 0xe69f00}, {"H2D", 0x56b4e9}, {"D2H", 0x0072b2}, {"drain", 0xd55e00}};
  pthread_once(&domain_once, create_domain);
  nvtxEventAttributes_t a = {.version = NVTX_VERSION, .size = NVTX_EVENT_ATTRIB_STRUCT_SIZE};
  a.colorType = NVTX_COLOR_ARGB;
  a.color = 0xff000000 | kStages[stage].color;
  a.payloadType = NVTX_PAYLOAD_TYPE_INT64;
  a.payload.llValue = chunk;
  a.messageType = NVTX_MESSAGE_TYPE_ASCII;
  a.message.ascii = kStages[stage].name;
  return a;
}

// A range around a call of the driver: by it nsys finds the chunk that a copy belongs to.
static void push_range(int stage, int64_t chunk) {
  nvtxEventAttributes_t a = attributes(stage, chunk);
  nvtxDomainRangePushEx(domain, &a);
}

static void pop_range(void) { nvtxDomainRangePop(domain); }

// A range of what copy workers do, which begins and ends on this thread.
static uint64_t begin_range(int stage, int64_t chunk) {
  nvtxEventAttributes_t a = attributes(stage, chunk);
  return nvtxDomainRangeStartEx(domain, &a);
}

static void end_range(uint64_t range) { nvtxDomainRangeEnd(domain, range); }

int mover_has_ranges(void) { return 1; }

#else

static void push_range(int stage, int64_t chunk) { (void)stage, (void)chunk; }
static void pop_range(void) {}
static uint64_t begin_range(int stage, int64_t chunk) { return (void)stage, (void)chunk, 0; }
static void end_range(uint64_t range) { (void)range; }
int mover_has_ranges(void) { return 0; }

#endif

// --- one piece -------------------------------------------------------------------------------------------------------

// Lets the transfer begin no more pieces.
static void cut_short(transfer* t) { t->pieces = t->begun; }

static void fail_on_device(transfer* t, int error) {
  if (!t->result.device_error) t->result.device_error = error;
  cut_short(t);
}

static int failed(const transfer* t) { return t->result.error || t->result.device_error || t->result.cancelled; }

static void begin_host_copy(mover* m, piece* p) {
  const transfer_request* r = &p->of->request;
  copy_request copy = r->host;
  int64_t skipped = p->first * (r->out ? copy.target_stride : copy.source_stride);
  copy.rows = p->rows;
  if (r->out) {
    copy.source = p->memory;
    copy.source_stride = r->row_bytes;
  } else {
    copy.target = p->memory;
    copy.target_stride = r->row_bytes;
  }
  if (copy.kind != COPY) {
    copy.offset += skipped;
  } else if (r->out) {
    copy.target = (char*)copy.target + skipped;
  } else {
    copy.source = (const char*)copy.source + skipped;
  }
  p->range = begin_range(r->out ? DRAIN : FILL, r->chunk);
  int error = copy_workers_submit(m->workers, p->copy, &copy);
  p->asked = !error;
  if (error) {
    end_range(p->range);
    p->of->result.error = error;
    cut_short(p->of);
  }
}

// Whether the workers are done with the piece; notes when they were at work, and what went wrong.
static int host_copy_over(piece* p) {
  copy_result result;
  transfer* t = p->of;
  if (!p->asked) return 1;
  if (!copy_workers_done(p->copy, &result)) return 0;
  end_range(p->range);
  mover_span* span = &t->request.spans[p->number];
  span->host_start_ns = result.start_ns;
  span->host_end_ns = result.end_ns;
  if (result.error) {
    if (!t->result.error) {  // the first error is the one to report
      t->result.error = result.error;
      t->result.position = result.position;
    }
    cut_short(t);
  }
  return 1;
}

static void begin_device_copy(mover* m, piece* p) {
  const transfer_request* r = &p->of->request;
  uint64_t device = r->device + (uint64_t)(p->first * r->row_bytes);
  size_t bytes = (size_t)(p->rows * r->row_bytes);
  void* stream = r->out ? m->device.out_stream : m->device.in_stream;
  r->spans[p->number].device_start_ns = now_ns();
  push_range(r->out ? D2H : H2D, r->chunk);
  int error = r->out ? m->device.copy_out(p->memory, device, bytes, stream)
                     : m->device.copy_in(device, p->memory, bytes, stream);
  pop_range();
  int recorded = m->device.record(p->event, stream);
  p->asked = !recorded;  // a copy may be queued even where its call failed, so the event behind it is waited for
  if (error || recorded) {
    fail_on_device(p->of, error ? error : recorded);
  } else if (!r->out && p->number == p->of->pieces - 1) {
    atomic_store(&p->of->queued, (uintptr_t)p->event);
  }
}

static int device_copy_over(mover* m, direction* d, piece* p) {
  if (!p->asked) return 1;
  int state = m->device.query(p->event);
  if (state == kNotReady) return 0;
  mover_span* span = &p->of->request.spans[p->number];
  if (span->device_start_ns < d->device_free_ns) span->device_start_ns = d->device_free_ns;
  span->device_end_ns = d->device_free_ns = now_ns();
  if (state) fail_on_device(p->of, state);
  return 1;
}

// --- a direction -----------------------------------------------------------------------------------------------------

static piece* piece_at(direction* d, int64_t number) { return &d->ring[number % d->count]; }

// From here on the caller may free the transfer.
static void end_transfer(transfer* t) { atomic_store(&t->done, 1); }

static void take_transfer(mover* m, direction* d) {
  pthread_mutex_lock(&m->lock);
  transfer* t = d->first;
  if (t) {
    d->first = t->after;
    if (!d->first) d->last = NULL;
    atomic_fetch_sub(&m->queued, 1);
  }
  pthread_mutex_unlock(&m->lock);
  d->current = t;
}

// 1: the transfer's next piece may be begun. 0: not yet, it waits for an event. -1: it has no piece to begin, or there
// is no transfer.
static int is_ready(mover* m, transfer* t) {
  if (!t || t->begun == t->pieces) return -1;
  int state = t->request.after ? m->device.query(t->request.after) : 0;
  if (state == kNotReady) return 0;
  t->request.after = NULL;
  if (!state) return 1;
  fail_on_device(t, state);
  return -1;
}

// The next piece of the direction's transfers, in a free place of the ring; NULL where there is neither.
static piece* next_piece(mover* m, direction* d) {
  int ready;
  while ((ready = is_ready(m, d->current)) < 0) {
    transfer* t = d->current;
    d->current = NULL;
    if (t && t->over == t->pieces) end_transfer(t);  // otherwise its last piece ends it, in `leave`
    if (!atomic_load(&m->queued)) return NULL;
    take_transfer(m, d);
    if (!d->current) return NULL;
  }
  if (!ready || d->begun == d->ended + d->count) return NULL;
  transfer* t = d->current;
  piece* p = piece_at(d, d->begun++);
  p->of = t;
  p->number = t->begun++;
  p->first = p->number * t->request.piece_rows;
  p->rows = t->request.host.rows - p->first;
  if (p->rows > t->request.piece_rows) p->rows = t->request.piece_rows;
  return p;
}

// Frees the piece that has been in the ring longest; with a transfer's last piece, the transfer is done.
static void leave(mover* m, direction* d) {
  piece* p = piece_at(d, d->ended++);
  transfer* t = p->of;
  if (m->poison) memset(p->memory, 0xff, (size_t)d->bytes);
  if (++t->over == t->pieces && t != d->current) end_transfer(t);
}

static void begin(mover* m, piece* p, int on_device) {
  if (on_device) {
    begin_device_copy(m, p);
  } else {
    begin_host_copy(m, p);
  }
}

static int is_over(mover* m, direction* d, piece* p, int on_device) {
  return on_device ? device_copy_over(m, d, p) : host_copy_over(p);
}

// Moves all that can move, second copies first so that pieces come free. Whether anything did.
static int move(mover* m, direction* d) {
  int moved = 0;
  for (; d->ended < d->second && is_over(m, d, piece_at(d, d->ended), !d->out); moved = 1) leave(m, d);
  for (; d->second < d->begun && is_over(m, d, piece_at(d, d->second), d->out); moved = 1) {
    piece* p = piece_at(d, d->second++);
    p->asked = 0;
    if (!failed(p->of)) begin(m, p, !d->out);
  }
  for (piece* p; (p = next_piece(m, d)); moved = 1) begin(m, p, d->out);
  return moved;
}

// Cancels all transfers that have pieces to begin. Pieces that were begun leave the ring in their order: those of a
// cancelled transfer without a second copy, all others as if nothing had happened.
static void give_up(mover* m, direction* d) {
  for (;;) {
    if (!d->current) take_transfer(m, d);
    transfer* t = d->current;
    if (!t) break;
    t->result.cancelled = 1;
    cut_short(t);
    d->current = NULL;
    if (t->over == t->pieces) end_transfer(t);
  }
}

// --- the thread ------------------------------------------------------------------------------------------------------

static int is_busy(const direction* d) { return d->current || d->ended < d->begun; }

// Sleeps until a transfer is queued (1) or the mover is closed (0). Called when neither direction has anything to do:
// now nothing uses a piece, which is what `mover_cancel` waits for.
static int rest_until_work(mover* m) {
  pthread_mutex_lock(&m->lock);
  if (!atomic_load(&m->queued)) {
    atomic_store(&m->cancelling, 0);
    pthread_cond_broadcast(&m->calm);
  }
  m->sleeping = 1;
  while (!atomic_load(&m->queued) && !m->closing) pthread_cond_wait(&m->work, &m->lock);
  m->sleeping = 0;
  int go_on = !m->closing || atomic_load(&m->queued);
  pthread_mutex_unlock(&m->lock);
  return go_on;
}

static void* run_mover(void* argument) {
  mover* m = argument;
  m->device.set_context(m->device.context);  // where this fails, the first copy reports it
#ifdef __linux__
  prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // short sleeps are short
#endif
  int64_t moved_ns = now_ns();
  for (;;) {
    if (atomic_load(&m->cancelling)) {
      give_up(m, &m->in);
      give_up(m, &m->out);
    }
    int moved = move(m, &m->out);
    moved |= move(m, &m->in);
    if (moved) {
      moved_ns = now_ns();
    } else if (!is_busy(&m->in) && !is_busy(&m->out)) {
      if (!rest_until_work(m)) return NULL;
      moved_ns = now_ns();
    } else if (now_ns() - moved_ns < kActiveNs) {
      relax();
    } else {
      nanosleep(&kNap, NULL);
    }
  }
}

static void free_ring(piece* ring, int64_t count) {
  for (int64_t i = 0; ring && i < count; i++) free(ring[i].copy);
  free(ring);
}

static void free_mover(mover* m) {
  free_ring(m->in.ring, m->in.count);
  free_ring(m->out.ring, m->out.count);
  pthread_cond_destroy(&m->calm);
  pthread_cond_destroy(&m->work);
  pthread_mutex_destroy(&m->lock);
  free(m);
}

mover* mover_open(pool* workers, const mover_device* device, int poison) {
  mover* m = calloc(1, sizeof *m);
  if (!m) return NULL;
  m->device = *device;
  m->workers = workers;
  m->poison = poison;
  m->out.out = 1;
  pthread_mutex_init(&m->lock, NULL);
  pthread_cond_init(&m->work, NULL);
  pthread_cond_init(&m->calm, NULL);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's threads
  int error = pthread_create(&m->thread, NULL, run_mover, m);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) {
    free_mover(m);
    errno = error;
    return NULL;
  }
#ifdef __linux__
  pthread_setname_np(m->thread, "pipeline-mover");
#endif
  return m;
}

int mover_use(mover* m, int out, const mover_ring* ring) {
  if (ring->count < 1) return EINVAL;
  piece* pieces = calloc((size_t)ring->count, sizeof *pieces);
  for (int64_t i = 0; pieces && i < ring->count; i++) {
    pieces[i] = (piece){.memory = ring->memory[i], .event = ring->events[i], .copy = malloc(copy_workers_job_bytes())};
    if (!pieces[i].copy) {
      free_ring(pieces, ring->count);
      pieces = NULL;
    }
  }
  if (!pieces) return ENOMEM;
  direction* d = out ? &m->out : &m->in;
  pthread_mutex_lock(&m->lock);  // the thread takes the lock, too, before it looks at the ring
  free_ring(d->ring, d->count);  // there is one where Python was interrupted after an earlier call and repeats it
  d->ring = pieces;
  d->count = ring->count;
  d->bytes = ring->bytes;
  pthread_mutex_unlock(&m->lock);
  return 0;
}

size_t mover_transfer_bytes(void) { return sizeof(transfer); }

void mover_submit(mover* m, transfer* t, const transfer_request* request) {
  int64_t pieces = (request->host.rows + request->piece_rows - 1) / request->piece_rows;
  *t = (transfer){.request = *request, .pieces = pieces};
  direction* d = request->out ? &m->out : &m->in;
  pthread_mutex_lock(&m->lock);
  if (d->last) {
    d->last->after = t;
  } else {
    d->first = t;
  }
  d->last = t;
  atomic_fetch_add(&m->queued, 1);
  if (m->sleeping) pthread_cond_signal(&m->work);
  pthread_mutex_unlock(&m->lock);
}

void* mover_queued(transfer* t) { return (void*)atomic_load(&t->queued); }

int mover_done(transfer* t, transfer_result* result) {
  if (!atomic_load(&t->done)) return 0;
  *result = t->result;
  return 1;
}

void mover_cancel(mover* m) {
  pthread_mutex_lock(&m->lock);
  if (!m->sleeping || atomic_load(&m->queued)) {
    atomic_store(&m->cancelling, 1);
    while (atomic_load(&m->cancelling)) pthread_cond_wait(&m->calm, &m->lock);
  }
  pthread_mutex_unlock(&m->lock);
}

void mover_close(mover* m) {
  mover_cancel(m);
  pthread_mutex_lock(&m->lock);
  m->closing = 1;
  pthread_cond_signal(&m->work);
  pthread_mutex_unlock(&m->lock);
  pthread_join(m->thread, NULL);
  free_mover(m);
}
