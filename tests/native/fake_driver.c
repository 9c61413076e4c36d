// A stand-in for the CUDA driver's functions that csrc/host/mover.c calls: "device memory" is the host's, two streams
// run copies and events in order, each in a thread of its own and with random delays. A stream can be held, and one
// copy can be made to fail.
//
// Compiled into mover_stress.c, and as a library of its own for tests/helpers/native_device.py.

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
  atomic_int pending, error;
} fake_event;

typedef struct operation {
  struct operation* after;
  void* target;
  const void* source;
  size_t bytes;
  fake_event* event;  // recorded, if this isn't a copy
} operation;

typedef struct {
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t work;
  operation *first, *last;
  int closing, held;
  int error;  // stays, as that of a context does
  uint64_t dice;
} fake_stream;

static atomic_int copies_until_refused = -1, copies_until_failure = -1;
static const int kRefused = 1, kFailed = 700, kPending = 600;  // CUDA_ERROR_INVALID_VALUE, _ILLEGAL_ADDRESS, _NOT_READY

enum { kRefusal, kFailure };

// The copy after so many others is refused, or fails after it was queued. -1: none.
void fake_trouble(int how, int copies) {
  atomic_store(how == kRefusal ? &copies_until_refused : &copies_until_failure, copies);
}

static void* run_stream(void* argument) {
  fake_stream* s = argument;
  for (;;) {
    pthread_mutex_lock(&s->lock);
    while ((!s->first || s->held) && !s->closing) pthread_cond_wait(&s->work, &s->lock);
    operation* o = s->first;
    if (o && !(s->first = o->after)) s->last = NULL;
    s->dice = s->dice * 6364136223846793005u + 1442695040888963407u;
    long delay_ns = (long)(s->dice >> 33) % 4 ? 0 : (long)(s->dice >> 40) % 100000;
    pthread_mutex_unlock(&s->lock);
    if (!o) return NULL;
    nanosleep(&(struct timespec){0, delay_ns}, NULL);
    if (o->event) {
      if (s->error) atomic_store(&o->event->error, s->error);
      atomic_fetch_sub(&o->event->pending, 1);
    } else if (atomic_load(&copies_until_failure) >= 0 && atomic_fetch_sub(&copies_until_failure, 1) == 0) {
      s->error = kFailed;
    } else if (!s->error) {
      memcpy(o->target, o->source, o->bytes);
    }
    free(o);
  }
}

void* fake_open_stream(uint64_t seed) {
  fake_stream* s = calloc(1, sizeof *s);
  s->dice = seed;
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->work, NULL);
  pthread_create(&s->thread, NULL, run_stream, s);
  return s;
}

// 1 stops a stream before its next operation, 0 lets it go on.
void fake_hold(void* stream, int held) {
  fake_stream* s = stream;
  pthread_mutex_lock(&s->lock);
  s->held = held;
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
}

// Whether something is queued on a stream and hasn't begun.
int fake_waits(void* stream) {
  fake_stream* s = stream;
  pthread_mutex_lock(&s->lock);
  int waits = s->first != NULL;
  pthread_mutex_unlock(&s->lock);
  return waits;
}

void fake_close_stream(void* stream) {
  fake_stream* s = stream;
  pthread_mutex_lock(&s->lock);
  s->closing = 1;
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
  pthread_join(s->thread, NULL);
  free(s);
}

void* fake_new_event(void) { return calloc(1, sizeof(fake_event)); }

static int queue_operation(fake_stream* s, operation with) {
  operation* o = malloc(sizeof *o);
  *o = with;
  pthread_mutex_lock(&s->lock);
  if (s->last) {
    s->last->after = o;
  } else {
    s->first = o;
  }
  s->last = o;
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
  return 0;
}

static int queue_copy(void* target, const void* source, size_t bytes, void* stream) {
  if (atomic_load(&copies_until_refused) >= 0 && atomic_fetch_sub(&copies_until_refused, 1) == 0) return kRefused;
  return queue_operation(stream, (operation){.target = target, .source = source, .bytes = bytes});
}

int fake_set_context(void* context) {
  (void)context;
  return 0;
}

int fake_copy_in(uint64_t target, const void* source, size_t bytes, void* stream) {
  return queue_copy((void*)(uintptr_t)target, source, bytes, stream);
}

int fake_copy_out(void* target, uint64_t source, size_t bytes, void* stream) {
  return queue_copy(target, (const void*)(uintptr_t)source, bytes, stream);
}

int fake_record(void* event, void* stream) {
  fake_event* e = event;
  atomic_fetch_add(&e->pending, 1);
  return queue_operation(stream, (operation){.event = e});
}

// An event that isn't behind anything on a stream: 1 begins what it waits for, -1 ends it.
void fake_pend(void* event, int change) { atomic_fetch_add(&((fake_event*)event)->pending, change); }

int fake_query(void* event) {
  fake_event* e = event;
  if (atomic_load(&e->pending)) return kPending;
  return atomic_load(&e->error);
}
