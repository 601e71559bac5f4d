// Kernels, of torch and by the driver's entry points those of Triton: launches are checked for the GPU's limits, and compute
// nothing. What the driver answers beside.
#include "null_gpu.h"
#include <cuda.h>
#include <stdio.h>
#include <string.h>

static int possible(unsigned x, unsigned y, unsigned z, unsigned long threads, size_t shared, void *stream) {
  enqueue(stream);
  if (x && y && z && y <= 65535 && z <= 65535 && threads && threads <= 1024 && shared <= card()->shared_per_block) return 1;
  fprintf(stderr, "null GPU: no kernel can be launched with a grid of %u x %u x %u, %lu threads and %zu bytes of shared memory\n",
          x, y, z, threads, shared);
  return 0;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t stream) {
  int fits = possible(g.x, g.y, g.z, (unsigned long)b.x * b.y * b.z, shared, stream);
  return fits ? cudaSuccess : failed(cudaErrorInvalidConfiguration);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  int fits = possible(c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes, c->hStream);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static void *binary_handle[4];
API void **__cudaRegisterFatBinary(void *binary) { return binary_handle; }
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) { *kernel = (cudaKernel_t)stub; return cudaSuccess; }
static __thread struct { // between `<<<` and `>>>`, and the stub
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block, configuration.shared = shared, configuration.stream = stream;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared, *(void **)stream = configuration.stream;
  return cudaSuccess;
}

enum { REGISTERS = 32 }; // of a thread, as if for every kernel: the real number is in the binary for the GPU
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
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  int rounded = (threads + 31) / 32 * 32;
  int bounds[] = {p.maxBlocksPerMultiProcessor, p.sharedMemPerMultiprocessor / (shared + 1024), 65536 / (REGISTERS * rounded)};
  *blocks = p.maxThreadsPerMultiProcessor / rounded;
  for (int i = 0; i < 3; i++)
    if (*blocks > bounds[i]) *blocks = bounds[i];
  return cudaSuccess;
}

// The driver.
API CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); // the numbers are the same
}
static CUcontext const context = (CUcontext)0x500;
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext *out) { *out = context; return CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = new_handle(); return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = new_handle(); return CUDA_SUCCESS; }
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  int too_much = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && (size_t)value > card()->shared_per_block;
  return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) { // the pointer on the device
  *(CUdeviceptr *)value = pointer;
  return find_range((void *)pointer).kind ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
