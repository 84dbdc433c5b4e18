// Argument checks shared by the operators of every device.
#pragma once

#include "torch/tensors.h"

namespace dwattn::torch_ops {

struct Geometry {
  int64_t height, width, num_prefix;
};

struct Coefficients {
  Tensor kernel;  // (C, 3, 3)
  OptionalTensor kappa, mu, beta;

  // In the accumulation dtype, contiguous.
  Coefficients prepared(ScalarType type) const {
    return {dense(kernel, type), dense(kappa, type), dense(mu, type), dense(beta, type)};
  }
};

// `t` is v or x: (B, N, channels) with N = P + H * W.
void check_tokens(const char* name, const Tensor& t, const Geometry& geometry);

void check_projection(const Tensor& x, const Tensor& wv, const OptionalTensor& bv);

// The output projection wo (D_out, C), bo (D_out) and the finished prefix rows (B, P, D_out).
void check_output(const Tensor& x, const Tensor& wv, const Tensor& wo, const OptionalTensor& bo,
                  const OptionalTensor& prefix_out, const Geometry& geometry);

// Weights and biases of the attention of prefix tokens.
struct PrefixWeights {
  const Tensor &wq, &wk, &wv, &wo;
  const OptionalTensor &bq, &bv, &bo;
};

void check_prefix_rows(const Tensor& x, const PrefixWeights& weights, int64_t num_heads,
                       int64_t num_prefix);

void check_coefficients(const Tensor& tokens, int64_t channels, const Geometry& geometry,
                        const Coefficients& coefficients);

}  // namespace dwattn::torch_ops
