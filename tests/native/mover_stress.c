// Stresses csrc/host/mover.c under the sanitizers with the driver of
// fake_driver.c: transfers of every kind both ways, rings of few pieces,
// copies that fail on the host or on the device, cancelling at any moment.
// tests/staging/test_sanitizers.py builds and runs it. Exits 0 and says what it
// did, or aborts.

#define _GNU_SOURCE
#include <stdio.h>

#include "../../csrc/host/copy_workers.c"
#include "../../csrc/host/mover.c"
#include "fake_driver.c"
#include "stress.h"

enum { kElements = 64, kMostRows = 40, kTransfers = 6 };

// fp32 rows on the host, some bytes apart, and wire rows of the device: fp32, or bf16 where there is a cast.
typedef struct {
  transfer* t;
  transfer_request r;
  char *host, *device, *expected;
  int fd;
  int64_t kernel_ended_ns;  // when the event that it waits for was over
} moved;

static size_t host_bytes(const moved* m) { return (size_t)(m->r.host.rows * kElements * 4); }

enum { ANY, IN_MEMORY, FROM_EMPTY_FILE };

static void make_transfer(moved* m, dice* d, int kind) {
  int out = (int)roll(d, 2), cast = (int)roll(d, 2), file = kind == ANY && roll(d, 2);
  if (kind == FROM_EMPTY_FILE) out = cast = 0;
  int64_t rows = (int64_t)roll(d, kMostRows) + 1, row_bytes = kElements * (cast ? 2 : 4);
  int in_memory = !file && kind != FROM_EMPTY_FILE;
  int64_t stride = kElements * 4 + (in_memory ? (int64_t)roll(d, 3) * 4 : 0);
  m->host = calloc(1, (size_t)(rows * stride));
  m->device = calloc(1, (size_t)(rows * row_bytes));
  m->expected = calloc(1, (size_t)(rows * stride));
  m->fd = -1;
  copy_request host = {.kind = COPY, .rows = rows, .length = cast ? kElements : kElements * 4};
  for (int64_t row = 0; row < rows; row++) {
    for (int i = 0; i < kElements; i++) {
      uint32_t bits = (uint32_t)(0x3f800000 + roll(d, 1 << 22));
      if (cast && out) bits &= 0xffff0000;  // what bf16 holds
      memcpy(m->expected + row * stride + 4 * i, &bits, 4);
      if (out && !cast) memcpy(m->device + row * row_bytes + 4 * i, &bits, 4);
      if (out && cast) memcpy(m->device + row * row_bytes + 2 * i, (char*)&bits + 2, 2);
    }
  }
  if (out) {
    host.target = m->host;
    host.target_stride = stride;
    host.streaming = (int)roll(d, 2);
    host.fresh = (int)roll(d, 2);
    if (cast) host.cast = BF16_TO_FP32;
  } else {
    memcpy(m->host, m->expected, (size_t)(rows * stride));
    host.source = m->host;
    host.source_stride = stride;
    if (cast) host.cast = FP32_TO_BF16;
  }
  if (file) {
    m->fd = nameless_file();
    host.kind = out ? WRITE_FILE : READ_FILE;
    host.fd = m->fd;
    host.offset = 77;
    if (!out) CHECK(pwrite(m->fd, m->expected, (size_t)(rows * stride), 77) == rows * stride);
  }
  if (kind == FROM_EMPTY_FILE) {
    host.kind = READ_FILE;
    host.fd = m->fd = open("/dev/null", O_RDONLY);
  }
  int64_t piece_rows = (int64_t)roll(d, 7) + 1, pieces = (rows + piece_rows - 1) / piece_rows;
  mover_span* spans = calloc((size_t)pieces, sizeof *spans);
  m->r = (transfer_request){.host = host, .device = (uintptr_t)m->device, .row_bytes = row_bytes};
  m->r.piece_rows = piece_rows, m->r.spans = spans, m->r.out = out;
  m->t = malloc(mover_transfer_bytes());
  m->kernel_ended_ns = 0;
  if (out && roll(d, 2)) fake_pend(m->r.after = fake_new_event(), 1);
}

// What "kernels" write is there now.
static void end_kernels(moved* m, dice* d) {
  for (int i = 0; i < kTransfers; i++) {
    if (!m[i].r.after) continue;
    if (roll(d, 2)) nanosleep(&(struct timespec){0, (long)roll(d, 200000)}, NULL);
    m[i].kernel_ended_ns = now_ns();
    fake_pend(m[i].r.after, -1);
  }
}

// Whether every row is where it belongs; with `some`, or nothing is there.
static int arrived(moved* m, int some) {
  static const char nothing[kElements * 4];
  const copy_request* h = &m->r.host;
  int64_t stride = m->r.out ? h->target_stride : h->source_stride;
  if (m->fd >= 0 && m->r.out) CHECK(pread(m->fd, m->host, host_bytes(m), 77) == (ssize_t)host_bytes(m));
  for (int64_t row = 0; row < h->rows; row++) {
    const char* want = m->expected + row * stride;
    if (m->r.out) {
      const char* is = m->host + row * stride;
      if (memcmp(is, want, kElements * 4) && !(some && !memcmp(is, nothing, sizeof nothing))) return 0;
    } else if (h->cast) {
      char wire[kElements * 2];
      copy_row(&kPortableCode, h->cast, 0, wire, want, kElements);
      if (memcmp(m->device + row * m->r.row_bytes, wire, sizeof wire)) return 0;
    } else if (memcmp(m->device + row * m->r.row_bytes, want, kElements * 4)) {
      return 0;
    }
  }
  return 1;
}

static void check_spans(const moved* m) {
  int64_t free_ns = m->kernel_ended_ns;
  for (int64_t i = 0; i < m->t->pieces; i++) {
    const mover_span* s = &m->r.spans[i];
    CHECK(s->host_start_ns > 0 && s->host_start_ns <= s->host_end_ns);
    CHECK(s->device_start_ns >= free_ns && s->device_start_ns <= s->device_end_ns);
    if (m->r.out) CHECK(s->device_start_ns <= s->host_start_ns);
    if (!m->r.out) CHECK(s->host_start_ns <= s->device_start_ns);
    free_ns = s->device_end_ns;
  }
}

static void free_transfer(moved* m) {
  if (m->fd >= 0) close(m->fd);
  free(m->host);
  free(m->device);
  free(m->expected);
  free(m->r.spans);
  free(m->r.after);
  free(m->t);
}

enum { WHOLE, CUT_FILE, REFUSED, FAILED, CANCELLED, kEndings };

static void round_of(pool* p, dice* d, int ending) {
  fake_trouble(kRefusal, -1);
  fake_trouble(kFailure, -1);
  mover_device device = {.in_stream = fake_open_stream(roll(d, 1000)),
                         .out_stream = fake_open_stream(roll(d, 1000)),
                         .set_context = fake_set_context,
                         .copy_in = fake_copy_in,
                         .copy_out = fake_copy_out,
                         .record = fake_record,
                         .query = fake_query};
  mover* s = mover_open(p, &device, (int)roll(d, 2));
  CHECK(s);
  void *memory[2][4], *events[2][4];
  for (int out = 0; out < 2; out++) {
    mover_ring ring = {(int64_t)roll(d, 4) + 1, 7 * kElements * 4, memory[out], events[out]};
    for (int i = 0; i < 4; i++) memory[out][i] = malloc((size_t)ring.bytes), events[out][i] = fake_new_event();
    CHECK(!mover_use(s, out, &ring));
  }
  moved m[kTransfers];
  transfer_result result;
  int others = ending == REFUSED || ending == FAILED ? IN_MEMORY : ANY;
  for (int i = 0; i < kTransfers; i++) make_transfer(&m[i], d, i == 0 && ending == CUT_FILE ? FROM_EMPTY_FILE : others);
  if (ending == REFUSED || ending == FAILED) fake_trouble(ending == REFUSED ? kRefusal : kFailure, (int)roll(d, 20));
  for (int i = 0; i < kTransfers; i++) {
    mover_submit(s, m[i].t, &m[i].r);
    if (roll(d, 3) == 0) nanosleep(&(struct timespec){0, (long)roll(d, 300000)}, NULL);
  }
  if (ending != CANCELLED || roll(d, 2)) end_kernels(m, d);
  if (ending == CANCELLED) {
    nanosleep(&(struct timespec){0, (long)roll(d, 500000)}, NULL);
    mover_cancel(s);
  }
  int whole = 0;
  for (int i = 0; i < kTransfers; i++) {
    while (!mover_done(m[i].t, &result)) {
      CHECK(ending != CANCELLED);
      void* event = mover_queued(m[i].t);
      if (event && ending == WHOLE && !fake_query(event)) CHECK(arrived(&m[i], 0));  // what a kernel would read
      relax();
    }
    if (i == 0 && ending == CUT_FILE) {
      CHECK(result.error == -1 && result.position == 0 && !result.device_error);
    } else if (result.cancelled) {
      CHECK(ending == CANCELLED);
    } else if (result.device_error) {
      CHECK(result.device_error == (ending == REFUSED ? kRefused : kFailed));
      CHECK(!m[i].r.out || arrived(&m[i], 1));
    } else {
      CHECK(!result.error && arrived(&m[i], 0));
      CHECK((mover_queued(m[i].t) == NULL) == m[i].r.out);
      check_spans(&m[i]);
      whole++;
    }
  }
  CHECK(ending != WHOLE || whole == kTransfers);
  CHECK(ending != CUT_FILE || whole == kTransfers - 1);
  mover_close(s);
  fake_close_stream(device.in_stream);
  fake_close_stream(device.out_stream);
  for (int i = 0; i < kTransfers; i++) free_transfer(&m[i]);
  for (int out = 0; out < 2; out++) {
    for (int i = 0; i < 4; i++) free(memory[out][i]), free(events[out][i]);
  }
}

int main(void) {
  dice d = {20261128};
  pool* p = copy_workers_open(2, kBestIsa);
  CHECK(p);
  int rounds[kEndings] = {0};
  for (int i = 0; i < 150; i++) {
    int ending = (int)roll(&d, kEndings);
    round_of(p, &d, ending);
    rounds[ending]++;
  }
  copy_workers_close(p);
  printf("%d whole, %d of a cut file, %d with a refused copy, %d with a failed one, %d cancelled: done\n",
         rounds[WHOLE], rounds[CUT_FILE], rounds[REFUSED], rounds[FAILED], rounds[CANCELLED]);
}
