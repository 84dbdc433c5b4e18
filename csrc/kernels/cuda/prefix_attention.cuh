// Softmax attention of the prefix queries over the tokens themselves, in fp32 on FMA: for fp32, and
// for what the tensor cores cannot be fed with. A "query" is one prefix token seen by one head; an
// image has Q of them. All fp32:
//   absorbed (B, Q, D) -> scores (B, Q, N) -> pooled (B, Q, D)
#pragma once

#include "kernels/cuda/pairs.cuh"
#include "kernels/cuda/prefix_place.cuh"

namespace dwattn::cuda {

// ---- scores = absorbed . x

constexpr int kScoreWarps = 4;
constexpr int kScoreTokens = 4;   // of a warp
constexpr int kScoreQueries = 4;  // of a warp

template <class T, bool kAligned>
__global__ void __launch_bounds__(kScoreWarps* kWarp)
    score_kernel(const PrefixRowsParams p, const float* absorbed, float* scores) {
  const int lane = threadIdx.x % kWarp;
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const int64_t across = (queries + kScoreQueries - 1) / kScoreQueries;
  const int64_t down = (tokens + kScoreTokens - 1) / kScoreTokens;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kScoreWarps + threadIdx.x / kWarp;
  const int64_t first_query = index % across * kScoreQueries;
  index /= across;
  const int64_t first_token = index % down * kScoreTokens, image = index / down;
  if (image >= p.batch) return;

  const T* x[kScoreTokens];
  const float* a[kScoreQueries];
#pragma unroll
  for (int i = 0; i < kScoreTokens; ++i) {
    const int64_t token = first_token + i < tokens ? first_token + i : tokens - 1;
    x[i] = static_cast<const T*>(p.x) + image * p.x_stride_batch + token * p.x_stride_token;
  }
#pragma unroll
  for (int j = 0; j < kScoreQueries; ++j) {
    const int64_t query = first_query + j < queries ? first_query + j : queries - 1;
    a[j] = absorbed + (image * queries + query) * p.dim;
  }
  float sum[kScoreTokens][kScoreQueries] = {};
#pragma unroll 2
  for (int64_t k = 2 * lane; k < p.dim; k += kSlice) {
    float2 v[kScoreTokens];
#pragma unroll
    for (int i = 0; i < kScoreTokens; ++i) v[i] = load_pair<T, kAligned>(x[i] + k, p.dim - k);
#pragma unroll
    for (int j = 0; j < kScoreQueries; ++j) {
      const float2 w = load_pair<float, kAligned>(a[j] + k, p.dim - k);
#pragma unroll
      for (int i = 0; i < kScoreTokens; ++i) {
        sum[i][j] = fmaf(w.y, v[i].y, fmaf(w.x, v[i].x, sum[i][j]));
      }
    }
  }
  float mine = 0.0f;  // lane l keeps token l % 4 of query l / 4
#pragma unroll
  for (int i = 0; i < kScoreTokens; ++i) {
#pragma unroll
    for (int j = 0; j < kScoreQueries; ++j) {
      const float total = warp_sum(sum[i][j]);
      if (lane == j * kScoreTokens + i) mine = total;
    }
  }
  const int64_t token = first_token + lane % kScoreTokens;
  const int64_t query = first_query + lane / kScoreTokens;
  if (lane < kScoreTokens * kScoreQueries && token < tokens && query < queries) {
    scores[(image * queries + query) * tokens + token] = mine;
  }
}

// ---- pooled = softmax(scores) x

constexpr int kPoolWarps = 16;
constexpr int kPoolQueries = 8;   // of a block
constexpr int kPoolTokens = 128;  // whose shares lie in shared memory at a time

struct PoolShared {
  float2 sums[kPoolWarps][kPoolQueries][kWarp];
  float shares[kPoolTokens][kPoolQueries];
  float largest[kPoolQueries], scale[kPoolQueries];
};

// The largest score of a query and one over the sum of the exponentials; a warp together.
DWATTN_DEVICE void normalise(const float* scores, int64_t tokens, float& largest, float& scale) {
  const int lane = threadIdx.x % kWarp;
  float most = scores[0];
#pragma unroll 4
  for (int64_t n = lane; n < tokens; n += kWarp) most = fmaxf(most, scores[n]);
  most = warp_max(most);
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t n = lane; n < tokens; n += kWarp) sum += expf(scores[n] - most);
  sum = warp_sum(sum);
  if (lane > 0) return;
  largest = most;
  scale = 1.0f / sum;
}

// A block makes 64 features of eight queries. Its warps take every 16th token, and their sums are
// added in the order of the warps.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kPoolWarps* kWarp, 1)
    pool_kernel(const PrefixRowsParams p, const float* all_scores, float* pooled) {
  DYN_SHARED(PoolShared, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const int64_t slices = (p.dim + kSlice - 1) / kSlice;
  const int64_t groups = (queries + kPoolQueries - 1) / kPoolQueries;
  const int64_t feature = blockIdx.x % slices * kSlice + 2 * lane, valid = p.dim - feature;
  const int64_t first = blockIdx.x / slices % groups * kPoolQueries;
  const int64_t image = blockIdx.x / slices / groups;
  const int present =
      static_cast<int>(queries - first < kPoolQueries ? queries - first : kPoolQueries);
  const float* const scores = all_scores + (image * queries + first) * tokens;
  const T* const x = static_cast<const T*>(p.x) + image * p.x_stride_batch + feature;

  if (warp < present) {
    normalise(scores + warp * tokens, tokens, shared->largest[warp], shared->scale[warp]);
  }
  __syncthreads();
  float2 sum[kPoolQueries];
#pragma unroll
  for (int j = 0; j < kPoolQueries; ++j) sum[j] = zero2();
  for (int64_t begin = 0; begin < tokens; begin += kPoolTokens) {
    const int count = static_cast<int>(tokens - begin < kPoolTokens ? tokens - begin : kPoolTokens);
    for (int i = threadIdx.x; i < kPoolTokens * kPoolQueries; i += kPoolWarps * kWarp) {
      const int t = i % kPoolTokens, j = i / kPoolTokens;
      float share = 0.0f;
      if (t < count && j < present) {
        share = expf(scores[j * tokens + begin + t] - shared->largest[j]) * shared->scale[j];
      }
      shared->shares[t][j] = share;
    }
    __syncthreads();  // the shares are complete
#pragma unroll 4
    for (int t = warp; t < count; t += kPoolWarps) {
      const float2 v = load_pair<T, kAligned>(x + (begin + t) * p.x_stride_token, valid);
      float share[kPoolQueries];
      load_floats(shared->shares[t], share);
#pragma unroll
      for (int j = 0; j < kPoolQueries; ++j) {
        sum[j] = fma2(make_float2(share[j], share[j]), v, sum[j]);
      }
    }
    __syncthreads();  // nobody reads the shares any more
  }
#pragma unroll
  for (int j = 0; j < kPoolQueries; ++j) shared->sums[warp][j][lane] = sum[j];
  __syncthreads();
  if (warp >= present) return;
  float2 total = shared->sums[0][warp][lane];
  for (int other = 1; other < kPoolWarps; ++other) {
    total = add2(total, shared->sums[other][warp][lane]);
  }
  store_pair<float, kAligned>(pooled + (image * queries + first + warp) * p.dim + feature, total,
                              valid);
}

}  // namespace dwattn::cuda
