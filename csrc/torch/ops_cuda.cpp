// The operators on CUDA tensors; part of the build where the CUDA kernels are.
#include "kernels/cuda/attention_variance.h"
#include "kernels/cuda/dw_layer.h"
#include "torch/attention_maps.h"
#include "torch/cuda_tensors.h"

namespace dwattn::torch_ops {
namespace {

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

// Arguments of the value projection and aggregation, in the layout that the kernels read. Holds
// what the pointers point to.
struct Values {
  Values(const Tensor& x, const Tensor& wv, const OptionalTensor& bv, const Coefficients& given)
      : tokens(dense_rows(x)),
        weight(dense_rows(wv)),
        bias(dense(bv, ScalarType::Float)),
        coefficients(given.prepared(ScalarType::Float)) {}

  // What DwAttentionParams and DwLayerParams have in common.
  template <class Params>
  Params params(const Geometry& g) const {
    Params p{};
    p.dtype = kernel_dtype(tokens.scalar_type());
    p.tf32 = allow_tf32(tokens);
    p.x = tokens.const_data_ptr();
    p.x_stride_batch = tokens.stride(0);
    p.x_stride_token = tokens.stride(1);
    p.wv = weight.const_data_ptr();
    p.bv = floats(bias);
    p.kernel = static_cast<const float*>(coefficients.kernel.const_data_ptr());
    p.kappa = floats(coefficients.kappa);
    p.mu = floats(coefficients.mu);
    p.beta = floats(coefficients.beta);
    p.batch = tokens.size(0);
    p.height = g.height;
    p.width = g.width;
    p.num_prefix = g.num_prefix;
    p.dim = tokens.size(2);
    p.channels = weight.size(0);
    return p;
  }

  const Tensor tokens, weight;
  const OptionalTensor bias;
  const Coefficients coefficients;
};

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
  const Values values(x, wv, bv, given);
  auto p = values.params<cuda::DwAttentionParams>(geometry);
  p.wv_stride = values.weight.stride(0);
  p.y = y.mutable_data_ptr();
  p.y_stride_batch = y.stride(0);
  p.y_stride_token = y.stride(1);
  const Tensor workspace = scratch(x, cuda::dw_attention_workspace(p));
  check_status(cuda::dw_attention(p, workspace.mutable_data_ptr(), current_stream(x)));
  return y;
}

// The patch rows `out (B, H*W, D_out)` of a narrow layer.
void narrow_layer(const Values& values, const Geometry& geometry, const Tensor& wo,
                  const OptionalTensor& bo, const Tensor& out) {
  const Tensor back = dense(wo, out.scalar_type());
  const OptionalTensor back_bias = dense(bo, ScalarType::Float);
  auto p = values.params<cuda::DwLayerParams>(geometry);
  p.out = out.mutable_data_ptr();
  p.out_stride_batch = out.stride(0);
  p.out_stride_token = out.stride(1);
  p.wo = back.const_data_ptr();
  p.bo = floats(back_bias);
  p.prefix = cuda::PrefixRows::kNone;
  p.dim_out = wo.size(0);
  p.narrow = true;
  const Tensor workspace = scratch(out, cuda::dw_layer_workspace(p));
  check_status(cuda::dw_layer(p, workspace.mutable_data_ptr(), current_stream(out)));
}

Tensor dw_layer_cuda(const Tensor& x, const Tensor& wv, const OptionalTensor& bv,
                     const Tensor& kernel, const OptionalTensor& kappa, const OptionalTensor& mu,
                     const OptionalTensor& beta, const Tensor& wo, const OptionalTensor& bo,
                     const OptionalTensor& prefix_out, int64_t height, int64_t width,
                     int64_t num_prefix) {
  const Geometry geometry{height, width, num_prefix};
  const Coefficients given{kernel, kappa, mu, beta};
  check_tokens("x", x, geometry);
  check_projection(x, wv, bv);
  check_coefficients(x, wv.size(0), geometry, given);
  check_output(x, wv, wo, bo, prefix_out, geometry);
  check_dtype("x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0), prefix = prefix_out.has_value() ? num_prefix : 0;
  const int64_t rows = height * width, dim = wo.size(0);
  Tensor out = torch::stable::new_empty(x, {batch, prefix + rows, dim});
  if (out.numel() == 0) return out;
  Tensor patches = torch::stable::narrow(out, 1, prefix, rows);
  if (prefix > 0) {
    Tensor head = torch::stable::narrow(out, 1, 0, prefix);
    torch::stable::copy_(head, *prefix_out);
  }
  if (cuda::is_narrow(wv.size(0), height, width)) {
    // The rows of its weights are contiguous.
    narrow_layer(Values(x, dense(wv, x.scalar_type()), bv, given), geometry, wo, bo, patches);
    return out;
  }
  const Tensor y = dw_attention_cuda(x, wv, bv, kernel, kappa, mu, beta, height, width, num_prefix);
  if (prefix == 0) {
    linear_out(torch::stable::reshape(out, {batch * rows, dim}),
               torch::stable::reshape(y, {batch * rows, wv.size(0)}), wo, bo);
  } else {
    torch::stable::copy_(patches, linear(y, wo, bo));
  }
  return out;
}

Tensor attention_variance_cuda(const Tensor& q, const Tensor& k, const Tensor& mean,
                               const Tensor& m2, const OptionalTensor& prefix_mean, int64_t seen,
                               const OptionalTensor& v, int64_t num_prefix, double scale) {
  check_maps(q, k, v, mean, m2, prefix_mean, seen, num_prefix);
  check_dtype("q", q);
  DWATTN_CHECK(q.size(3) >= 1 && q.size(3) <= 128, "d_h=", q.size(3),
               " is not in 1..128, which the CUDA kernel takes.");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Tensor queries = dense_rows(q), keys = dense_rows(k);
  const OptionalTensor values = v.has_value() ? OptionalTensor(dense_rows(*v)) : std::nullopt;
  const Tensor out = attention_output(q, v.has_value());
  const int64_t tokens = q.size(2);
  const Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), tokens}, ScalarType::Float);
  AttentionVarianceParams p = variance_params(queries, keys, values, out, mean, m2, prefix_mean);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.count = seen;
  p.skip = num_prefix;
  p.scale = static_cast<float>(scale);
  check_status(cuda::attention_variance(p, current_stream(q)));
  return out;
}

}  // namespace
}  // namespace dwattn::torch_ops

STABLE_TORCH_LIBRARY_IMPL(dwattn, CUDA, m) {
  m.impl("dw_aggregate", TORCH_BOX(&dwattn::torch_ops::dw_aggregate_cuda));
  m.impl("dw_attention", TORCH_BOX(&dwattn::torch_ops::dw_attention_cuda));
  m.impl("dw_layer", TORCH_BOX(&dwattn::torch_ops::dw_layer_cuda));
  m.impl("attention_variance_", TORCH_BOX(&dwattn::torch_ops::attention_variance_cuda));
}
