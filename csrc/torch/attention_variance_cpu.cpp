// attention_variance_ on CPU tensors.
#include "kernels/cpu/attention_variance.h"
#include "kernels/cpu/scratch.h"
#include "torch/attention_maps.h"
#include "torch/cpu_parallel.h"

namespace dwattn::torch_ops {
namespace {

// Unit stride along the last dimension.
Tensor dense_rows(const Tensor& t) {
  return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

Tensor attention_variance_cpu(const Tensor& q, const Tensor& k, const Tensor& mean,
                              const Tensor& m2, const OptionalTensor& prefix_mean, int64_t seen,
                              const OptionalTensor& v, int64_t num_prefix, double scale) {
  check_maps(q, k, v, mean, m2, prefix_mean, seen, num_prefix);
  DWATTN_CHECK(q.scalar_type() != ScalarType::Double && mean.scalar_type() == ScalarType::Double,
               "q is ", dtype_name(q.scalar_type()), " and the state ",
               dtype_name(mean.scalar_type()),
               "; the CPU kernel takes float32, float16 or bfloat16 and a float64 state. "
               "dwattn.variance.AttentionVariance takes every dtype.");
  const Tensor out = attention_output(q, v.has_value());
  if (q.numel() == 0) return out;
  const Tensor queries = dense_rows(q), keys = dense_rows(k);
  const OptionalTensor values = v.has_value() ? OptionalTensor(dense_rows(*v)) : std::nullopt;
  AttentionVarianceParams p = variance_params(queries, keys, values, out, mean, m2, prefix_mean);
  p.count = seen;
  p.skip = num_prefix;
  p.scale = static_cast<float>(scale);
  const auto workers = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t bytes = cpu::attention_variance_workspace(p, workers);
  cpu::Scratch scratch(cpu::Scratch::padded(bytes));
  const Status status =
      cpu::attention_variance(p, scratch.take(bytes), workers, torch_parallel_for());
  DWATTN_CHECK(status == Status::kOk, "The CPU kernel failed: ", status_text(status), ".");
  return out;
}

}  // namespace
}  // namespace dwattn::torch_ops

STABLE_TORCH_LIBRARY_IMPL(dwattn, CPU, m) {
  m.impl("attention_variance_", TORCH_BOX(&dwattn::torch_ops::attention_variance_cpu));
}
