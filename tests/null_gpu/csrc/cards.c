// The cards and their properties: what cudaGetDeviceProperties and the attributes report. Capability, SMs, threads and blocks
// an SM and shared memory are those of the CUDA C++ Programming Guide (technical specifications per compute capability) and
// of NVIDIA's data sheets; memory is that of the package's memory_model/gpus.py.
#include "null_gpu.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIB(n) ((size_t)(n) << 10)
#define MIB(n) ((size_t)(n) << 20)

static const Card cards[] = {
  // key, name, capability, SMs, threads and blocks an SM, memory, shared memory an SM and a block, L2
  {"t4", "Tesla T4", 7, 5, 40, 1024, 16, 15636692992u, KIB(64), KIB(64), MIB(4)},
  {"a10g", "NVIDIA A10G", 8, 6, 80, 1536, 16, 23686283264u, KIB(100), KIB(99), MIB(6)},
  {"3090", "NVIDIA GeForce RTX 3090", 8, 6, 82, 1536, 16, 25425870848u, KIB(100), KIB(99), MIB(6)},
  {"4090", "NVIDIA GeForce RTX 4090", 8, 9, 128, 1536, 24, 25372393472u, KIB(100), KIB(99), MIB(72)},
  {"5090", "NVIDIA GeForce RTX 5090", 12, 0, 170, 1536, 24, 33671872512u, KIB(100), KIB(99), MIB(96)},
  {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 2048, 32, 84975550464u, KIB(164), KIB(163), MIB(40)},
  {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 2048, 32, 84932558848u, KIB(228), KIB(227), MIB(50)},
  {"h200", "NVIDIA H200", 9, 0, 132, 2048, 32, 150108897280u, KIB(228), KIB(227), MIB(50)},
  {"b200", "NVIDIA B200", 10, 0, 148, 2048, 32, 191501434880u, KIB(228), KIB(227), MIB(126)},
};

// The one that $NULLGPU names, with $NULLGPU_MEMORY bytes if that is set.
const Card *card(void) {
  static Card copy;
  static const Card *chosen;
  if (chosen) return chosen;
  const char *key = getenv("NULLGPU"), *memory = getenv("NULLGPU_MEMORY");
  if (!key) key = "a100";
  for (size_t i = 0; i < sizeof cards / sizeof *cards; i++) {
    if (strcmp(key, cards[i].key)) continue;
    copy = cards[i];
    if (memory) copy.memory = strtoull(memory, NULL, 10);
    return chosen = &copy;
  }
  fprintf(stderr, "null GPU: NULLGPU=%s names no card; see cards.c\n", key);
  exit(2);
}

// $NULLGPU_COUNT cards, or as many as CUDA_VISIBLE_DEVICES lists of them.
int device_count(void) {
  const char *given = getenv("NULLGPU_COUNT"), *visible = getenv("CUDA_VISIBLE_DEVICES");
  int count = given ? atoi(given) : 1;
  if (count > MOST_DEVICES) count = MOST_DEVICES;
  if (!visible) return count;
  int listed = 0;
  for (const char *at = visible; *at;) {
    char *end;
    long number = strtol(at, &end, 10);
    if (end == at || number < 0 || number >= count) break;
    listed++;
    at = *end ? end + 1 : end;
  }
  return listed;
}

__thread int current_device = 0;

API cudaError_t cudaGetDeviceCount(int *count) {
  *count = device_count();
  return *count ? cudaSuccess : failed(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  if (device < 0 || device >= device_count()) return failed(cudaErrorInvalidDevice);
  const Card *c = card();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", c->name);
  for (int i = 0; i < 16; i++) p->uuid.bytes[i] = i + device;
  p->pciBusID = device + 1;
  p->major = c->major, p->minor = c->minor;
  p->totalGlobalMem = c->memory, p->l2CacheSize = c->l2, p->totalConstMem = KIB(64);
  p->multiProcessorCount = c->sms;
  p->maxThreadsPerMultiProcessor = c->threads_per_sm, p->maxBlocksPerMultiProcessor = c->blocks_per_sm;
  p->sharedMemPerMultiprocessor = c->shared_per_sm, p->sharedMemPerBlockOptin = c->shared_per_block;
  p->sharedMemPerBlock = KIB(48), p->reservedSharedMemPerBlock = c->major < 8 ? 0 : KIB(1);
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32, p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->memPitch = 2147483647, p->textureAlignment = 512, p->asyncEngineCount = 3;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  p->cooperativeLaunch = p->memoryPoolsSupported = p->streamPrioritiesSupported = 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, device)) return failed(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrClockRate: *value = 1700000; break;       // kHz, the same for all cards: nothing here has a speed
    case cudaDevAttrMemoryClockRate: *value = 1500000; break; // kHz
    case cudaDevAttrGlobalMemoryBusWidth: *value = 384; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 1; return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char *name, int bytes, int device) {
  snprintf(name, bytes, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
