// Errors of the runtime: each thread keeps the last one.
#include "null_gpu.h"

static __thread cudaError_t last = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last = error; }

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError(void) { return last; }

API const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotReady: return "device not ready";
    default: return "error of the null GPU";
  }
}
API const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfTheNullGPU" : "cudaSuccess"; }
