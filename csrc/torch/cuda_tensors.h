// Small helpers over the LibTorch stable ABI for the operators on CUDA tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels/cuda/dw_attention.h"
#include "kernels/failure.h"
#include "torch/checks.h"

// Only in CUDA builds of PyTorch. A weak reference lets the same _C.so load in a CPU build.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dwattn::torch_ops {

inline cuda::Stream current_stream(const Tensor& t) {
  DWATTN_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
               "This PyTorch was built without CUDA, so it cannot run the CUDA kernels.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cuda::Stream>(stream);
}

inline void check_dtype(const char* name, const Tensor& t) {
  DWATTN_CHECK(t.scalar_type() != ScalarType::Double, name,
               " is float64, which the CUDA kernels do not compute in; convert it with .float() or "
               "choose another backend with DWATTN_BACKEND=torch.");
}

// Whether products of such tensors are taken in TF32: PyTorch's setting as it is now.
inline bool allow_tf32(const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float) return false;
  StableIValue answer{};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("dwattn::_allow_tf32", "", &answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer);
}

inline void check_status(Status status) {
  DWATTN_CHECK(status == Status::kOk, "The CUDA kernel failed: ", failure_text(status), ".");
}

// Unit stride along the last dimension.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline const float* floats(const OptionalTensor& t) {
  return static_cast<const float*>(data_or_null(t));
}

// Scratch memory from PyTorch's allocator, which keeps it alive in the order of the stream.
inline Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace dwattn::torch_ops
