// A launch while an error of other code is pending: it succeeds and leaves that error where it is.
// Linked with foreign_error_runtime.cpp in place of CUDA's runtime.
#include <cstdio>

#include "kernels/cuda/device.cuh"

__global__ void nothing(int) {}

int main() {
  const dwattn::Status status = dwattn::cuda::launch(nothing, dim3(1), dim3(32), 0, nullptr, 1);
  std::printf("status %d, pending %d\n", static_cast<int>(status),
              static_cast<int>(cudaPeekAtLastError()));
}
