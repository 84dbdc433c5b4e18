// Gradients of the aggregation on CUDA tensors; part of the build where the CUDA kernels are.
#include <tuple>

#include "kernels/cuda/dw_backward.h"
#include "torch/cuda_tensors.h"

namespace dwattn::torch_ops {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

float* writable(const Tensor& t) {
  return t.numel() > 0 ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
}

void check_gradient(const Tensor& grad, const OptionalTensor& v, const Geometry& geometry) {
  check_tokens("grad", grad, {geometry.height, geometry.width, 0});
  check_dtype("grad", grad);
  if (!v.has_value()) return;
  check_tokens("v", *v, geometry);
  DWATTN_CHECK(v->size(0) == grad.size(0) && v->size(2) == grad.size(2) &&
                   v->scalar_type() == grad.scalar_type() &&
                   v->get_device_index() == grad.get_device_index(),
               "v of shape ", shape_text(*v), " and ", dtype_name(v->scalar_type()),
               " must have the images, channels, dtype and device of grad: ", shape_text(grad),
               ", ", dtype_name(grad.scalar_type()), ".");
}

// dV, dkernel, dkappa, dmu, dbeta; empty where not asked for. Those of the coefficients are
// fp32. See ../kernels/cuda/dw_backward.h.
Gradients dw_aggregate_backward_cuda(const Tensor& grad, const OptionalTensor& v,
                                     const Tensor& kernel, const OptionalTensor& kappa,
                                     const OptionalTensor& mu, int64_t height, int64_t width,
                                     int64_t num_prefix, bool values) {
  const Geometry geometry{height, width, num_prefix};
  check_gradient(grad, v, geometry);
  const int64_t batch = grad.size(0), channels = grad.size(2);
  const Coefficients given{kernel, kappa, mu, std::nullopt};
  check_coefficients(grad, channels, geometry, given);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor rows = dense_rows(grad);
  const OptionalTensor tokens = v.has_value() ? OptionalTensor(dense_rows(*v)) : std::nullopt;
  const Coefficients k = given.prepared(ScalarType::Float);

  const Tensor dv =
      values ? torch::stable::new_empty(grad, {batch, num_prefix + height * width, channels})
             : torch::stable::new_empty(grad, {0});
  const auto floats_of = [&grad](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(grad, shape, ScalarType::Float);
  };
  const auto none_of = [&floats_of] { return floats_of({0}); };
  const Tensor dkernel = v.has_value() ? floats_of({channels, 3, 3}) : none_of();
  const Tensor dkappa =
      v.has_value() && kappa.has_value() ? floats_of({num_prefix, channels}) : none_of();
  const Tensor dmu = v.has_value() && mu.has_value() ? floats_of({channels}) : none_of();
  const Tensor dbeta = floats_of({channels});

  cuda::DwBackwardParams p{};
  p.dtype = kernel_dtype(grad.scalar_type());
  p.grad = rows.const_data_ptr();
  p.grad_stride_batch = rows.stride(0);
  p.grad_stride_token = rows.stride(1);
  if (tokens.has_value()) {
    p.v = tokens->const_data_ptr();
    p.v_stride_batch = tokens->stride(0);
    p.v_stride_token = tokens->stride(1);
  }
  if (dv.numel() > 0) {
    p.dv = dv.mutable_data_ptr();
    p.dv_stride_batch = dv.stride(0);
    p.dv_stride_token = dv.stride(1);
  }
  p.kernel = static_cast<const float*>(k.kernel.const_data_ptr());
  p.kappa = floats(k.kappa);
  p.mu = floats(k.mu);
  p.dkernel = writable(dkernel);
  p.dkappa = writable(dkappa);
  p.dmu = writable(dmu);
  p.dbeta = writable(dbeta);
  p.batch = batch;
  p.height = height;
  p.width = width;
  p.num_prefix = num_prefix;
  p.channels = channels;
  const Tensor workspace = scratch(grad, cuda::dw_backward_workspace(p));
  check_status(cuda::dw_backward(p, workspace.mutable_data_ptr(), current_stream(grad)));
  return {dv, dkernel, dkappa, dmu, dbeta};
}

}  // namespace
}  // namespace dwattn::torch_ops

STABLE_TORCH_LIBRARY_IMPL(dwattn, CUDA, m) {
  m.impl("dw_aggregate_backward", TORCH_BOX(&dwattn::torch_ops::dw_aggregate_backward_cuda));
}
