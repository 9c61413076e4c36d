// What the stress programs share.

#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CHECK(condition)                                                \
  do {                                                                  \
    if (!(condition)) {                                                 \
      fprintf(stderr, "line %d: %s is not so\n", __LINE__, #condition); \
      abort();                                                          \
    }                                                                   \
  } while (0)

typedef struct {
  uint64_t state;
} dice;

static uint64_t roll(dice* d, uint64_t sides) {
  d->state = d->state * 6364136223846793005u + 1442695040888963407u;
  return (d->state >> 33) % sides;
}

// A temporary file without a name.
static int nameless_file(void) {
  FILE* file = tmpfile();
  CHECK(file);
  int fd = dup(fileno(file));
  fclose(file);
  return fd;
}
