// The attention of prefix_attention.cuh for 16-bit types on tensor cores, with next to nothing
// lost: an operand in fp32 is split into two of T, its rounded value and what rounding lost, and
// both are multiplied with x. Fragments come straight from global memory by 16 bytes a lane: the
// inner dimension may be taken in any order, so each lane gets elements that are neighbours in
// memory.
#pragma once

#include "kernels/cuda/prefix_attention.cuh"

namespace dwattn::cuda {

constexpr int kTensorQueries = 16;   // of a warp: the rows of a product
constexpr int kTensorTokens = 16;    // of a warp at a time
constexpr int kTensorFeatures = 64;  // of a block that pools
constexpr int kTensorWarps = 8;      // of it

// Two values as pairs of T that add up to them.
template <class T>
struct SplitPair {
  uint32_t high, low;

  DWATTN_DEVICE SplitPair(float v, float w) : high(pack2<T>(v, w)) {
    const float2 kept = unpack2<T>(high);
    low = pack2<T>(v - kept.x, w - kept.y);
  }
};

// Two absorbed queries as pairs of T: their parts high and low, of which scores are made apart.
// bf16 reaches as far as fp32. fp16 neither holds what is above 65504 nor what rounding loses of
// small values, so its high part is the smaller by 2^12 (2.6e8 is the end) and low is again larger.
template <class T>
struct AbsorbedPair {
  static constexpr bool kScaled = std::is_same<T, __half>::value;
  static constexpr float kDown = kScaled ? 1.0f / 4096.0f : 1.0f, kUp = kScaled ? 2048.0f : 1.0f;
  uint32_t high, low;

  DWATTN_DEVICE AbsorbedPair(float v, float w) : high(pack2<T>(v * kDown, w * kDown)) {
    const float2 kept = unpack2<T>(high);
    low = pack2<T>((v * kDown - kept.x) * kUp, (w * kDown - kept.y) * kUp);
  }

  // A score from those of the parts.
  static DWATTN_DEVICE float joined(float of_high, float of_low) {
    return fmaf(of_low, 1.0f / kUp, of_high) * (1.0f / kDown);
  }
};

// Eight elements of a row, zeros from `length` on.
template <class T>
DWATTN_DEVICE uint4 eight(const T* row, int64_t k, int64_t length) {
  return k < length ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
}

// c (16 queries x 8 tokens) += 32 features, eight of them in each lane of a quad.
template <class T>
DWATTN_DEVICE void multiply_eights(float (&c)[4], const uint4& upper, const uint4& lower,
                                   const uint4& token) {
  const uint32_t a0[4] = {upper.x, lower.x, upper.y, lower.y}, b0[2] = {token.x, token.y};
  const uint32_t a1[4] = {upper.z, lower.z, upper.w, lower.w}, b1[2] = {token.z, token.w};
  mma_16816<T>(c, a0, b0);
  mma_16816<T>(c, a1, b1);
}

// A warp makes the scores of 16 queries and 16 tokens. absorbed: (B, Q, 2, D).
template <class T>
__global__ void __launch_bounds__(kScoreWarps* kWarp)
    score_tensor_kernel(const PrefixRowsParams p, const T* absorbed, float* scores) {
  constexpr int kTiles = kTensorTokens / 8;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const int64_t across = (queries + kTensorQueries - 1) / kTensorQueries;
  const int64_t down = (tokens + kTensorTokens - 1) / kTensorTokens;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kScoreWarps + threadIdx.x / kWarp;
  const int64_t first_query = index % across * kTensorQueries;
  index /= across;
  const int64_t first_token = index % down * kTensorTokens, image = index / down;
  if (image >= p.batch) return;

  const T* a[2];  // of the queries g and g + 8
  const T* x[kTiles];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t query = first_query + g + 8 * i < queries ? first_query + g + 8 * i : queries - 1;
    a[i] = absorbed + (image * queries + query) * 2 * p.dim;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int64_t token = first_token + 8 * j + g < tokens ? first_token + 8 * j + g : tokens - 1;
    x[j] = static_cast<const T*>(p.x) + image * p.x_stride_batch + token * p.x_stride_token;
  }
  float of_high[kTiles][4] = {}, of_low[kTiles][4] = {};
#pragma unroll 2
  for (int64_t begin = 0; begin < p.dim; begin += 32) {
    const int64_t k = begin + 8 * t;
    uint4 high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = eight(a[i], k, p.dim);
      low[i] = eight(a[i] + p.dim, k, p.dim);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint4 token = eight(x[j], k, p.dim);
      multiply_eights<T>(of_high[j], high[0], high[1], token);
      multiply_eights<T>(of_low[j], low[0], low[1], token);
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t query = first_query + g + e / 2 * 8;
      const int64_t token = first_token + 8 * j + 2 * t + e % 2;
      if (query < queries && token < tokens) {
        scores[(image * queries + query) * tokens + token] =
            AbsorbedPair<T>::joined(of_high[j][e], of_low[j][e]);
      }
    }
  }
}

struct TensorPoolShared {
  float sums[kTensorWarps][kTensorQueries][kTensorFeatures + 4];
  float largest[kTensorQueries], scale[kTensorQueries];
};

// exp(score - largest) of a lane's queries g, g + 8 and tokens 2t, 2t + 1 and those + 8, split: the
// left operand of a product.
template <class T>
struct ShareOperand {
  uint32_t high[4], low[4];

  DWATTN_DEVICE ShareOperand(const float* scores, const TensorPoolShared& shared, int present,
                             int64_t first_token, int64_t tokens) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = g + i % 2 * 8;
      const int64_t token = first_token + 2 * t + i / 2 * 8;
      float share[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        share[e] = query < present && token + e < tokens
                       ? expf(scores[query * tokens + token + e] - shared.largest[query])
                       : 0.0f;
      }
      const SplitPair<T> pair(share[0], share[1]);
      high[i] = pair.high;
      low[i] = pair.low;
    }
  }
};

// The low halves, or the high halves, of two words.
template <bool kHigh>
DWATTN_DEVICE uint32_t halves(uint32_t first, uint32_t second) {
  return kHigh ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}

// c[0], c[1] (16 queries x 8 features) += 16 tokens; the word of a lane holds a feature of each.
template <class T>
DWATTN_DEVICE void multiply_words(float (&c)[2][4], const ShareOperand<T>& share, uint32_t x0,
                                  uint32_t x1, uint32_t x8, uint32_t x9) {
  const uint32_t even[2] = {halves<false>(x0, x1), halves<false>(x8, x9)};
  const uint32_t odd[2] = {halves<true>(x0, x1), halves<true>(x8, x9)};
  mma_16816<T>(c[0], share.high, even);
  mma_16816<T>(c[0], share.low, even);
  mma_16816<T>(c[1], share.high, odd);
  mma_16816<T>(c[1], share.low, odd);
}

// A block pools 64 features of 16 queries. Its warps take every eighth group of 16 tokens, and
// their sums are added in the order of the warps.
template <class T>
__global__ void __launch_bounds__(kTensorWarps* kWarp)
    pool_tensor_kernel(const PrefixRowsParams p, const float* all_scores, float* pooled) {
  DYN_SHARED(TensorPoolShared, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const int64_t slices = (p.dim + kTensorFeatures - 1) / kTensorFeatures;
  const int64_t groups = (queries + kTensorQueries - 1) / kTensorQueries;
  const int64_t first_feature = blockIdx.x % slices * kTensorFeatures;
  const int64_t first = blockIdx.x / slices % groups * kTensorQueries;
  const int64_t image = blockIdx.x / slices / groups;
  const int present =
      static_cast<int>(queries - first < kTensorQueries ? queries - first : kTensorQueries);
  const float* const scores = all_scores + (image * queries + first) * tokens;
  const T* const x = static_cast<const T*>(p.x) + image * p.x_stride_batch;

  for (int i = warp; i < present; i += kTensorWarps) {
    normalise(scores + i * tokens, tokens, shared->largest[i], shared->scale[i]);
  }
  __syncthreads();  // the largest scores are known

  // feature 8 n + 2 i + j of the slice is column n of product (i, j)
  float sum[4][2][4] = {};
  const int64_t feature = first_feature + 8 * g;
  for (int64_t begin = warp * kTensorTokens; begin < tokens;
       begin += kTensorWarps * kTensorTokens) {
    uint4 v[4];  // tokens 2t, 2t + 1 and those + 8
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = begin + 2 * t + i % 2 + i / 2 * 8;
      v[i] = eight(x + (token < tokens ? token : tokens - 1) * p.x_stride_token, feature, p.dim);
    }
    const ShareOperand<T> share(scores, *shared, present, begin, tokens);
    multiply_words(sum[0], share, v[0].x, v[1].x, v[2].x, v[3].x);
    multiply_words(sum[1], share, v[0].y, v[1].y, v[2].y, v[3].y);
    multiply_words(sum[2], share, v[0].z, v[1].z, v[2].z, v[3].z);
    multiply_words(sum[3], share, v[0].w, v[1].w, v[2].w, v[3].w);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      shared->sums[warp][g + e / 2 * 8][8 * (2 * t + e % 2) + i] = sum[i / 2][i % 2][e];
    }
  }
  __syncthreads();  // the sums of the warps are complete
  for (int i = threadIdx.x; i < present * kTensorFeatures; i += kTensorWarps * kWarp) {
    const int query = i / kTensorFeatures, f = i % kTensorFeatures;
    if (first_feature + f >= p.dim) continue;
    float total = 0.0f;
    for (int w = 0; w < kTensorWarps; ++w) total += shared->sums[w][query][f];
    pooled[(image * queries + first + query) * p.dim + first_feature + f] =
        total * shared->scale[query];
  }
}

}  // namespace dwattn::cuda
