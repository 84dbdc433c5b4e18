// A launch over a pretended CUDA runtime, whose cudaMallocAsync answers each of three ways.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "python/cuda_launch.h"
static int freed = 0, syncfreed = 0;
static cudaError_t mode;
extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "out of memory" : "err";
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void*) {
  a->type = cudaMemoryTypeDevice;
  a->device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind,
                              cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) {
  if (mode == cudaSuccess) *p = malloc(n);
  return mode;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
  free(p);
  freed++;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t n) {
  *p = malloc(n);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  free(p);
  syncfreed++;
  return cudaSuccess;
}
}
namespace dwattn::python {
int64_t CudaArray::numel() const {
  int64_t c = 1;
  for (auto s : shape) c *= s;
  return c;
}
}  // namespace dwattn::python
int main() {
  using namespace dwattn;
  using namespace dwattn::python;
  float x = 0;
  CudaArray a;
  a.name = "a";
  a.data = &x;
  a.shape = {1};
  for (cudaError_t m : {cudaSuccess, cudaErrorNotSupported, cudaErrorMemoryAllocation}) {
    mode = m;
    freed = syncfreed = 0;
    Launch w;
    w.arrays = {a};
    w.workspace_bytes = 64;
    bool got = false;
    w.kernel = [&](void* p, CUstream_st*) {
      got = p != nullptr;
      return Status::kOk;
    };
    try {
      launch(w);
      printf("%d got=%d freed=%d sync=%d\n", m, got, freed, syncfreed);
    } catch (std::exception& e) {
      printf("%d %s\n", m, e.what());
    }
  }
}
