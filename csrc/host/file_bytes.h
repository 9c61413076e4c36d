// How copy workers read and write the bytes of files. Only copy_workers.c includes this.
//
// One file's calls of pwrite wait for one another on most file systems: they share a lock of the file's. Nothing waits
// for a lock where bytes are stored through a shared map of the file. But a store ends the process (SIGBUS) where the
// page can't be had, since the file was cut or the file system is full. So the system stores them, by process_vm_writev
// to this process: it fails with EFAULT then. It also maps each page for that, which costs a worker more time than
// pwrite does: only many workers gain. Only files in memory are mapped: see pipeline/io/reservation.py, and
// docs/notes/formats.md for what was measured.

#pragma once

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/uio.h>
#endif

#include "copy_workers.h"

// Stores some of `bytes` through the map: as many as it says, or -1 with errno set.
static ssize_t store_through_map(char* map, const char* source, size_t bytes, int64_t position) {
#ifdef __linux__
  struct iovec from = {(void*)(uintptr_t)source, bytes}, to = {map + position, bytes};
  return process_vm_writev(getpid(), &from, 1, &to, 1, 0);
#else
  (void)map, (void)source, (void)bytes, (void)position;
  errno = ENOSYS;
  return -1;
#endif
}

int copy_workers_use_maps(void) {
  char from = 1, to = 0;
  return store_through_map(&to, &from, 1, 0) == 1 && to == 1;
}

// Moves some of `bytes` from or to the file: as many as it says, or -1 with errno set.
static ssize_t move_some(const copy_request* r, char* memory, size_t bytes, int64_t position) {
  if (r->kind == READ_FILE) return pread(r->fd, memory, bytes, position);
  if (r->map) return store_through_map(r->map, memory, bytes, position);
  return pwrite(r->fd, memory, bytes, position);
}

// Moves all of `bytes` from or to the file, from `*position` on, which ends behind what was moved. 0, or what a
// result's `error` says.
static int move_file_bytes(const copy_request* r, char* memory, int64_t bytes, int64_t* position) {
  for (int64_t end = *position + bytes; *position < end;) {
    ssize_t moved = move_some(r, memory, (size_t)(end - *position), *position);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return moved < 0 ? errno : -1;
    memory += moved;
    *position += moved;
  }
  return 0;
}

// Takes the `bytes` that a job has stored through the map out of this process's page table: the file keeps the pages.
// They would count as the process's memory, and the end of the map would drop them one after the other, on one core.
//
// NOTE: each call interrupts all cores at which the process has threads, so there is one for a job, not for a grain.
static void leave_map(const copy_request* r, int64_t bytes) {
#ifdef __linux__
  if (r->kind != WRITE_FILE || !r->map || bytes <= 0) return;
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)r->map + (uintptr_t)r->offset;
  uintptr_t begin = first & ~(page - 1), end = (first + (uintptr_t)bytes + page - 1) & ~(page - 1);
  (void)madvise((void*)begin, end - begin, MADV_DONTNEED);  // a shared map's: what is in the file stays
#else
  (void)r, (void)bytes;
#endif
}

// Lets the system start to write what has reached the page cache, so that the disk is at work from the beginning. By
// itself the system starts when a tenth of the memory waits to be written, or when a sync asks for it. This is only a
// hint: a later sync reports what goes wrong with the data. The call blocks while the disk has enough to do, so the job
// ends before it, and only the worker waits. The file may be closed by then.
static void start_writing(const copy_request* r, int64_t bytes) {
#ifdef __linux__
  if (r->kind == WRITE_FILE && !r->map) (void)sync_file_range(r->fd, r->offset, bytes, SYNC_FILE_RANGE_WRITE);
#else
  (void)r, (void)bytes;
#endif
}
