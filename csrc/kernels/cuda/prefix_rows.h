// What a replaced layer gives to its prefix tokens t < P, before the output projection: Y (B, P,
// Cp).
//
//   exact:  q_t = Wq x_t + bq,  a_th = q_t^T Wk for the channels of head h,  s_thn = a_th . x_n
//           Y_t = Wv (sum_n softmax(s_th)_n x_n) + bv for the channels of head h
//   static: Y_t = a[t] (Wv x_t + bv) + b[t] (Wv mean_patches(x) + bv)
//
// Neither keys nor values of all tokens are formed. A key bias would cancel in the softmax. Only Y
// is rounded: queries, a_th, scores, shares and pooled tokens are kept in fp32, or for the tensor
// cores as two values of T that add up to it (in fp16 a_th then ends at 2.6e8, and not at 65504).
#pragma once

#include <cstdint>

#include "kernels/params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

// Strides are in elements, the last stride is 1; weights and coefficients are contiguous.
struct PrefixRowsParams {
  DType dtype;  // of x, rows and the weights: fp32, fp16 or bf16

  const void* x;  // (B, N, D), N = num_prefix + patches
  int64_t x_stride_batch;
  int64_t x_stride_token;
  const void* value;        // (Cp, D)
  const float* value_bias;  // (Cp), or null

  const void* query;        // (Cp, D), scaled by 1 / sqrt(d_h); exact
  const float* query_bias;  // (Cp), scaled too, or null; exact
  const void* key;          // (Cp, D); exact
  const float* a;           // (P, Cp); static
  const float* b;           // (P, Cp); static
  const float* mean;  // (B, D) of the patches of x, 16-byte aligned, or null: computed; static

  void* rows;  // (B, P, Cp)
  int64_t rows_stride_batch;
  int64_t rows_stride_token;

  int64_t batch;
  int64_t num_prefix;  // P
  int64_t patches;     // H * W
  int64_t dim;         // D
  int64_t channels;    // Cp
  int64_t num_heads;   // divides Cp; exact
};

// The workspace is a number of bytes of device memory, 16-byte aligned, which depends on the sizes
// and on whether mean is null.
int64_t exact_prefix_rows_workspace(const PrefixRowsParams& params);
Status exact_prefix_rows(const PrefixRowsParams& params, void* workspace, Stream stream);

int64_t static_prefix_rows_workspace(const PrefixRowsParams& params);
Status static_prefix_rows(const PrefixRowsParams& params, void* workspace, Stream stream);

}  // namespace dwattn::cuda
