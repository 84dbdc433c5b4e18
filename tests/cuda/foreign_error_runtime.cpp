// What foreign_error.cu takes of CUDA's runtime, where a launch succeeds on no GPU.
#include <cstddef>

namespace {
struct Size {
  unsigned x, y, z;
};
int last_error = 704;  // cudaErrorPeerAccessAlreadyEnabled, left by other code
}  // namespace

extern "C" {
int cudaLaunchKernel(const void*, Size, Size, void**, size_t, void*) { return 0; }
int cudaPeekAtLastError() { return last_error; }
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int) { return "an error of other code"; }
int cudaGetDevice(int*) { return 0; }
int cudaDeviceGetAttribute(int*, int, int) { return 0; }
int cudaFuncSetAttribute(const void*, int, int) { return 0; }

// How nvcc's host code registers its kernels, by CUDA version.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*,
                            void*, int*) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(Size, Size, size_t, void*) { return 0; }
int __cudaPopCallConfiguration(Size*, Size*, size_t*, void*) { return 0; }
int __cudaLaunchKernel(const void*, Size, Size, void**, size_t, void*) { return 0; }
int __cudaGetKernel(void**, const void*) { return 0; }
}
