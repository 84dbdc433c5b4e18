// Attention and, in the same call, running statistics of its maps E = softmax(scale * Q K^T).
//
//   lse[b,h,i]    = log sum_j exp(scale * q[b,h,i] . k[b,h,j])
//   out[b,h,i]    = sum_j E[b,h,i,j] v[b,h,j]
//   mean, M2      += the B maps of the batch, per (head, query, key), by Chan's formula
#pragma once

#include "kernels/params.h"

namespace dwattn {

// Strides are in elements; the stride within d_h is 1. On CUDA d_h is at most 128.
struct AttentionVarianceParams {
  DType dtype;  // of q, k, v, out: fp32, fp16 or bf16

  const void* q;  // (B, n_h, N, d_h)
  int64_t q_stride_batch;
  int64_t q_stride_head;
  int64_t q_stride_token;
  const void* k;  // (B, n_h, N, d_h)
  int64_t k_stride_batch;
  int64_t k_stride_head;
  int64_t k_stride_token;
  const void* v;  // (B, n_h, N, d_h), or null: no out
  int64_t v_stride_batch;
  int64_t v_stride_head;
  int64_t v_stride_token;
  void* out;  // (B, n_h, N, d_h), or null
  int64_t out_stride_batch;
  int64_t out_stride_head;
  int64_t out_stride_token;

  float* lse;  // (B, n_h, N), contiguous; written by the CUDA kernel only

  // The state: (n_h, N - skip, N - skip), contiguous, fp32 or fp64. Entries of the first `skip`
  // queries and keys are left out of it, not out of the softmax. With count 0 it is not read. On
  // the CPU fp64 only; on CUDA null asks for no statistics.
  DType state_dtype;
  void* mean;
  void* m2;
  void* prefix_mean;  // (n_h, N - skip, skip): mean of E on the skipped keys; or null
  int64_t count;      // images in the state so far; the caller adds `batch` afterwards
  int64_t skip;

  float scale;
  int64_t batch;
  int64_t heads;
  int64_t tokens;
  int64_t head_dim;
};

}  // namespace dwattn
