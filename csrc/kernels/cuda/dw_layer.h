// A whole replacement layer on the GPU, for runtimes that want one call: values, aggregation with
// context, prefix rows, output projection, LayerScale and residual connection.
//
//   patches[b,(i,j),:] = U'[b,(i,j),:] Wo^T + bo         U' = aggregation of x Wv^T + bv (params.h)
//   rows[b,t,:]        = Y_t[b,:] Wp^T + bp              for the prefix tokens t < P
//   out                = residual + gamma concat(rows, patches)
//
// Y_t is described in prefix_rows.h; Wp, bp are prefix_out, prefix_out_bias, or Wo, bo without
// them. Every part writes its own rows of `out`: nothing is concatenated or copied.
#pragma once

#include <cstdint>

#include "kernels/params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

enum class PrefixRows : int32_t {
  kNone = 0,    // out has no prefix rows: N_out = H*W
  kExact = 1,   // softmax attention of the prefix queries over all N tokens
  kStatic = 2,  // a V_t + b mean_patches(V)
};

// N = num_prefix + height * width. Strides are in elements, the last stride is 1. Weights have the
// dtype of x and contiguous rows; coefficients (float) are contiguous. `out` may be `residual`, but
// must not overlap x.
struct DwLayerParams {
  DType dtype;  // of x, residual, out and every weight: fp32, fp16 or bf16
  bool tf32;    // fp32: products with wv, wo and prefix_out in TF32, but for a few rows

  const void* x;  // (B, N, D)
  int64_t x_stride_batch;
  int64_t x_stride_token;
  const void* residual;  // (B, N_out, D_out), or null
  int64_t residual_stride_batch;
  int64_t residual_stride_token;
  void* out;  // (B, N_out, D_out), N_out = N, or H*W where there are no prefix rows
  int64_t out_stride_batch;
  int64_t out_stride_token;

  const void* wv;       // (C, D)
  const float* bv;      // (C), or null
  const float* kernel;  // (C, 3, 3)
  const float* kappa;   // (P, C), or null
  const float* mu;      // (C), or null
  const float* beta;    // (C), or null
  const void* wo;       // (D_out, C)
  const float* bo;      // (D_out), or null
  const float* gamma;   // (D_out), or null: LayerScale

  PrefixRows prefix;
  const void* query;        // (Cp, D), scaled by 1 / sqrt(d_h); exact
  const float* query_bias;  // (Cp), scaled too, or null; exact
  const void* key;          // (Cp, D); exact
  // Without prefix_value prefix rows take wv and bv, and Cp = C; with it a null bias means none.
  const void* prefix_value;        // (Cp, D), or null
  const float* prefix_value_bias;  // (Cp), or null
  // Without prefix_out they take wo and bo; with it a null bias means none.
  const void* prefix_out;        // (D_out, Cp), or null
  const float* prefix_out_bias;  // (D_out), or null
  const float* static_a;         // (P, Cp); static
  const float* static_b;         // (P, Cp); static

  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t num_prefix;       // P
  int64_t dim;              // D
  int64_t channels;         // C
  int64_t dim_out;          // D_out
  int64_t num_heads;        // of exact prefix rows; divides Cp
  int64_t prefix_channels;  // Cp; not read without prefix rows
  bool narrow;  // one kernel for the patch rows, nothing in between in device memory; else U' is
                // kept in the workspace
};

// Whether a layer should be narrow: up to 512 inner channels, wider ones are two products, which
// are then the larger part by far; and on a grid whose sides the narrow kernel takes.
constexpr bool is_narrow(int64_t channels, int64_t height, int64_t width) {
  constexpr int64_t kChannels = 512, kSide = 1 << 15;
  return channels <= kChannels && height < kSide && width < kSide;
}

// Bytes of device memory that dw_layer needs, 16-byte aligned. Reads sizes and whether pointers are
// null, never what they point to, and asks nothing of the GPU. Grows with the batch.
int64_t dw_layer_workspace(const DwLayerParams& params);

// Writes `out` on `stream`. kUnsupportedDType for fp64; kInvalidArgument if a needed pointer is
// null, a size is out of range, heads do not divide Cp, or a narrow layer does not fit into shared
// memory (see plan_lowrank_dw).
Status dw_layer(const DwLayerParams& params, void* workspace, Stream stream);

}  // namespace dwattn::cuda
