// A profiler that writes down NVTX ranges: loaded into a process by NVTX_INJECTION64_PATH, as nsys's is. One line for
// each to the file NVTX_TOOL_LOG: push, pop, start or end; the thread; name, payload, color; the number of a range.
//
// The layouts are those of NVTX 3 (nvtxDetail/nvtxTypes.h, nvToolsExt.h), which only change with its major version.

#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  int64_t payload;
  int32_t message_type;  // 1: text, 3: a registered string
  const void* message;
} attributes;

typedef struct {
  size_t size;
  int (*function_table)(int module, void**** table, unsigned* size);
} callbacks;

static FILE* file;
static atomic_ullong ranges = 1;

static const char* name_of(const attributes* a) {
  if (a->message_type == 1 || a->message_type == 3) return a->message;  // registered strings are their text, see below
  return "?";
}

static void note(const char* what, const attributes* a, unsigned long long range) {
  long thread = syscall(SYS_gettid);
  if (a) {
    fprintf(file, "%s %ld %s %lld %x %llu\n", what, thread, name_of(a), (long long)a->payload, a->color, range);
  } else {
    fprintf(file, "%s %ld %llu\n", what, thread, range);
  }
  fflush(file);
}

static void* create_domain(const char* name) { return strdup(name); }
static void* register_string(void* domain, const char* text) { return (void)domain, strdup(text); }
static int push(void* domain, const attributes* a) { return (void)domain, note("push", a, 0), 0; }
static int pop(void* domain) { return (void)domain, note("pop", NULL, 0), 0; }
static void end(void* domain, uint64_t range) { (void)domain, note("end", NULL, range); }

static uint64_t start(void* domain, const attributes* a) {
  unsigned long long range = atomic_fetch_add(&ranges, 1);
  return (void)domain, note("start", a, range), range;
}

int InitializeInjectionNvtx2(const void* (*export_table)(uint32_t)) {
  enum { kCallbacks = 1, kCore2 = 5, kStart = 2, kEnd = 3, kPush = 4, kPop = 5, kRegister = 10, kCreate = 12 };
  const callbacks* c = export_table(kCallbacks);
  void*** table;
  unsigned size;
  if (!file) file = fopen(getenv("NVTX_TOOL_LOG"), "a");
  if (!c || !file || !c->function_table(kCore2, &table, &size) || size <= kCreate) return 0;
  *table[kStart] = (void*)start;
  *table[kEnd] = (void*)end;
  *table[kPush] = (void*)push;
  *table[kPop] = (void*)pop;
  *table[kRegister] = (void*)register_string;
  *table[kCreate] = (void*)create_domain;
  return 1;
}
