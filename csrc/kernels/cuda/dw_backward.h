// Gradients of the depthwise aggregation (definition: ../params.h) on the GPU, without torch.
#pragma once

#include "kernels/params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

// With G = dL/dY and S[b,c] = sum over the patches of G:
//   dV[b, (i,j), c] = sum_{r,s in 0..2} K[c,r,s] G[b, (i+1-r, j+1-s), c] + mu[c] S[b,c] / (H W)
//   dV[b, t, c]     = kappa[t,c] S[b,c]                           for prefix tokens t < P
//   dkernel[c,r,s]  = sum_{b,i,j} V[b, (i,j), c] G[b, (i+1-r, j+1-s), c]
//   dkappa[t,c]     = sum_b V[b,t,c] S[b,c]        dmu[c]   = sum_b mean_patches(V)[b,c] S[b,c]
//   dbeta[c]        = sum_b S[b,c]
// where G is zero outside the grid.
//
// Strides are in elements; channels are contiguous. Results that are null are not computed; dV, its
// prefix rows included, is written completely. Sums are taken in fp32 and in an order that depends
// on the sizes and the number of multiprocessors only: the same call gives the same bits.
struct DwBackwardParams {
  DType dtype;  // of grad, v and dv: kFloat32, kFloat16 or kBFloat16

  const void* grad;  // G (B, H*W, C)
  int64_t grad_stride_batch;
  int64_t grad_stride_token;

  const void* v;  // (B, N, C), N = num_prefix + height * width; null without dkernel, dkappa, dmu
  int64_t v_stride_batch;
  int64_t v_stride_token;

  void* dv;  // (B, N, C), or null
  int64_t dv_stride_batch;
  int64_t dv_stride_token;

  const float* kernel;  // (C, 3, 3); null without dv
  const float* kappa;   // (P, C), or null
  const float* mu;      // (C), or null

  float* dkernel;  // (C, 3, 3), or null
  float* dkappa;   // (P, C), or null
  float* dmu;      // (C), or null
  float* dbeta;    // (C), or null

  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t num_prefix;
  int64_t channels;
};

// Bytes of device memory that dw_backward needs, 16-byte aligned: partial sums.
int64_t dw_backward_workspace(const DwBackwardParams& params);
Status dw_backward(const DwBackwardParams& params, void* workspace, Stream stream);

}  // namespace dwattn::cuda
