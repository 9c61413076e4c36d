// The interface of the mover in C: see mover.c. pipeline/staging/host_library.py has the twins of the structures.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "copy_workers.h"

// A device, by the functions of its driver, each of which returns a CUresult, and what they are called with.
typedef struct {
  void* context;
  void *in_stream, *out_stream;
  int (*set_context)(void* context);
  int (*copy_in)(uint64_t target, const void* source, size_t bytes, void* stream);
  int (*copy_out)(void* target, uint64_t source, size_t bytes, void* stream);
  int (*record)(void* event, void* stream);
  int (*query)(void* event);
} mover_device;

// `count` pinned pieces of `bytes` bytes, each with an event of its own.
typedef struct {
  int64_t count, bytes;
  void** memory;
  void** events;
} mover_ring;

// When each of a piece's two copies began and ended, CLOCK_MONOTONIC; 0 for one that wasn't made.
typedef struct {
  int64_t host_start_ns, host_end_ns;
  int64_t device_start_ns, device_end_ns;
} mover_span;

// `host` describes all rows of the chunk on the host, as a copy job's request does; its other end is left open, since
// pieces take that place one after the other. In device memory and in pieces, rows follow one another.
typedef struct {
  copy_request host;
  uint64_t device;
  int64_t row_bytes, piece_rows;
  int64_t chunk;      // its number, for profilers
  mover_span* spans;  // one for each piece
  void* after;        // an event that has to be over before the first piece is begun, or NULL
  int32_t out;
} transfer_request;

// `error` and `position` are a copy job's, `device_error` is a CUresult.
typedef struct {
  int64_t position;
  int32_t error, device_error, cancelled;
} transfer_result;

typedef struct mover mover;
typedef struct transfer transfer;

mover* mover_open(pool* workers, const mover_device* device, int poison);
int mover_use(mover* m, int out, const mover_ring* ring);
size_t mover_transfer_bytes(void);
void mover_submit(mover* m, transfer* t, const transfer_request* request);
void* mover_queued(transfer* t);
int mover_done(transfer* t, transfer_result* result);
void mover_cancel(mover* m);
void mover_close(mover* m);
int mover_has_ranges(void);
