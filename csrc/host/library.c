// What the library tells of itself, so that Python can refuse one that doesn't fit (pipeline/staging/host_library.py).

#include <string.h>

#include "copy_workers.h"
#include "mover.h"

#ifndef HOST_SOURCE
#define HOST_SOURCE "unknown"
#endif

// The digest of the sources that it was built from.
const char* host_source(void) { return HOST_SOURCE; }

// The size of a structure that crosses from Python, by its name; 0 for an unknown one.
size_t host_struct_bytes(const char* name) {
  static const struct {
    const char* name;
    size_t bytes;
  } kStructs[] = {
      {"copy_request", sizeof(copy_request)},       {"copy_result", sizeof(copy_result)},
      {"mover_device", sizeof(mover_device)},       {"mover_ring", sizeof(mover_ring)},
      {"mover_span", sizeof(mover_span)},           {"transfer_request", sizeof(transfer_request)},
      {"transfer_result", sizeof(transfer_result)},
  };
  for (size_t i = 0; i < sizeof kStructs / sizeof *kStructs; i++) {
    if (!strcmp(name, kStructs[i].name)) return kStructs[i].bytes;
  }
  return 0;
}
