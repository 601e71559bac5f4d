// cuBLAS and cuDNN: handles, descriptors, and products that compute nothing. cuDNN asks for no workspace: what it asks for is
// not documented, and only the library knows. The memory of cuBLAS's own workspaces is torch's, and so is real.
#include "null_gpu.h"
#include <string.h>

#define NEW(name) API int name(void **object) { *object = new_handle(); return 0; }
#define NUMBER(name, value) API int name(void *handle, int *number) { *number = value; return 0; }
NEW(cublasCreate_v2)
NEW(cublasLtMatmulPreferenceCreate)
NUMBER(cublasGetMathMode, 0)
NUMBER(cublasGetPointerMode_v2, 0)
API int cublasLtMatmulDescCreate(void **object, int compute, int scale) { *object = new_handle(); return 0; }
API int cublasLtMatrixLayoutCreate(void **object, int type, uint64_t rows, uint64_t columns, int64_t stride) { *object = new_handle(); return 0; }
enum { HEURISTIC = 8 * 8 + 8 + 4 + 4 + 4 * 4 }; // bytes of cublasLtMatmulHeuristicResult_t
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int asked,
                                       void *found, int *count) {
  memset(found, 0, (size_t)asked * HEURISTIC);
  *count = asked;
  return 0;
}
static __thread void *stream_of_handle; // on which a handle works
API int cublasSetStream_v2(void *handle, void *stream) { stream_of_handle = stream; return 0; }
#define GEMM(name) API int name() { enqueue(stream_of_handle); return 0; }
GEMM(cublasGemmEx)
GEMM(cublasGemmStridedBatchedEx)
GEMM(cublasSgemm_v2)
GEMM(cublasSgemmEx)
GEMM(cublasSgemmStridedBatched)
GEMM(cublasDgemm_v2)
GEMM(cublasDgemmStridedBatched)
API int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *a, void *a_, const void *b, void *b_, const void *beta,
                       const void *c, void *c_, void *d, void *d_, const void *algorithm, void *workspace, size_t bytes, void *stream) {
  enqueue(stream);
  return 0;
}

// What Triton asks of the driver beside, by the names of cuda.h, which is not included here.
#define NOTHING(name) API int name() { return 0; }
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString)
NEW(cudnnCreate)
NEW(cudnnCreateConvolutionDescriptor)
NEW(cudnnCreateFilterDescriptor)
NEW(cudnnCreateTensorDescriptor)
API size_t cudnnGetVersion(void) { return 92000; }
typedef struct {
  int algorithm, status;
  float time;
  size_t workspace;
  int deterministic, math, reserved[3];
} Performance;
// The older interface, which torch takes under TORCH_CUDNN_V8_API_DISABLED=1.
#define ALGORITHM(name) \
  API int name(void *handle, void *x, void *w, void *convolution, void *y, int asked, int *count, Performance *found) { \
    *found = (Performance){.algorithm = 1, .time = 1, .deterministic = 1, .math = 1}; \
    *count = 1; \
    return 0; \
  }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7)
