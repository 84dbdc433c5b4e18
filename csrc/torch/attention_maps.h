// What the operator attention_variance_ has in common on all devices: checks and arguments.
#pragma once

#include "kernels/attention_variance_params.h"
#include "torch/tensors.h"

namespace dwattn::torch_ops {

// q, k, v (B, n_h, N, d_h) of one dtype and device; the state as in AttentionVarianceParams.
void check_maps(const Tensor& q, const Tensor& k, const OptionalTensor& v, const Tensor& mean,
                const Tensor& m2, const OptionalTensor& prefix_mean, int64_t seen,
                int64_t num_prefix);

// (B, n_h, N, d_h), laid out as (B, N, n_h, d_h) so that joining the heads is a view; or empty.
Tensor attention_output(const Tensor& q, bool with_values);

// Everything but count, skip and scale. The stride within d_h of q, k and v is 1.
AttentionVarianceParams variance_params(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                        const Tensor& out, const Tensor& mean, const Tensor& m2,
                                        const OptionalTensor& prefix_mean);

}  // namespace dwattn::torch_ops
