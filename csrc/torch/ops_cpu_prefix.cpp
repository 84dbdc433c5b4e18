// The rows of the prefix tokens on CPU tensors.
#include "kernels/cpu/prefix_rows.h"
#include "kernels/cpu/scratch.h"
#include "torch/checks.h"
#include "torch/cpu_parallel.h"
#include "torch/cpu_tensors.h"

namespace dwattn::torch_ops {
namespace {

Tensor prefix_rows_cpu(const Tensor& x, const Tensor& wq, const OptionalTensor& bq,
                       const Tensor& wk, const Tensor& wv, const OptionalTensor& bv,
                       const Tensor& wo, const OptionalTensor& bo, int64_t num_heads,
                       int64_t num_prefix, double scale) {
  check_prefix_rows(x, {wq, wk, wv, wo, bq, bv, bo}, num_heads, num_prefix);
  const ScalarType type = x.scalar_type(), wide = accumulation_type(type);
  const Tensor out = empty_cpu({x.size(0), num_prefix, wo.size(0)}, type);
  if (out.numel() == 0) return out;
  const Tensor tokens = dense_rows(x), query = dense_rows(wq), key = dense_rows(wk),
               value = dense_rows(wv), back = dense_rows(wo);
  const Widened query_bias(bq, wide), value_bias(bv, wide), back_bias(bo, wide);
  cpu::PrefixRowsParams p{};
  p.dtype = kernel_dtype(type);
  p.x = tokens.const_data_ptr();
  p.x_stride_batch = tokens.stride(0);
  p.x_stride_token = tokens.stride(1);
  p.wq = query.const_data_ptr();
  p.wq_stride = query.stride(0);
  p.bq = query_bias.data();
  p.wk = key.const_data_ptr();
  p.wk_stride = key.stride(0);
  p.wv = value.const_data_ptr();
  p.wv_stride = value.stride(0);
  p.bv = value_bias.data();
  p.wo = back.const_data_ptr();
  p.wo_stride = back.stride(0);
  p.bo = back_bias.data();
  p.out = out.mutable_data_ptr();
  p.scale = scale;
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.num_prefix = num_prefix;
  p.dim = x.size(2);
  p.heads = num_heads;
  p.head_dim = wq.size(0) / num_heads;
  p.dim_out = wo.size(0);
  const int64_t bytes = cpu::prefix_rows_workspace(p);
  cpu::Scratch scratch(cpu::Scratch::padded(bytes));
  check_status(cpu::prefix_rows(p, scratch.take(bytes), torch_parallel_for()));
  return out;
}

}  // namespace
}  // namespace dwattn::torch_ops

STABLE_TORCH_LIBRARY_IMPL(dwattn, CPU, m) {
  m.impl("prefix_rows", TORCH_BOX(&dwattn::torch_ops::prefix_rows_cpu));
}
