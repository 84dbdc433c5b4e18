// Memory that kernels use: of the GPU, or of the host where the kernels are emulated.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#ifndef DWATTN_SIMT_HOST
#include <cuda_runtime_api.h>
#endif

namespace harness {

#ifdef DWATTN_SIMT_HOST

inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, 256, bytes) == 0 ? memory : nullptr;
}
inline void release(void* memory) { std::free(memory); }
inline void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void finish() {}

#else

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(2);
}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
inline void finish() { check(cudaDeviceSynchronize()); }

#endif

// Exactly as large as asked for, so that a sanitizer sees the first byte behind it.
class Memory {
 public:
  explicit Memory(const std::vector<char>& contents)
      : memory_(contents.empty() ? nullptr : allocate(contents.size()), release) {
    if (!contents.empty()) copy(memory_.get(), contents.data(), contents.size());
  }
  void* data() const { return memory_.get(); }

 private:
  std::unique_ptr<void, void (*)(void*)> memory_;
};

// All bits set: NaN in every floating dtype.
inline std::vector<char> poison(size_t bytes) { return std::vector<char>(bytes, '\xFF'); }

}  // namespace harness
