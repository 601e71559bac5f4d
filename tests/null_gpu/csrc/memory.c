// Memory of the cards and pinned memory of the host: address space, of which the system gives pages that are written, all
// zero at first. A card has as much as cards.c says; $NULLGPU_CONTEXT bytes of it are taken by "the context".
#include "null_gpu.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { GRANULE = 2 << 20 }; // cudaMalloc's unit on the cards of the table, in bytes

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range *ranges; // sorted by start
static int count, room;
static size_t used[MOST_DEVICES];

// The place of the last range that starts at or before `pointer`, or -1. Call with the lock.
static int place_of(const void *pointer) {
  int low = 0, high = count;
  while (low < high) {
    int middle = (low + high) / 2;
    if (ranges[middle].start <= (const char *)pointer) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

void *take(size_t bytes, int kind) {
  size_t whole = (bytes + GRANULE - 1) / GRANULE * GRANULE;
  int rights = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *mapped = mmap(NULL, whole + GRANULE, rights, flags, -1, 0);
  if (mapped == MAP_FAILED) return NULL;
  char *start = (char *)(((uintptr_t)mapped + GRANULE - 1) / GRANULE * GRANULE), *end = mapped + whole + GRANULE;
  if (start > mapped) munmap(mapped, start - mapped);
  if (end > start + whole) munmap(start + whole, end - (start + whole));
  pthread_mutex_lock(&lock);
  if (count == room) ranges = realloc(ranges, (room = 2 * room + 64) * sizeof *ranges);
  int place = place_of(start) + 1;
  memmove(ranges + place + 1, ranges + place, (count++ - place) * sizeof *ranges);
  ranges[place] = (Range){start, whole, kind, current_device};
  if (kind == DEVICE) used[current_device] += whole;
  pthread_mutex_unlock(&lock);
  return start;
}

static void drop(void *start) {
  pthread_mutex_lock(&lock);
  int place = place_of(start);
  if (place >= 0 && ranges[place].start == start) {
    Range range = ranges[place];
    munmap(range.start, range.bytes);
    if (range.kind == DEVICE) used[range.device] -= range.bytes;
    memmove(ranges + place, ranges + place + 1, (--count - place) * sizeof *ranges);
  }
  pthread_mutex_unlock(&lock);
}

Range find_range(const void *pointer) {
  Range found = {0};
  pthread_mutex_lock(&lock);
  int place = place_of(pointer);
  if (place >= 0 && (const char *)pointer < ranges[place].start + ranges[place].bytes) found = ranges[place];
  pthread_mutex_unlock(&lock);
  return found;
}

static size_t available(void) {
  const char *context = getenv("NULLGPU_CONTEXT");
  size_t taken = used[current_device] + (context ? strtoull(context, NULL, 10) : 0);
  return taken < card()->memory ? card()->memory - taken : 0;
}

API cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  COUNT(mallocs);
  *pointer = NULL;
  if (!bytes) return cudaSuccess;
  if (bytes > available() || !(*pointer = take(bytes, DEVICE))) return failed(cudaErrorMemoryAllocation);
  return cudaSuccess;
}
API cudaError_t cudaFree(void *pointer) {
  COUNT(frees);
  if (pointer) drop(pointer);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  *pointer = take(bytes ? bytes : 1, HOST);
  return *pointer ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFreeHost(void *pointer) {
  if (pointer) drop(pointer);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *total = card()->memory;
  *left = available();
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  Range range = find_range(pointer);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = range.kind == DEVICE ? cudaMemoryTypeDevice : range.kind == HOST ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  attributes->device = range.kind ? range.device : -2;
  attributes->devicePointer = range.kind ? (void *)pointer : NULL;
  attributes->hostPointer = range.kind == HOST ? (void *)pointer : NULL;
  return cudaSuccess;
}

static void copy(void *to, const void *from, size_t bytes) {
  int source = find_range(from).kind, target = find_range(to).kind;
  if (source == DEVICE && target != DEVICE) {
    COUNT(d2h);
    trace("copy of %zu bytes to the host", bytes);
  }
  if (target == DEVICE && source != DEVICE) COUNT(h2d);
  // Copies within a card would make memory resident that nothing reads.
  if (source == DEVICE && target == DEVICE && bytes > MOST_COPIED) return;
  memmove(to, from, bytes);
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  COUNT(stream_syncs);
  finish_stream(NULL);
  copy(to, from, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  enqueue(stream);
  copy(to, from, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                  enum cudaMemcpyKind kind, cudaStream_t stream) {
  enqueue(stream);
  for (size_t row = 0; row < height; row++) copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
  enqueue(stream);
  if (bytes <= MOST_COPIED) memset(pointer, value, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void *pointer, int value, size_t bytes) { return cudaMemsetAsync(pointer, value, bytes, NULL); }
