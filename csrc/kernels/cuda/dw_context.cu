// ctx of dw_attention without V. The mean of V is the mean of x through Wv, so P + 1 rows of an
// image are projected instead of all. Shapes:
//   x (B, P + H*W, D), mean (B, D) fp32, Wv (C, D) -> ctx (B, C) fp32
#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/patch_mean.cuh"

namespace dwattn::cuda {
namespace {

constexpr int kProjectWarps = 8;
constexpr int kImages = 4;  // that share one pass over a row of Wv

struct Projected {
  float v[kImages];
};

// Rows `row` (one per image) times a row of Wv; every lane gets the sums.
template <class T, class Row>
DWATTN_DEVICE Projected project(const Row* row, const int64_t (&offset)[kImages], const T* wv,
                                int64_t dim) {
  Projected sum = {};
#pragma unroll 4
  for (int64_t k = threadIdx.x % kWarp; k < dim; k += kWarp) {
    const float w = to_float(wv[k]);
#pragma unroll
    for (int i = 0; i < kImages; ++i) sum.v[i] = fmaf(w, to_float(row[offset[i] + k]), sum.v[i]);
  }
#pragma unroll
  for (int i = 0; i < kImages; ++i) sum.v[i] = warp_sum(sum.v[i]);
  return sum;
}

// A warp makes one channel of four images.
template <class T>
__global__ void __launch_bounds__(kProjectWarps* kWarp)
    dw_context_kernel(const DwAttentionParams p, const float* mean, float* ctx) {
  const int64_t groups = (p.channels + kProjectWarps - 1) / kProjectWarps;
  const int64_t channel = blockIdx.x % groups * kProjectWarps + threadIdx.x / kWarp;
  const int64_t first = blockIdx.x / groups * kImages;
  if (channel >= p.channels) return;
  const T* const wv = static_cast<const T*>(p.wv) + channel * p.wv_stride;
  const T* const x = static_cast<const T*>(p.x);
  const float bias = p.bv != nullptr ? p.bv[channel] : 0.0f;
  const float beta = p.beta != nullptr ? p.beta[channel] : 0.0f;
  float total[kImages];
  int64_t in_mean[kImages], in_x[kImages];
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    const int64_t image = first + i < p.batch ? first + i : p.batch - 1;  // a repetition is dropped
    in_mean[i] = image * p.dim;
    in_x[i] = image * p.x_stride_batch;
    total[i] = beta;
  }
  if (p.mu != nullptr) {
    const Projected row = project(mean, in_mean, wv, p.dim);
#pragma unroll
    for (int i = 0; i < kImages; ++i) total[i] = fmaf(p.mu[channel], row.v[i] + bias, total[i]);
  }
  for (int64_t t = 0; p.kappa != nullptr && t < p.num_prefix; ++t) {
    const float kappa = p.kappa[t * p.channels + channel];
    const Projected row = project(x + t * p.x_stride_token, in_x, wv, p.dim);
#pragma unroll
    for (int i = 0; i < kImages; ++i) total[i] = fmaf(kappa, row.v[i] + bias, total[i]);
  }
  if (threadIdx.x % kWarp > 0) return;
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    if (first + i < p.batch) ctx[(first + i) * p.channels + channel] = total[i];
  }
}

template <class T>
Status run(const DwAttentionParams& p, float* ctx, float* mean, cudaStream_t stream) {
  if (p.mu != nullptr) {
    const T* const patches = static_cast<const T*>(p.x) + p.num_prefix * p.x_stride_token;
    const Status status = patch_mean(patches, p.x_stride_batch, p.x_stride_token, p.batch,
                                     p.height * p.width, p.dim, mean, stream);
    if (status != Status::kOk) return status;
  }
  const int64_t groups = (p.channels + kProjectWarps - 1) / kProjectWarps;
  const int64_t blocks = groups * ((p.batch + kImages - 1) / kImages);
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  return launch(dw_context_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kProjectWarps * kWarp), 0, stream, p, mean, ctx);
}

}  // namespace

Status dw_context(const DwAttentionParams& p, float* ctx, float* workspace, Stream stream) {
  if (p.batch == 0 || p.channels == 0) return Status::kOk;
  if (ctx == nullptr || (p.mu != nullptr && p.dim > 0 && workspace == nullptr)) {
    return Status::kInvalidArgument;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, ctx, workspace, stream);
    case DType::kFloat16:
      return run<__half>(p, ctx, workspace, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, ctx, workspace, stream);
    case DType::kFloat64:
      break;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cuda
