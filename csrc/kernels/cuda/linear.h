// The output projection with what follows it in a block: torch's Linear on strided rows.
//
//   out[b,t,:] = residual[b,t,:] + gamma * (y[b,t,:] Wo^T + bias)
//
// Sums are taken in fp32 and the result is rounded once. 16-bit types run on the tensor cores, fed
// by 16-byte copies where pointers, strides and sizes allow it; fp32 is plain FMA unless TF32 is
// asked for.
#pragma once

#include <cstdint>

#include "kernels/params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

// Strides are in elements, the last stride is 1; coefficients are contiguous. `out` may be
// `residual`, but must not overlap y.
struct LinearParams {
  DType dtype;  // of y, weight, residual and out: fp32, fp16 or bf16
  bool tf32;    // fp32: products in TF32, but for a few rows

  const void* y;  // (B, rows, K)
  int64_t y_stride_batch;
  int64_t y_stride_token;
  const void* weight;  // (D_out, K)
  int64_t weight_stride;
  const float* bias;  // (D_out), or null

  const void* residual;  // (B, rows, D_out), or null
  int64_t residual_stride_batch;
  int64_t residual_stride_token;
  const float* gamma;  // (D_out), or null: LayerScale

  void* out;  // (B, rows, D_out)
  int64_t out_stride_batch;
  int64_t out_stride_token;

  int64_t batch;
  int64_t rows;     // of an image
  int64_t dim;      // K
  int64_t dim_out;  // D_out
};

// Writes the rows of `out` on `stream`. B * rows, K and D_out are below 2^30.
Status linear(const LinearParams& params, Stream stream);

}  // namespace dwattn::cuda
