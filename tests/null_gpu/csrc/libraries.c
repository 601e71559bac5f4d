// cuBLAS and cuDNN: handles, descriptors, and products that are counted. cuDNN asks for no workspace: what it asks for is not
// documented, and only the library knows. The memory of cuBLAS's own workspaces is torch's, and so is real.
#include "null_gpu.h"
#include <string.h>

#define NEW(name) API int name(void **object) { *object = new_handle(); return 0; }
#define NUMBER(name, value) API int name(void *handle, int *number) { *number = value; return 0; }

NEW(cublasCreate_v2)
NEW(cublasLtCreate)
NEW(cublasLtMatmulPreferenceCreate)
NUMBER(cublasGetMathMode, 0)
NUMBER(cublasGetPointerMode_v2, 0)
NUMBER(cublasGetVersion_v2, 130000)
API size_t cublasLtGetVersion(void) { return 130003; }
API const char *cublasGetStatusString(int status) { return "status of the null GPU's cuBLAS"; }
API int cublasLtMatmulDescCreate(void **object, int compute, int scale) { *object = new_handle(); return 0; }
API int cublasLtMatrixLayoutCreate(void **object, int type, uint64_t rows, uint64_t columns, int64_t stride) { *object = new_handle(); return 0; }

typedef struct {
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
} Heuristic;
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int asked,
                                       Heuristic *found, int *count) {
  memset(found, 0, asked * sizeof *found);
  *count = asked;
  return 0;
}

// Which stream a handle works on, where cuBLAS is told it before.
static __thread void *stream_of_handle;
API int cublasSetStream_v2(void *handle, void *stream) { stream_of_handle = stream; return 0; }
static int product(void *stream) {
  COUNT(gemms);
  enqueue(stream);
  return 0;
}
#define GEMM(name) API int name() { return product(stream_of_handle); }
GEMM(cublasGemmEx)
GEMM(cublasGemmStridedBatchedEx)
GEMM(cublasSgemm_v2)
GEMM(cublasSgemmEx)
GEMM(cublasSgemmStridedBatched)
GEMM(cublasDgemm_v2)
GEMM(cublasDgemmStridedBatched)
API int cublasLtMatmul(void *handle, void *product_, const void *alpha, const void *a, void *a_, const void *b, void *b_, const void *beta,
                       const void *c, void *c_, void *d, void *d_, const void *algorithm, void *workspace, size_t bytes, void *stream) {
  return product(stream);
}

NEW(cudnnCreate)
NEW(cudnnCreateActivationDescriptor)
NEW(cudnnCreateConvolutionDescriptor)
NEW(cudnnCreateDropoutDescriptor)
NEW(cudnnCreateFilterDescriptor)
NEW(cudnnCreatePoolingDescriptor)
NEW(cudnnCreateTensorDescriptor)
NEW(cudnnCreateRNNDescriptor)
API size_t cudnnGetVersion(void) { return 92000; }
API size_t cudnnGetCudartVersion(void) { return 13000; }
API const char *cudnnGetErrorString(int status) { return "status of the null GPU's cuDNN"; }
API int cudnnGetProperty(int part, int *value) {
  *value = part == 0 ? 9 : part == 1 ? 20 : 0;
  return 0;
}

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
#define WORKSPACE(name) \
  API int name(void *handle, void *x, void *w, void *convolution, void *y, int algorithm, size_t *bytes) { \
    *bytes = 0; \
    return 0; \
  }
WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)
// As above, where `torch.backends.cudnn.benchmark` is on.
#define TRIED(name) \
  API int name(void *handle, void *x, void *of_x, void *w, void *of_w, void *convolution, void *y, void *of_y, int asked, \
               int *count, Performance *found, void *workspace, size_t bytes) { \
    *found = (Performance){.algorithm = 1, .time = 1, .deterministic = 1, .math = 1}; \
    *count = 1; \
    return 0; \
  }
TRIED(cudnnFindConvolutionForwardAlgorithmEx)
TRIED(cudnnFindConvolutionBackwardDataAlgorithmEx)
TRIED(cudnnFindConvolutionBackwardFilterAlgorithmEx)
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *handle, int mode, int operations, void *x, void *z, void *y,
                                                                 void *scale, void *activation, size_t *bytes) {
  *bytes = 0;
  return 0;
}
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *handle, int mode, int operations, void *x, void *y, void *dy,
                                                          void *dz, void *dx, void *scale, void *activation, size_t *bytes) {
  *bytes = 0;
  return 0;
}
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *handle, int mode, int operations, void *activation, void *x,
                                                             size_t *bytes) {
  *bytes = 0;
  return 0;
}
