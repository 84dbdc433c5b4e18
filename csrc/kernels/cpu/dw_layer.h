// The layer on the CPU with its own matrix products: value projection, aggregation and, where `wo`
// is given, output projection. See ../params.h for the aggregation.
#pragma once

#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"
#include "kernels/params.h"

namespace dwattn::cpu {

//   out (B, H*W, D_out) = aggregate(x wv^T + bv) wo^T + bo, or (B, H*W, C) without wo
// Rows are dense, strides in elements. Coefficients and biases have the accumulation type: double
// for fp64, else float.
struct DwLayerParams {
  DType dtype;    // of x, wv, wo and out
  const void* x;  // (B, N, D), N = num_prefix + height * width
  int64_t x_stride_batch, x_stride_token;
  void* out;
  int64_t out_stride_batch, out_stride_token;
  const void* wv;  // (C, D)
  int64_t wv_stride;
  const void* bv;      // (C), or null
  const void* kernel;  // (C, 3, 3)
  const void* kappa;   // (P, C), or null
  const void* mu;      // (C), or null
  const void* beta;    // (C), or null
  const void* wo;      // (D_out, C), or null
  int64_t wo_stride;
  const void* bo;  // (D_out), or null
  int64_t batch, height, width, num_prefix, dim, channels, dim_out;
};

int64_t dw_layer_workspace(const DwLayerParams& params, int64_t threads, Isa isa = Isa::kAuto);

Status dw_layer(const DwLayerParams& params, void* workspace, const ParallelFor& parallel,
                Isa isa = Isa::kAuto);

}  // namespace dwattn::cpu
