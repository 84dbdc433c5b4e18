// ctx of dw_attention without V. The mean of V is the mean of x through Wv, so P + 1 rows of an
// image are projected instead of all. Shapes:
//   x (B, P + H*W, D), mean (B, D) fp32, Wv (C, D) -> ctx (B, C) fp32
#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/patch_mean.cuh"
#include "kernels/cuda/row_product.cuh"

namespace dwattn::cuda {
namespace {

// A warp makes one channel of four images.
template <class T>
__global__ void __launch_bounds__(kProductWarps* kWarp, 1)
    dw_context_kernel(const DwAttentionParams p, const float* mean, float* ctx) {
  const RowGroup group(p.batch, p.channels);
  const int64_t channel = group.channel;
  if (channel >= p.channels) return;
  const T* const wv = static_cast<const T*>(p.wv) + channel * p.wv_stride;
  const T* const x = static_cast<const T*>(p.x);
  const bool wv_vectors = vectors_aligned<T>(p.wv, p.wv_stride, 0, p.dim);
  const bool x_vectors = vectors_aligned<T>(p.x, p.x_stride_batch, p.x_stride_token, p.dim);
  const float bias = p.bv != nullptr ? p.bv[channel] : 0.0f;
  const float beta = p.beta != nullptr ? p.beta[channel] : 0.0f;
  float total[kRowsTogether];
  int64_t in_mean[kRowsTogether], in_x[kRowsTogether];
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    in_mean[i] = group.row(i) * p.dim;
    in_x[i] = group.row(i) * p.x_stride_batch;
    total[i] = beta;
  }
  if (p.mu != nullptr) {
    const RowSums row = row_sums(mean, in_mean, wv, p.dim, wv_vectors);
#pragma unroll
    for (int i = 0; i < kRowsTogether; ++i) {
      total[i] = fmaf(p.mu[channel], row.v[i] + bias, total[i]);
    }
  }
  for (int64_t t = 0; p.kappa != nullptr && t < p.num_prefix; ++t) {
    const float kappa = p.kappa[t * p.channels + channel];
    const RowSums row =
        row_sums(x + t * p.x_stride_token, in_x, wv, p.dim, wv_vectors && x_vectors);
#pragma unroll
    for (int i = 0; i < kRowsTogether; ++i) total[i] = fmaf(kappa, row.v[i] + bias, total[i]);
  }
  if (threadIdx.x % kWarp > 0) return;
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    if (group.exists(i)) ctx[group.row(i) * p.channels + channel] = total[i];
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
  const int64_t blocks = row_product_blocks(p.batch, p.channels);
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  return launch(dw_context_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kProductWarps * kWarp), 0, stream, p, mean, ctx);
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
