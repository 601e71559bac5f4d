// NCCL among one rank: a collective copies what it is given, as work of its stream. With NCCL_DEBUG=INFO each communicator
// that is made is a line, as NCCL has it.
#include "null_gpu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VERSION = 22907 }; // a version that has all that PyTorch may ask for
typedef void *ncclComm_t;
typedef int ncclResult_t;
static const size_t bytes_of[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; // by the numbers of ncclDataType_t

static ncclResult_t make(ncclComm_t *made, const char *function) {
  const char *debug = getenv("NCCL_DEBUG");
  *made = new_handle();
  if (debug && !strcmp(debug, "INFO")) printf("NCCL INFO %s comm %p rank 0 nranks 1 - Init COMPLETE\n", function, *made), fflush(stdout);
  return 0;
}
// The arguments behind the first one are not read.
API ncclResult_t ncclCommInitRank(ncclComm_t *made) { return make(made, __func__); }
API ncclResult_t ncclCommInitRankConfig(ncclComm_t *made) { return make(made, __func__); }
API ncclResult_t ncclCommInitRankScalable(ncclComm_t *made) { return make(made, __func__); }
API ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t *made, void *config) { return make(made, __func__); }

API ncclResult_t ncclGetVersion(int *version) { *version = VERSION; return 0; }
API const char *ncclGetErrorString(ncclResult_t result) { return "a result of the null GPU"; }
API const char *ncclGetLastError(ncclComm_t communicator) { return ""; }
API ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t *result) { *result = 0; return 0; }
API ncclResult_t ncclCommCount(ncclComm_t communicator, int *ranks) { *ranks = 1; return 0; }
API ncclResult_t ncclCommUserRank(ncclComm_t communicator, int *rank) { *rank = 0; return 0; }

static ncclResult_t copy(const void *from, void *to, size_t count, int type, void *stream) {
  if (from == to) enqueue(stream);
  else cudaMemcpyAsync(to, from, count * bytes_of[type], cudaMemcpyDeviceToDevice, stream);
  return 0;
}
API ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, ncclComm_t communicator, void *stream) {
  return copy(from, to, count, type, stream);
}
API ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, ncclComm_t communicator, void *stream) {
  return copy(from, to, count, type, stream);
}
API ncclResult_t ncclReduce(const void *from, void *to, size_t count, int type, int operation, int root, ncclComm_t communicator, void *stream) {
  return copy(from, to, count, type, stream);
}
API ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, int type, int root, ncclComm_t communicator, void *stream) {
  return copy(from, to, count, type, stream);
}
API ncclResult_t ncclAllGather(const void *from, void *to, size_t count, int type, ncclComm_t communicator, void *stream) {
  return copy(from, to, count, type, stream);
}
