// The whole lowrank_dw / ens_dw layer for the patch rows in one kernel: projection to r channels,
// 3x3 aggregation with context on them, projection back, and the residual connection.
//
//   U[b,t,c]        = sum_i x[b,t,i] A[c,i] + a_bias[c]              for patch tokens t
//   U'[b,(i,j),c]   = sum_{s,t in -1..1} K[c,s+1,t+1] U[b,(i+s,j+t),c] + ctx[b,c]
//   y[b,(i,j),d]    = sum_c U'[b,(i,j),c] B[d,c] + b_bias[d]
//   out[b,P+iW+j,d] = residual[b,P+iW+j,d] + gamma[d] y[b,(i,j),d]
//
// U is zero outside the grid. U and U' are rounded to the dtype of x, sums are taken in fp32;
// neither reaches device memory.
#pragma once

#include <cstdint>

#include "kernels/params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

// Strides are in elements; the last stride of x, a, b, residual and out is 1. Tokens are counted
// from the first prefix token; only patch rows are read and written. Coefficients are contiguous.
// `out` may be `residual`, but must not overlap x.
struct LowrankDwParams {
  DType dtype;  // of x, a, b, residual, out: fp32, fp16 or bf16
  bool tf32;    // fp32: the products with A and B are taken in TF32

  const void* x;  // (B, N, D), N = num_prefix + height * width
  int64_t x_stride_batch;
  int64_t x_stride_token;
  const void* a;  // (r, D)
  int64_t a_stride;
  const void* b;  // (D_out, r)
  int64_t b_stride;

  const float* a_bias;  // (r), or null
  const float* kernel;  // (r, 3, 3)
  const float* ctx;     // (B, r), or null
  const float* b_bias;  // (D_out), or null

  const void* residual;  // (B, N, D_out), or null
  int64_t residual_stride_batch;
  int64_t residual_stride_token;
  const float* gamma;  // (D_out), or null: LayerScale

  void* out;  // (B, N, D_out)
  int64_t out_stride_batch;
  int64_t out_stride_token;

  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t num_prefix;
  int64_t dim;      // D
  int64_t dim_out;  // D_out
  int64_t rank;     // r
};

struct DeviceLimits {
  int64_t shared_bytes;  // of one block, opted in
  int64_t multiprocessors;
};

// How the grid is cut: a block owns tile_height x tile_width patches of one image with all
// channels. It computes U for them and for a border of one patch, so larger tiles repeat less work,
// and smaller ones keep more multiprocessors busy.
struct LowrankDwPlan {
  int32_t tile_height;
  int32_t tile_width;
  int32_t channels;     // r, padded
  int32_t slot_stride;  // elements between the U of two patches in shared memory
  int32_t rank_tile;    // channels per pass over x, 64 or 128; the next pass reads x from L2
  int64_t shared_bytes;
  int64_t blocks;
};

// Chooses the plan by a cost model: a pure function of sizes, dtype and limits, which reads no
// pointer. kUnsupportedDType for fp64; kInvalidArgument if a size is out of range (D and r below
// 2^20, sides of the grid below 2^15) or if one patch with its border does not fit into shared
// memory, which 99 KB, the smallest limit of compute capability 8.0 and later, exclude for r > 1632
// (816 in fp32).
Status plan_lowrank_dw(const LowrankDwParams& params, const DeviceLimits& limits,
                       LowrankDwPlan* plan);

// Writes the patch rows of `out` on `stream`.
Status lowrank_dw_attention(const LowrankDwParams& params, const LowrankDwPlan& plan,
                            Stream stream);

// Limits of the current device.
Status device_limits(DeviceLimits* limits);

}  // namespace dwattn::cuda
