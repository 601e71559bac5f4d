// Kernels that torch was compiled with: their names, as its libraries register them, and their launches, which are checked
// for a card's limits. What one leaves in memory is said in outputs.c.
#include "null_gpu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// From the address of the host's stub to the kernel's mangled name.
typedef struct {
  const void *stub;
  const char *name;
  Plan *plan; // what its launches compute, once one has been launched
  int planned;
} Named;
static Named *table;
static size_t room, known;

static Named *slot_of(const void *stub) {
  size_t at = ((uintptr_t)stub >> 4) * 0x9E3779B97F4A7C15u;
  for (at &= room - 1; table[at].stub && table[at].stub != stub; at = (at + 1) & (room - 1));
  return &table[at];
}
// Called while libraries load, by one thread at a time.
static void name_kernel(const void *stub, const char *name) {
  if (2 * known >= room) {
    Named *old = table;
    size_t old_room = room;
    room = room ? 2 * room : 1 << 16;
    table = calloc(room, sizeof *table);
    for (size_t i = 0; i < old_room; i++)
      if (old[i].stub) *slot_of(old[i].stub) = old[i];
    free(old);
  }
  Named *slot = slot_of(stub);
  known += !slot->stub;
  *slot = (Named){stub, name, NULL, 0};
}
static Named *kernel_of(const void *stub) {
  static Named unknown = {.name = "a kernel without a name", .planned = 1};
  Named *slot = room ? slot_of(stub) : &unknown;
  if (!slot->stub) return &unknown;
  if (!slot->planned) {
    slot->plan = plan_of(slot->name);
    slot->planned = 1;
  }
  return slot;
}

API void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[4];
  return handle;
}
API char __cudaInitModule(void **handle) { return 1; }
API void __cudaRegisterFunction(void **handle, const char *stub, char *device_stub, const char *name, int threads, uint3 *thread,
                                uint3 *block, dim3 *block_size, dim3 *grid_size, int *warp) {
  name_kernel(stub, name);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}

// Between `<<<` and `>>>`, and the stub.
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block;
  configuration.shared = shared, configuration.stream = stream;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *(void **)stream = configuration.stream;
  return cudaSuccess;
}

static cudaError_t launch(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  Named *kernel = kernel_of(stub);
  COUNT(launches);
  enqueue(stream);
  unsigned long threads = (unsigned long)block.x * block.y * block.z;
  int possible = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535 && threads && threads <= 1024;
  if (!possible || shared > card()->shared_per_block) {
    fprintf(stderr, "null GPU: %s cannot be launched with a grid of %u x %u x %u, blocks of %u x %u x %u and %zu bytes of shared memory\n",
            kernel->name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    return failed(cudaErrorInvalidConfiguration);
  }
  trace("%s", kernel->name);
  if (kernel->plan) compute(kernel->plan, grid, arguments);
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return launch(stub, grid, block, arguments, shared, stream);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return launch(stub, grid, block, arguments, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *stub, void **arguments) {
  return launch(stub, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}

enum { REGISTERS = 32 }; // of a thread, as if for every kernel: the real number is in the binary for the card
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *stub) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024, attributes->numRegs = REGISTERS;
  // PyTorch has no kernels of its own for 8.9, which runs those for 8.6: CUB chooses by it.
  int version = card()->major * 10 + card()->minor;
  attributes->ptxVersion = attributes->binaryVersion = version == 89 ? 86 : version;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *stub, int threads, size_t shared, unsigned flags) {
  int rounded = (threads + 31) / 32 * 32;
  *blocks = card()->threads_per_sm / rounded;
  if (*blocks > card()->blocks_per_sm) *blocks = card()->blocks_per_sm;
  int by_shared = card()->shared_per_sm / (shared + 1024), by_registers = 65536 / (REGISTERS * rounded);
  if (*blocks > by_shared) *blocks = by_shared;
  if (*blocks > by_registers) *blocks = by_registers;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *stub, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}
