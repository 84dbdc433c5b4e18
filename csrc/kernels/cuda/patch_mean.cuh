// Mean over the patches of tokens (B, count, dim) -> mean (B, dim), in fp32.
#pragma once

#include "kernels/cuda/pairs.cuh"

namespace dwattn::cuda {

constexpr int kMeanWarps = 16;
constexpr int kMeanRun = 64;  // tokens that a warp sums before it adds them to the others

// A block owns 64 features of an image; its warps take every 16th token, in runs: the error of a
// sum grows with its length. The warps' sums are added in the order of the warps.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kMeanWarps* kWarp)
    patch_mean_kernel(const T* tokens, int64_t stride_batch, int64_t stride_token, int64_t count,
                      int64_t dim, float* mean) {
  DYN_SHARED(float2, sums);  // (kMeanWarps, kWarp)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t slices = (dim + kSlice - 1) / kSlice;
  const int64_t image = blockIdx.x / slices;
  const int64_t feature = blockIdx.x % slices * kSlice + 2 * lane;
  const int64_t valid = dim - feature;
  const T* const from = tokens + image * stride_batch + feature;
  float2 sum = zero2();
  for (int64_t t = warp; t < count;) {
    const int64_t next = t + kMeanWarps * kMeanRun, end = next < count ? next : count;
    float2 run = zero2();
#pragma unroll 4
    for (; t < end; t += kMeanWarps) {
      run = add2(run, load_pair<T, kAligned>(from + t * stride_token, valid));
    }
    sum = add2(sum, run);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < kMeanWarps; ++other) sum = add2(sum, sums[other * kWarp + lane]);
  const float scale = 1.0f / static_cast<float>(count);
  float* const to = mean + image * dim + feature;
  if (valid > 0) to[0] = sum.x * scale;
  if (valid > 1) to[1] = sum.y * scale;
}

template <class T>
Status patch_mean(const T* tokens, int64_t stride_batch, int64_t stride_token, int64_t batch,
                  int64_t count, int64_t dim, float* mean, cudaStream_t stream) {
  const bool aligned = is_aligned(tokens, 2 * sizeof(T)) && stride_batch % 2 == 0 &&
                       stride_token % 2 == 0 && dim % 2 == 0;
  const int64_t blocks = (dim + kSlice - 1) / kSlice * batch;
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  return launch(aligned ? patch_mean_kernel<T, true> : patch_mean_kernel<T, false>,
                dim3(static_cast<unsigned>(blocks)), dim3(kMeanWarps * kWarp),
                kMeanWarps * kWarp * sizeof(float2), stream, tokens, stride_batch, stride_token,
                count, dim, mean);
}

}  // namespace dwattn::cuda
