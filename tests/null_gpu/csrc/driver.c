// The driver's entry points, as Triton's launcher and torch call them.
#include "null_gpu.h"
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>

API CUresult cuInit(unsigned flags) { return device_count() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
API CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult error, const char **text) { *text = error ? "error of the null GPU" : "no error"; return CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult error, const char **text) { *text = error ? "CUDA_ERROR_OF_THE_NULL_GPU" : "CUDA_SUCCESS"; return CUDA_SUCCESS; }

API CUresult cuDeviceGetCount(int *count) { *count = device_count(); return CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) { snprintf(name, bytes, "%s", card()->name); return CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); // the numbers are the same
}
API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) { *bytes = card()->memory; return CUDA_SUCCESS; }

// A context is the number of its device, and 0x500.
static CUcontext context_of(int device) { return (CUcontext)(uintptr_t)(0x500 + device); }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = context_of(device); return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext *context) { *context = context_of(current_device); return CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) current_device = (int)((uintptr_t)context - 0x500);
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice *device) { *device = current_device; return CUDA_SUCCESS; }

API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

API CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
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

API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return (CUresult)cudaStreamIsCapturing(stream, (enum cudaStreamCaptureStatus *)status); // the numbers are the same
}
static CUresult launch(unsigned x, unsigned y, unsigned z, unsigned shared, void *stream) {
  COUNT(driver_launches);
  enqueue(stream);
  if (x && y && z && y <= 65535 && z <= 65535 && shared <= card()->shared_per_block) return CUDA_SUCCESS;
  fprintf(stderr, "null GPU: no kernel of Triton can be launched with a grid of %u x %u x %u and %u bytes of shared memory\n", x, y, z, shared);
  return CUDA_ERROR_INVALID_VALUE;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  return launch(c->gridDimX, c->gridDimY, c->gridDimZ, c->sharedMemBytes, c->hStream);
}
API CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z,
                            unsigned shared, CUstream stream, void **arguments, void **extra) {
  return launch(x, y, z, shared, stream);
}
API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *c) { *clusters = 1; return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
  return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  Range range = find_range((void *)pointer);
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = context_of(range.device); break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = pointer; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)value = range.kind == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = range.device; break;
    default: *(int *)value = 0; return CUDA_SUCCESS;
  }
  return range.kind ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// By name: this library stands in for the driver's too.
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
