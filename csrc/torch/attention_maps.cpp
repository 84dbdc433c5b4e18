#include "torch/attention_maps.h"

namespace dwattn::torch_ops {
namespace {

void check_heads(const char* name, const Tensor& t, const Tensor& like) {
  DWATTN_CHECK(t.dim() == 4 && like.dim() == 4 && t.size(0) == like.size(0) &&
                   t.size(1) == like.size(1) && t.size(2) == like.size(2) &&
                   t.size(3) == like.size(3) && t.scalar_type() == like.scalar_type() &&
                   t.get_device_index() == like.get_device_index(),
               name, " of shape ", shape_text(t), " and ", dtype_name(t.scalar_type()),
               " must have the shape (B, n_h, N, d_h) = ", shape_text(like), ", dtype ",
               dtype_name(like.scalar_type()), " and device of q.");
}

// A part of the state: (n_h, queries, keys).
void check_state(const char* name, const Tensor& t, const Tensor& q, ScalarType type,
                 int64_t num_prefix, int64_t keys) {
  DWATTN_CHECK((type == ScalarType::Float || type == ScalarType::Double) && t.scalar_type() == type,
               "The state must be float32 or float64, mean and ", name, " alike; ", name, " is ",
               dtype_name(t.scalar_type()), ".");
  DWATTN_CHECK(
      t.dim() == 3 && t.size(0) == q.size(1) && t.size(1) == q.size(2) - num_prefix &&
          t.size(2) == keys && t.is_contiguous() && t.get_device_index() == q.get_device_index(),
      name, " must be contiguous and have shape (", q.size(1), ", ", q.size(2) - num_prefix, ", ",
      keys, ") on the device of q, got ", shape_text(t), ".");
}

}  // namespace

void check_maps(const Tensor& q, const Tensor& k, const OptionalTensor& v, const Tensor& mean,
                const Tensor& m2, const OptionalTensor& prefix_mean, int64_t seen,
                int64_t num_prefix) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  if (v.has_value()) check_heads("v", *v, q);
  const int64_t tokens = q.size(2);
  DWATTN_CHECK(num_prefix >= 0 && num_prefix < tokens && seen >= 0, "num_prefix=", num_prefix,
               " of N=", tokens, " tokens and seen=", seen, " images are not possible.");
  const ScalarType state = mean.scalar_type();
  check_state("mean", mean, q, state, num_prefix, tokens - num_prefix);
  check_state("m2", m2, q, state, num_prefix, tokens - num_prefix);
  if (prefix_mean.has_value()) {
    check_state("prefix_mean", *prefix_mean, q, state, num_prefix, num_prefix);
  }
}

Tensor attention_output(const Tensor& q, bool with_values) {
  if (!with_values) return torch::stable::new_empty(q, {0});
  Tensor rows = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)});
  return torch::stable::transpose(rows, 1, 2);
}

AttentionVarianceParams variance_params(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                        const Tensor& out, const Tensor& mean, const Tensor& m2,
                                        const OptionalTensor& prefix_mean) {
  AttentionVarianceParams p{};
  p.dtype = kernel_dtype(q.scalar_type());
  p.q = q.const_data_ptr();
  p.q_stride_batch = q.stride(0);
  p.q_stride_head = q.stride(1);
  p.q_stride_token = q.stride(2);
  p.k = k.const_data_ptr();
  p.k_stride_batch = k.stride(0);
  p.k_stride_head = k.stride(1);
  p.k_stride_token = k.stride(2);
  if (v.has_value()) {
    p.v = v->const_data_ptr();
    p.v_stride_batch = v->stride(0);
    p.v_stride_head = v->stride(1);
    p.v_stride_token = v->stride(2);
    p.out = out.mutable_data_ptr();
    p.out_stride_batch = out.stride(0);
    p.out_stride_head = out.stride(1);
    p.out_stride_token = out.stride(2);
  }
  p.state_dtype = kernel_dtype(mean.scalar_type());
  p.mean = mean.mutable_data_ptr();
  p.m2 = m2.mutable_data_ptr();
  p.prefix_mean = prefix_mean.has_value() ? prefix_mean->mutable_data_ptr() : nullptr;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.tokens = q.size(2);
  p.head_dim = q.size(3);
  return p;
}

}  // namespace dwattn::torch_ops
