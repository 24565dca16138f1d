/* The part of the CUDA runtime that has to answer something. Memory is the host's; everything else, launches of kernels above
   all, succeeds without doing anything (see make.py, which writes those). The device is one of compute capability 8.6. */

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

enum { MAJOR = 8, MINOR = 6, PROCESSORS = 28, WARP = 32, THREADS = 1024, SHARED = 49152, SHARED_MOST = 101376 };
static const size_t MEMORY = 12ull << 30;

/* memory */

cudaError_t cudaMalloc(void **place, size_t size) {
  *place = aligned_alloc(256, (size + 255) / 256 * 256);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void **place, size_t size) { return cudaMalloc(place, size); }
cudaError_t cudaHostAlloc(void **place, size_t size, unsigned flags) { return cudaMalloc(place, size); }
cudaError_t cudaMallocFromPoolAsync(void **place, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
  return cudaMalloc(place, size);
}
cudaError_t cudaFree(void *place) {
  free(place);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *place) { return cudaFree(place); }
cudaError_t cudaFreeAsync(void *place, cudaStream_t stream) { return cudaFree(place); }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, enum cudaMemcpyKind kind) {
  memset(to, 0, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *place, int value, size_t size) {
  memset(place, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *place, int value, size_t size, cudaStream_t stream) { return cudaMemset(place, value, size); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *unused = *total = MEMORY;
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  *(unsigned long long *)value = 0;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *place) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = (void *)place;
  return cudaSuccess;
}

/* the device */

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return cudaRuntimeGetVersion(version); }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *device, int index) {
  memset(device, 0, sizeof *device);
  strcpy(device->name, "stand-in");
  device->major = MAJOR;
  device->minor = MINOR;
  device->totalGlobalMem = MEMORY;
  device->multiProcessorCount = PROCESSORS;
  device->warpSize = WARP;
  device->maxThreadsPerBlock = device->maxThreadsDim[0] = device->maxThreadsDim[1] = THREADS;
  device->maxThreadsDim[2] = 64;
  device->maxThreadsPerMultiProcessor = 1536;
  device->maxGridSize[0] = 2147483647;
  device->maxGridSize[1] = device->maxGridSize[2] = 65535;
  device->regsPerBlock = 65536;
  device->sharedMemPerBlock = SHARED;
  device->sharedMemPerBlockOptin = SHARED_MOST;
  device->sharedMemPerMultiprocessor = 102400;
  device->l2CacheSize = 3 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrWarpSize: *value = WARP; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = THREADS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_MOST; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

/* kernels and streams */

void **__cudaRegisterFatBinary(void *binary) { return (void **)64; }
const char *cudaGetErrorName(cudaError_t error) { return "error"; }
const char *cudaGetErrorString(cudaError_t error) { return "error"; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = THREADS;
  attributes->binaryVersion = attributes->ptxVersion = 10 * MAJOR + MINOR;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int size, size_t shared,
                                                                   unsigned flags) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *function = 0;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = (cudaGraph_t)64;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *replayed, cudaGraph_t graph, unsigned long long flags) {
  *replayed = (cudaGraphExec_t)64;
  return cudaSuccess;
}
