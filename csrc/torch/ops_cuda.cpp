// The operators on CUDA tensors; part of the build where the CUDA kernels are.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels/cuda/dw_attention.h"
#include "torch/checks.h"

// Only in CUDA builds of PyTorch. A weak reference lets the same _C.so load in a CPU build.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dwattn::torch_ops {
namespace {

cuda::Stream current_stream(const Tensor& t) {
  DWATTN_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
               "This PyTorch was built without CUDA, so it cannot run the CUDA kernels.");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cuda::Stream>(stream);
}

void check_dtype(const char* name, const Tensor& t) {
  DWATTN_CHECK(t.scalar_type() != ScalarType::Double, name,
               " is float64, which the CUDA kernels do not compute in; convert it with .float() or "
               "choose another backend with DWATTN_BACKEND=torch.");
}

void check_status(Status status) {
  DWATTN_CHECK(status == Status::kOk, "The CUDA kernel failed: ", status_text(status), ".");
}

// Unit stride along the last dimension.
Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

const float* floats(const OptionalTensor& t) { return static_cast<const float*>(data_or_null(t)); }

// Scratch memory from PyTorch's allocator, which keeps it alive in the order of the stream.
Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

Tensor dw_aggregate_cuda(const Tensor& v, const Tensor& kernel, const OptionalTensor& kappa,
                         const OptionalTensor& mu, const OptionalTensor& beta, int64_t height,
                         int64_t width, int64_t num_prefix) {
  const Geometry geometry{height, width, num_prefix};
  const Coefficients given{kernel, kappa, mu, beta};
  check_tokens("v", v, geometry);
  check_coefficients(v, v.size(2), geometry, given);
  check_dtype("v", v);
  const torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  const Tensor y = torch::stable::new_empty(v, {v.size(0), height * width, v.size(2)});
  if (y.numel() == 0) return y;
  const Tensor rows = dense_rows(v);
  const Coefficients k = given.prepared(ScalarType::Float);
  DwAggregateParams p{};
  p.v = rows.const_data_ptr();
  p.v_dtype = p.y_dtype = kernel_dtype(v.scalar_type());
  p.v_stride_batch = rows.stride(0);
  p.v_stride_token = rows.stride(1);
  p.y = y.mutable_data_ptr();
  p.y_stride_batch = y.stride(0);
  p.y_stride_token = y.stride(1);
  p.kernel = k.kernel.const_data_ptr();
  p.kappa = data_or_null(k.kappa);
  p.mu = data_or_null(k.mu);
  p.beta = data_or_null(k.beta);
  p.batch = v.size(0);
  p.height = height;
  p.width = width;
  p.num_prefix = num_prefix;
  p.channels = v.size(2);
  const Tensor workspace = scratch(v, cuda::dw_aggregate_workspace(p));
  check_status(cuda::dw_aggregate(p, workspace.mutable_data_ptr(), current_stream(v)));
  return y;
}

Tensor dw_attention_cuda(const Tensor& x, const Tensor& wv, const OptionalTensor& bv,
                         const Tensor& kernel, const OptionalTensor& kappa,
                         const OptionalTensor& mu, const OptionalTensor& beta, int64_t height,
                         int64_t width, int64_t num_prefix) {
  const Geometry geometry{height, width, num_prefix};
  const Coefficients given{kernel, kappa, mu, beta};
  check_tokens("x", x, geometry);
  check_projection(x, wv, bv);
  check_coefficients(x, wv.size(0), geometry, given);
  check_dtype("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::new_empty(x, {x.size(0), height * width, wv.size(0)});
  if (y.numel() == 0) return y;
  const Tensor tokens = dense_rows(x), weight = dense_rows(wv);
  const OptionalTensor bias = dense(bv, ScalarType::Float);
  const Coefficients k = given.prepared(ScalarType::Float);
  cuda::DwAttentionParams p{};
  p.dtype = kernel_dtype(x.scalar_type());
  p.x = tokens.const_data_ptr();
  p.x_stride_batch = tokens.stride(0);
  p.x_stride_token = tokens.stride(1);
  p.wv = weight.const_data_ptr();
  p.wv_stride = weight.stride(0);
  p.y = y.mutable_data_ptr();
  p.y_stride_batch = y.stride(0);
  p.y_stride_token = y.stride(1);
  p.bv = floats(bias);
  p.kernel = static_cast<const float*>(k.kernel.const_data_ptr());
  p.kappa = floats(k.kappa);
  p.mu = floats(k.mu);
  p.beta = floats(k.beta);
  p.batch = x.size(0);
  p.height = height;
  p.width = width;
  p.num_prefix = num_prefix;
  p.dim = x.size(2);
  p.channels = wv.size(0);
  const Tensor workspace = scratch(x, cuda::dw_attention_workspace(p));
  check_status(cuda::dw_attention(p, workspace.mutable_data_ptr(), current_stream(x)));
  return y;
}

}  // namespace
}  // namespace dwattn::torch_ops

STABLE_TORCH_LIBRARY_IMPL(dwattn, CUDA, m) {
  m.impl("dw_aggregate", TORCH_BOX(&dwattn::torch_ops::dw_aggregate_cuda));
  m.impl("dw_attention", TORCH_BOX(&dwattn::torch_ops::dw_attention_cuda));
}
