// The depthwise operators on the GPU: launchers without torch. Definition: ../params.h.
//
// All work goes to the caller's stream; nothing is allocated and nothing waits. Sums are taken in
// fp32, in an order that does not vary. fp32 products are plain FMAs unless TF32 is asked for.
#pragma once

#include "kernels/params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

// Y = aggregation of V = x Wv^T + bv, where V never leaves the chip. In fp16 and bf16 V is rounded
// to the dtype of x before it is aggregated, as it would be between two layers; ctx stays in fp32.
//
// Strides are in elements; features and channels are contiguous. The tensor cores are fed by
// 16-byte copies where D, the strides of x and wv (multiples of 16 bytes) and the pointers allow it
// and C is even; anything else is loaded by the element.
struct DwAttentionParams {
  DType dtype;  // of x, wv and y: kFloat32, kFloat16 or kBFloat16
  bool tf32;    // kFloat32: the products of x and wv are taken in TF32, on the tensor cores

  const void* x;  // (B, N, D), N = num_prefix + height * width
  int64_t x_stride_batch;
  int64_t x_stride_token;

  const void* wv;  // (C, D)
  int64_t wv_stride;

  void* y;  // (B, H*W, C)
  int64_t y_stride_batch;
  int64_t y_stride_token;

  const float* bv;      // (C), or null
  const float* kernel;  // (C, 3, 3)
  const float* kappa;   // (P, C), or null
  const float* mu;      // (C), or null
  const float* beta;    // (C), or null

  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t num_prefix;
  int64_t dim;
  int64_t channels;
};

// Bytes of device memory that dw_attention needs, 16-byte aligned.
int64_t dw_attention_workspace(const DwAttentionParams& params);
Status dw_attention(const DwAttentionParams& params, void* workspace, Stream stream);

// ctx (B, C) alone, from the mean of x over the patches and from the prefix rows. The workspace
// holds batch * dim floats, 16-byte aligned; with mu it holds that mean afterwards, without mu it
// is not touched.
Status dw_context(const DwAttentionParams& params, float* ctx, float* workspace, Stream stream);

// The aggregation of a V that is in memory. y_dtype must be v_dtype; fp64 is not supported.
int64_t dw_aggregate_workspace(const DwAggregateParams& params);
Status dw_aggregate(const DwAggregateParams& params, void* workspace, Stream stream);

}  // namespace dwattn::cuda
