// Staging lanes: whole chunks between the host and a device, through two rings of pinned pieces, without Python.
//
//   in    host --copy workers--> piece --H2D--> device        out    device --D2H--> piece --copy workers--> host
//
//   host_lanes_open(workers, device, poison)  start the thread that moves the pieces of both lanes; NULL, errno set
//   host_lanes_use(lanes, out, ring)          the pieces of a lane, before its first transfer: 0, or an errno
//   host_lanes_transfer_bytes()               the memory of a transfer, which belongs to the caller
//   host_lanes_submit(lanes, transfer, request)  queue a transfer behind those of its lane and return at once
//   host_lanes_queued(transfer)               in: the event behind its last copy once that is queued, before it NULL
//   host_lanes_done(transfer, result)         0 while it goes on; else fill in `result` and return 1
//   host_lanes_cancel(lanes)                  give up all transfers; returns when nothing uses a piece any more
//   host_lanes_close(lanes)                   the same, and end the thread
//   host_lanes_have_ranges()                  whether profilers see NVTX ranges: built with NVTX's headers
//
// A transfer is cut into pieces of whole rows. Each lane moves its pieces in order: a copy by the workers (host_copy.c)
// and one by the device, which of the two comes first being all that tells the lanes apart. The next piece's first copy
// starts as soon as the ring has room. One thread does all this for both lanes: it asks workers and device what is done
// and queues what can follow. From Python that took 100 to 150 us for a piece in and one out (H200 host).
//
// What the device does is called through pointers to the CUDA driver's functions (`host_lanes_device`); nothing of CUDA
// is linked. The device memory of a transfer in must be free when it is submitted; one out waits for an event, that of
// the kernel which writes it. A kernel that reads what comes in may be queued behind the event of `host_lanes_queued`.
// The ring may have given that to a later piece meanwhile: then the kernel waits for that one, too.
//
// Called through ctypes (pipeline/io/lanes.py), which has the twins of the structures.

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "host_copy.h"
#ifdef HOST_LANES_NVTX
#include <nvtx3/nvToolsExt.h>
#endif
#ifdef __linux__
#include <sys/prctl.h>
#endif

enum { kNotReady = 600 };                       // CUDA_ERROR_NOT_READY
static const int64_t kActiveNs = 100000;        // waits actively for so long after the last thing that moved
static const struct timespec kNap = {0, 5000};  // then sleeps so long between two looks

// Functions return a CUresult.
typedef struct {
  void* context;
  void *in_stream, *out_stream;
  int (*set_context)(void* context);
  int (*copy_in)(uint64_t target, const void* source, size_t bytes, void* stream);
  int (*copy_out)(void* target, uint64_t source, size_t bytes, void* stream);
  int (*record)(void* event, void* stream);
  int (*query)(void* event);
} host_lanes_device;

typedef struct {
  int64_t count, bytes;  // of pieces, and of each
  void** memory;
  void** events;
} host_lanes_ring;

// When each of a piece's copies began and ended, CLOCK_MONOTONIC; 0 for one that wasn't made.
typedef struct {
  int64_t host_start_ns, host_end_ns;
  int64_t device_start_ns, device_end_ns;
} host_lanes_span;

// `host` describes the rows on the host as a copy job does; where that names the piece, pieces take the place. In
// device memory and in pieces rows follow one another.
typedef struct {
  host_copy_request host;
  uint64_t device;
  int64_t row_bytes, piece_rows;
  int64_t chunk;           // its number, for profilers
  host_lanes_span* spans;  // one for each piece
  void* after;             // an event that has to be over before the first piece is begun, or NULL
  int32_t out;
} host_lanes_request;

// `error` and `position` are a copy job's, `device_error` is a CUresult.
typedef struct {
  int64_t position;
  int32_t error, device_error, cancelled;
} host_lanes_result;

typedef struct transfer {
  host_lanes_request request;
  host_lanes_result result;
  struct transfer* after;       // in the queue
  int64_t pieces, begun, over;  // `pieces` shrinks to `begun` where something fails
  atomic_uintptr_t queued;      // an event, or 0
  atomic_int done;
} transfer;

typedef struct {
  transfer* of;
  int64_t number, first, rows;  // within the transfer
  void *memory, *event;
  job* copy;
  int asked;       // whether the copy that is waited for was begun
  uint64_t range;  // a profiler's, of the copy by the workers
} piece;

typedef struct {
  int out;
  int64_t count, bytes;  // of the ring, which is there before `current` is
  piece* ring;
  // Pieces by running numbers: those before `ended` have left the ring, those before `second` have begun their second
  // copy, those before `begun` their first.
  int64_t ended, second, begun;
  int64_t device_free_ns;  // when the last of the device's copies ended
  transfer* current;       // whose pieces are being begun
  transfer *first, *last;  // queued; guarded by the lock
} lane;

typedef struct {
  host_lanes_device device;
  pool* workers;
  int poison;
  lane in, out;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t work, calm;
  atomic_int queued;  // transfers that no lane has taken
  atomic_int cancelling;
  int sleeping, closing;
} host_lanes;

// --- ranges for profilers --------------------------------------------------------------------------------------------

// The same as pipeline/instrument.py makes.

enum { FILL, H2D, D2H, DRAIN };

#ifdef HOST_LANES_NVTX

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

// Around a call of the driver's, by which nsys finds what the copy belongs to.
static void push_range(int stage, int64_t chunk) {
  nvtxEventAttributes_t a = attributes(stage, chunk);
  nvtxDomainRangePushEx(domain, &a);
}

static void pop_range(void) { nvtxDomainRangePop(domain); }

// Of work on other threads.
static uint64_t begin_range(int stage, int64_t chunk) {
  nvtxEventAttributes_t a = attributes(stage, chunk);
  return nvtxDomainRangeStartEx(domain, &a);
}

static void end_range(uint64_t range) { nvtxDomainRangeEnd(domain, range); }

int host_lanes_have_ranges(void) { return 1; }

#else

static void push_range(int stage, int64_t chunk) { (void)stage, (void)chunk; }
static void pop_range(void) {}
static uint64_t begin_range(int stage, int64_t chunk) { return (void)stage, (void)chunk, 0; }
static void end_range(uint64_t range) { (void)range; }
int host_lanes_have_ranges(void) { return 0; }

#endif

// --- one piece -------------------------------------------------------------------------------------------------------

// The transfer begins no more pieces.
static void cut_short(transfer* t) { t->pieces = t->begun; }

static void fail_on_device(transfer* t, int error) {
  if (!t->result.device_error) t->result.device_error = error;
  cut_short(t);
}

static int failed(const transfer* t) { return t->result.error || t->result.device_error || t->result.cancelled; }

static void begin_host_copy(host_lanes* s, piece* p) {
  const host_lanes_request* r = &p->of->request;
  host_copy_request copy = r->host;
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
  int error = host_copy_submit(s->workers, p->copy, &copy);
  p->asked = !error;
  if (error) {
    end_range(p->range);
    p->of->result.error = error;
    cut_short(p->of);
  }
}

static int host_copy_over(piece* p) {
  host_copy_result result;
  transfer* t = p->of;
  if (!p->asked) return 1;
  if (!host_copy_done(p->copy, &result)) return 0;
  end_range(p->range);
  host_lanes_span* span = &t->request.spans[p->number];
  span->host_start_ns = result.start_ns;
  span->host_end_ns = result.end_ns;
  if (result.error) {
    if (!t->result.error) t->result.error = result.error, t->result.position = result.position;
    cut_short(t);
  }
  return 1;
}

static void begin_device_copy(host_lanes* s, piece* p) {
  const host_lanes_request* r = &p->of->request;
  uint64_t device = r->device + (uint64_t)(p->first * r->row_bytes);
  size_t bytes = (size_t)(p->rows * r->row_bytes);
  void* stream = r->out ? s->device.out_stream : s->device.in_stream;
  r->spans[p->number].device_start_ns = now_ns();
  push_range(r->out ? D2H : H2D, r->chunk);
  int error = r->out ? s->device.copy_out(p->memory, device, bytes, stream)
                     : s->device.copy_in(device, p->memory, bytes, stream);
  pop_range();
  int recorded = s->device.record(p->event, stream);
  p->asked = !recorded;  // a copy that was queued is waited for, whatever became of it
  if (error || recorded) {
    fail_on_device(p->of, error ? error : recorded);
  } else if (!r->out && p->number == p->of->pieces - 1) {
    atomic_store(&p->of->queued, (uintptr_t)p->event);
  }
}

static int device_copy_over(host_lanes* s, lane* l, piece* p) {
  if (!p->asked) return 1;
  int state = s->device.query(p->event);
  if (state == kNotReady) return 0;
  host_lanes_span* span = &p->of->request.spans[p->number];
  if (span->device_start_ns < l->device_free_ns) span->device_start_ns = l->device_free_ns;
  span->device_end_ns = l->device_free_ns = now_ns();
  if (state) fail_on_device(p->of, state);
  return 1;
}

// --- a lane ----------------------------------------------------------------------------------------------------------

static piece* piece_at(lane* l, int64_t number) { return &l->ring[number % l->count]; }

// From here on the caller may free the transfer.
static void end_transfer(transfer* t) { atomic_store(&t->done, 1); }

static void take_transfer(host_lanes* s, lane* l) {
  pthread_mutex_lock(&s->lock);
  transfer* t = l->first;
  if (t) {
    l->first = t->after;
    if (!l->first) l->last = NULL;
    atomic_fetch_sub(&s->queued, 1);
  }
  pthread_mutex_unlock(&s->lock);
  l->current = t;
}

// Whether the transfer has a piece to begin, as far as what it waits for is concerned: 0 not yet, -1 none.
static int is_ready(host_lanes* s, transfer* t) {
  if (!t || t->begun == t->pieces) return -1;
  int state = t->request.after ? s->device.query(t->request.after) : 0;
  if (state == kNotReady) return 0;
  t->request.after = NULL;
  if (!state) return 1;
  fail_on_device(t, state);
  return -1;
}

// The next piece of the lane's transfers, in a free place of the ring; NULL where there is neither.
static piece* next_piece(host_lanes* s, lane* l) {
  int ready;
  while ((ready = is_ready(s, l->current)) < 0) {
    transfer* t = l->current;
    l->current = NULL;
    if (t && t->over == t->pieces) end_transfer(t);  // else its last piece does
    if (!atomic_load(&s->queued)) return NULL;
    take_transfer(s, l);
    if (!l->current) return NULL;
  }
  if (!ready || l->begun == l->ended + l->count) return NULL;
  transfer* t = l->current;
  piece* p = piece_at(l, l->begun++);
  p->of = t;
  p->number = t->begun++;
  p->first = p->number * t->request.piece_rows;
  p->rows = t->request.host.rows - p->first;
  if (p->rows > t->request.piece_rows) p->rows = t->request.piece_rows;
  return p;
}

static void leave(host_lanes* s, lane* l) {
  piece* p = piece_at(l, l->ended++);
  transfer* t = p->of;
  if (s->poison) memset(p->memory, 0xff, (size_t)l->bytes);
  if (++t->over == t->pieces && t != l->current) end_transfer(t);
}

static void begin(host_lanes* s, piece* p, int on_device) {
  if (on_device) {
    begin_device_copy(s, p);
  } else {
    begin_host_copy(s, p);
  }
}

static int is_over(host_lanes* s, lane* l, piece* p, int on_device) {
  return on_device ? device_copy_over(s, l, p) : host_copy_over(p);
}

// Everything in the lane that can move, the last copies first so that pieces come free.
static int move(host_lanes* s, lane* l) {
  int moved = 0;
  for (; l->ended < l->second && is_over(s, l, piece_at(l, l->ended), !l->out); moved = 1) leave(s, l);
  for (; l->second < l->begun && is_over(s, l, piece_at(l, l->second), l->out); moved = 1) {
    piece* p = piece_at(l, l->second++);
    p->asked = 0;
    if (!failed(p->of)) begin(s, p, !l->out);
  }
  for (piece* p; (p = next_piece(s, l)); moved = 1) begin(s, p, l->out);
  return moved;
}

// Begins no more pieces, nor second copies of the transfer that is cut short; others in the ring go their way.
static void give_up(host_lanes* s, lane* l) {
  for (;;) {
    if (!l->current) take_transfer(s, l);
    transfer* t = l->current;
    if (!t) break;
    t->result.cancelled = 1;
    cut_short(t);
    l->current = NULL;
    if (t->over == t->pieces) end_transfer(t);
  }
}

// --- the thread ------------------------------------------------------------------------------------------------------

static int is_busy(const lane* l) { return l->current || l->ended < l->begun; }

// Until there is a transfer, or an end; 0 for the latter. Called with nothing in either lane.
static int rest_until_work(host_lanes* s) {
  pthread_mutex_lock(&s->lock);
  if (!atomic_load(&s->queued)) {
    atomic_store(&s->cancelling, 0);
    pthread_cond_broadcast(&s->calm);
  }
  s->sleeping = 1;
  while (!atomic_load(&s->queued) && !s->closing) pthread_cond_wait(&s->work, &s->lock);
  s->sleeping = 0;
  int go_on = !s->closing || atomic_load(&s->queued);
  pthread_mutex_unlock(&s->lock);
  return go_on;
}

static void* run_lanes(void* argument) {
  host_lanes* s = argument;
  s->device.set_context(s->device.context);  // where that fails, so does the first copy
#ifdef __linux__
  prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // short sleeps are short
#endif
  int64_t moved_ns = now_ns();
  for (;;) {
    if (atomic_load(&s->cancelling)) {
      give_up(s, &s->in);
      give_up(s, &s->out);
    }
    int moved = move(s, &s->out);
    moved |= move(s, &s->in);
    if (moved) {
      moved_ns = now_ns();
    } else if (!is_busy(&s->in) && !is_busy(&s->out)) {
      if (!rest_until_work(s)) return NULL;
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

static void free_lanes(host_lanes* s) {
  free_ring(s->in.ring, s->in.count);
  free_ring(s->out.ring, s->out.count);
  pthread_cond_destroy(&s->calm);
  pthread_cond_destroy(&s->work);
  pthread_mutex_destroy(&s->lock);
  free(s);
}

host_lanes* host_lanes_open(pool* workers, const host_lanes_device* device, int poison) {
  host_lanes* s = calloc(1, sizeof *s);
  if (!s) return NULL;
  s->device = *device;
  s->workers = workers;
  s->poison = poison;
  s->out.out = 1;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->work, NULL);
  pthread_cond_init(&s->calm, NULL);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for Python's threads
  int error = pthread_create(&s->thread, NULL, run_lanes, s);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) {
    free_lanes(s);
    errno = error;
    return NULL;
  }
#ifdef __linux__
  pthread_setname_np(s->thread, "pipeline-lanes");
#endif
  return s;
}

int host_lanes_use(host_lanes* s, int out, const host_lanes_ring* ring) {
  if (ring->count < 1) return EINVAL;
  piece* pieces = calloc((size_t)ring->count, sizeof *pieces);
  for (int64_t i = 0; pieces && i < ring->count; i++) {
    pieces[i] = (piece){.memory = ring->memory[i], .event = ring->events[i], .copy = malloc(host_copy_job_bytes())};
    if (!pieces[i].copy) {
      free_ring(pieces, ring->count);
      pieces = NULL;
    }
  }
  if (!pieces) return ENOMEM;
  lane* l = out ? &s->out : &s->in;
  pthread_mutex_lock(&s->lock);  // the lanes' thread looks after it has taken a transfer
  free_ring(l->ring, l->count);  // of a call that an interrupt left without its result
  l->ring = pieces;
  l->count = ring->count;
  l->bytes = ring->bytes;
  pthread_mutex_unlock(&s->lock);
  return 0;
}

size_t host_lanes_transfer_bytes(void) { return sizeof(transfer); }

void host_lanes_submit(host_lanes* s, transfer* t, const host_lanes_request* request) {
  int64_t pieces = (request->host.rows + request->piece_rows - 1) / request->piece_rows;
  *t = (transfer){.request = *request, .pieces = pieces};
  lane* l = request->out ? &s->out : &s->in;
  pthread_mutex_lock(&s->lock);
  if (l->last) {
    l->last->after = t;
  } else {
    l->first = t;
  }
  l->last = t;
  atomic_fetch_add(&s->queued, 1);
  if (s->sleeping) pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
}

void* host_lanes_queued(transfer* t) { return (void*)atomic_load(&t->queued); }

int host_lanes_done(transfer* t, host_lanes_result* result) {
  if (!atomic_load(&t->done)) return 0;
  *result = t->result;
  return 1;
}

void host_lanes_cancel(host_lanes* s) {
  pthread_mutex_lock(&s->lock);
  if (!s->sleeping || atomic_load(&s->queued)) {
    atomic_store(&s->cancelling, 1);
    while (atomic_load(&s->cancelling)) pthread_cond_wait(&s->calm, &s->lock);
  }
  pthread_mutex_unlock(&s->lock);
}

void host_lanes_close(host_lanes* s) {
  host_lanes_cancel(s);
  pthread_mutex_lock(&s->lock);
  s->closing = 1;
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
  pthread_join(s->thread, NULL);
  free_lanes(s);
}
