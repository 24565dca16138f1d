#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#define OK return cudaSuccess
#undef cudaEventElapsedTime
static int handle_store[65536]; static int next_handle = 1;
static void* fresh(void) { return &handle_store[(next_handle++) % 65536]; }
void** __cudaRegisterFatBinary(void* b) { return (void**)fresh(); }
void __cudaRegisterFatBinaryEnd(void** h) {}
void __cudaUnregisterFatBinary(void** h) {}
void __cudaRegisterFunction(void** h, const char* f, char* d, const char* n, int t, void* a, void* b, void* c, void* e, int* w) {}
void __cudaRegisterVar(void** h, char* a, char* b, const char* n, int e, size_t s, int c, int g) {}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) { *k = (cudaKernel_t)fresh(); OK; }
static long launches = 0;
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 a, dim3 b, void** args, size_t s, cudaStream_t st) { launches++; OK; }
unsigned __cudaPushCallConfiguration(dim3 a, dim3 b, size_t s, void* st) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* a, dim3* b, size_t* s, void* st) { OK; }
cudaError_t cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int d) {
  switch (a) { case cudaDevAttrComputeCapabilityMajor: *v = 8; break; case cudaDevAttrComputeCapabilityMinor: *v = 6; break;
    case cudaDevAttrMultiProcessorCount: *v = 28; break; case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 101376; break; case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrWarpSize: *v = 32; break; case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 102400; break; default: *v = 0; } OK; }
cudaError_t cudaDeviceSynchronize(void) { OK; }
cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; OK; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; OK; }
cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = fresh(); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) { *e = fresh(); OK; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { OK; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; OK; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { OK; }
cudaError_t cudaFree(void* p) { free(p); OK; }
cudaError_t cudaFreeAsync(void* p, cudaStream_t s) { free(p); OK; }
cudaError_t cudaFreeHost(void* p) { free(p); OK; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) { memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->binaryVersion = 86; a->ptxVersion = 86; OK; }
cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute a, int v) { OK; }
cudaError_t cudaGetDevice(int* d) { *d = 0; OK; }
cudaError_t cudaSetDevice(int d) { OK; }
cudaError_t cudaGetDeviceCount(int* c) { *c = 1; OK; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) { memset(p, 0, sizeof *p); strcpy(p->name, "Stand-in"); p->totalGlobalMem = 12ull << 30;
  p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 101376; p->sharedMemPerMultiprocessor = 102400; p->regsPerBlock = 65536; p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->major = 8; p->minor = 6;
  p->multiProcessorCount = 28; p->maxThreadsPerMultiProcessor = 1536; p->l2CacheSize = 3 << 20; p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->memoryBusWidth = 192; OK; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* s, void** f, unsigned v, unsigned long long fl, enum cudaDriverEntryPointQueryResult* r) { *f = 0; if (r) *r = cudaDriverEntryPointSymbolNotFound; OK; }
const char* cudaGetErrorName(cudaError_t e) { return "error"; }
const char* cudaGetErrorString(cudaError_t e) { return "error"; }
cudaError_t cudaGetLastError(void) { OK; }
cudaError_t cudaPeekAtLastError(void) { OK; }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { OK; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { OK; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long f) { *e = fresh(); OK; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { OK; }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned f) { *p = aligned_alloc(256, (n + 255) / 256 * 256); OK; }
cudaError_t cudaMallocHost(void** p, size_t n) { *p = aligned_alloc(256, (n + 255) / 256 * 256); OK; }
cudaError_t cudaMalloc(void** p, size_t n) { *p = aligned_alloc(256, (n + 255) / 256 * 256); OK; }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t q, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, enum cudaFuncAttribute a, int v, int d) { OK; }
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 a, dim3 b, void** x, size_t n, cudaStream_t s) { OK; }
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* u) { f(u); OK; }
cudaError_t cudaLaunchKernel(const void* f, dim3 a, dim3 b, void** x, size_t n, cudaStream_t s) { OK; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** x) { OK; }
cudaError_t cudaLibraryGetKernel(cudaKernel_t* k, cudaLibrary_t l, const char* n) { *k = (cudaKernel_t)fresh(); OK; }
cudaError_t cudaLibraryLoadData(cudaLibrary_t* l, const void* c, enum cudaJitOption* a, void** b, unsigned n, enum cudaLibraryOption* d, void** e, unsigned m) { *l = (cudaLibrary_t)fresh(); OK; }
cudaError_t cudaLibraryUnload(cudaLibrary_t l) { OK; }
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { *f = 10ull << 30; *t = 12ull << 30; OK; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* p, const struct cudaMemPoolProps* q) { *p = (cudaMemPool_t)fresh(); OK; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t p) { OK; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void* v) { *(unsigned long long*)v = 0; OK; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void* v) { OK; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { OK; }
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind k) { memcpy(d, s, n); OK; }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) { memmove(d, s, n); OK; }
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k, cudaStream_t st) { for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, w); OK; }
cudaError_t cudaMemcpyFromSymbol(void* d, const void* s, size_t n, size_t o, enum cudaMemcpyKind k) { memset(d, 0, n); OK; }
cudaError_t cudaMemset(void* p, int v, size_t n) { memset(p, v, n); OK; }
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) { memset(p, v, n); OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s, unsigned fl) { *n = 1; OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) { memset(a, 0, sizeof *a); a->type = cudaMemoryTypeDevice; a->devicePointer = (void*)p; OK; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { OK; }
cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = fresh(); OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { *s = fresh(); OK; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { OK; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) { *g = (cudaGraph_t)fresh(); OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* c) { *c = cudaStreamCaptureStatusNone; OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { OK; }
