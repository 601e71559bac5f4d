// The GPU, its properties, errors, memory and pinned memory: address space, of which the system gives pages that are written,
// all zero at first. A copy is carried out at once; it counts as work of its stream.
#include "null_gpu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { GRANULE = 2 << 20 };    // cudaMalloc's unit, in bytes
enum { MOST_COPIED = 64 << 20 }; // bytes between two places of the GPU: more would make memory resident that nothing reads

static Card described;
__attribute__((constructor)) static void describe(void) {
  const char *text = getenv("NULLGPU");
  int read = text ? sscanf(text, "%63[^;];%d;%d;%d;%d;%zu;%zu", described.name, &described.major, &described.minor, &described.sms,
                           &described.threads_per_sm, &described.shared_per_block, &described.memory) : 0;
  if (read != 7) described = (Card){"NVIDIA null GPU", 8, 0, 108, 2048, 163 << 10, (size_t)80 << 30};
}
const Card *card(void) { return &described; }

void *new_handle(void) {
  static uintptr_t last = 0x1000;
  return (void *)__sync_add_and_fetch(&last, 16);
}

static __thread cudaError_t last_error = cudaSuccess;
cudaError_t failed(cudaError_t error) { return last_error = error; }
API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError(void) { return last_error; }

API cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
API cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  const Card *c = card();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", c->name);
  p->major = c->major, p->minor = c->minor, p->totalGlobalMem = c->memory, p->multiProcessorCount = c->sms;
  p->l2CacheSize = 40 << 20, p->totalConstMem = 64 << 10;
  p->maxThreadsPerMultiProcessor = c->threads_per_sm, p->maxBlocksPerMultiProcessor = c->major == 8 && c->minor == 6 ? 16 : c->threads_per_sm / 64;
  p->sharedMemPerMultiprocessor = c->shared_per_block + (c->major < 8 ? 0 : 1024), p->sharedMemPerBlockOptin = c->shared_per_block;
  p->sharedMemPerBlock = 48 << 10, p->reservedSharedMemPerBlock = c->major < 8 ? 0 : 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32, p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->cooperativeLaunch = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  const int known[][2] = {
    {cudaDevAttrMaxThreadsPerBlock, p.maxThreadsPerBlock}, {cudaDevAttrMaxSharedMemoryPerBlock, p.sharedMemPerBlock},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, p.sharedMemPerBlockOptin}, {cudaDevAttrL2CacheSize, p.l2CacheSize},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, p.sharedMemPerMultiprocessor}, {cudaDevAttrCooperativeLaunch, 1},
    {cudaDevAttrMultiProcessorCount, p.multiProcessorCount}, {cudaDevAttrComputeCapabilityMajor, p.major},
    {cudaDevAttrComputeCapabilityMinor, p.minor}, {cudaDevAttrMaxGridDimX, p.maxGridSize[0]}, {cudaDevAttrMaxGridDimY, p.maxGridSize[1]},
    {cudaDevAttrMaxGridDimZ, p.maxGridSize[2]}, {cudaDevAttrWarpSize, p.warpSize}, {cudaDevAttrClockRate, 1700000},
    {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor}, {cudaDevAttrMaxRegistersPerBlock, p.regsPerBlock},
    {cudaDevAttrMaxBlocksPerMultiprocessor, p.maxBlocksPerMultiProcessor}, {cudaDevAttrMaxRegistersPerMultiprocessor, p.regsPerBlock},
  };
  *value = 0;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i][0] == (int)attribute) *value = known[i][1];
  return cudaSuccess;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range *ranges;
static int count, room;
static size_t used;

static Range *range_of(const void *pointer) { // NULL: not ours. Call with the lock.
  for (Range *range = ranges; range < ranges + count; range++)
    if (range->start <= (const char *)pointer && (const char *)pointer < range->start + range->bytes) return range;
  return NULL;
}

static void *take(size_t bytes, int kind) {
  size_t whole = (bytes + GRANULE - 1) / GRANULE * GRANULE;
  char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return NULL;
  pthread_mutex_lock(&lock);
  if (count == room) ranges = realloc(ranges, (room = 2 * room + 64) * sizeof *ranges);
  ranges[count++] = (Range){start, whole, kind};
  if (kind == DEVICE) used += whole;
  pthread_mutex_unlock(&lock);
  return start;
}

static cudaError_t drop(void *start) {
  pthread_mutex_lock(&lock);
  Range *range = range_of(start);
  if (range) {
    munmap(range->start, range->bytes);
    if (range->kind == DEVICE) used -= range->bytes;
    *range = ranges[--count];
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

Range find_range(const void *pointer) {
  pthread_mutex_lock(&lock);
  Range *range = range_of(pointer), found = range ? *range : (Range){0};
  pthread_mutex_unlock(&lock);
  return found;
}

API cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  *pointer = NULL;
  if (!bytes) return cudaSuccess;
  int fits = used <= card()->memory && bytes <= card()->memory - used;
  return fits && (*pointer = take(bytes, DEVICE)) ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFree(void *pointer) { return drop(pointer); }
API cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  return (*pointer = take(bytes ? bytes : 1, HOST)) ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFreeHost(void *pointer) { return drop(pointer); }
API cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *total = card()->memory;
  *left = used < *total ? *total - used : 0;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  int kind = find_range(pointer).kind;
  memset(attributes, 0, sizeof *attributes);
  attributes->type = types[kind], attributes->device = kind ? 0 : -2;
  attributes->devicePointer = kind ? (void *)pointer : NULL;
  attributes->hostPointer = kind == HOST ? (void *)pointer : NULL;
  return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  enqueue(stream);
  if (bytes <= MOST_COPIED || find_range(from).kind != DEVICE || find_range(to).kind != DEVICE) memmove(to, from, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  finish_stream(NULL);
  return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
API cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
  enqueue(stream);
  if (bytes <= MOST_COPIED) memset(pointer, value, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void *pointer, int value, size_t bytes) { return cudaMemsetAsync(pointer, value, bytes, NULL); }
