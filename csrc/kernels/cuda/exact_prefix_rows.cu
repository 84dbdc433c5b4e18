// Exact prefix rows in five kernels. A "query" below is one prefix token seen by one head, numbered
// t * heads + h; an image has Q of them. Shapes, all fp32 in the workspace:
//   q (B, P, Cp), absorbed (B, Q, D), scores (B, Q, N), pooled (B, Q, D)
#include "kernels/cuda/pairs.cuh"
#include "kernels/cuda/prefix_place.cuh"

namespace dwattn::cuda {
namespace {

// ---- q = Wq x_t + bq

template <class T>
__global__ void __launch_bounds__(kProductWarps* kWarp)
    query_kernel(const PrefixRowsParams p, float* q) {
  const RowGroup group(p.batch * p.num_prefix, p.channels);
  if (group.channel >= p.channels) return;
  int64_t offset[kRowsTogether];
  offsets_in_x(p, group, offset);
  const bool vectors = x_vectors<T>(p) && vectors_aligned<T>(p.query, p.dim, 0, p.dim);
  const RowSums sum =
      row_sums(static_cast<const T*>(p.x), offset,
               static_cast<const T*>(p.query) + group.channel * p.dim, p.dim, vectors);
  if (threadIdx.x % kWarp > 0) return;
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    if (!group.exists(i)) continue;
    q[group.row(i) * p.channels + group.channel] = sum.v[i] + bias_of(p.query_bias, group.channel);
  }
}

// ---- absorbed = q^T Wk, head by head

// A block makes 64 features of one head of four rows; its warps take every eighth channel of the
// head, and their sums are added in the order of the warps.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kProductWarps* kWarp)
    absorb_kernel(const PrefixRowsParams p, const float* q, float* absorbed) {
  DYN_SHARED(float2, sums);  // (kProductWarps, kRowsTogether, kWarp)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t slices = (p.dim + kSlice - 1) / kSlice;
  const int64_t feature = blockIdx.x % slices * kSlice + 2 * lane, valid = p.dim - feature;
  const int64_t head = blockIdx.x / slices % p.num_heads;
  const int64_t first = blockIdx.x / slices / p.num_heads * kRowsTogether;
  const int64_t rows = p.batch * p.num_prefix, head_dim = p.channels / p.num_heads;
  const T* const key = static_cast<const T*>(p.key) + feature;
  float2 sum[kRowsTogether];
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) sum[i] = zero2();
#pragma unroll 4
  for (int64_t c = head * head_dim + warp; c < (head + 1) * head_dim; c += kProductWarps) {
    const float2 w = load_pair<T, kAligned>(key + c * p.dim, valid);
#pragma unroll
    for (int i = 0; i < kRowsTogether; ++i) {
      const float query = first + i < rows ? q[(first + i) * p.channels + c] : 0.0f;
      sum[i] = fma2(make_float2(query, query), w, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) sums[(warp * kRowsTogether + i) * kWarp + lane] = sum[i];
  __syncthreads();
  if (warp >= kRowsTogether || first + warp >= rows) return;
  float2 total = sums[warp * kWarp + lane];
  for (int other = 1; other < kProductWarps; ++other) {
    total = add2(total, sums[(other * kRowsTogether + warp) * kWarp + lane]);
  }
  store_pair<float, kAligned>(absorbed + ((first + warp) * p.num_heads + head) * p.dim + feature,
                              total, valid);
}

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

// ---- Y = Wv pooled + bv, head by head

template <class T>
__global__ void __launch_bounds__(kProductWarps* kWarp)
    exact_rows_kernel(const PrefixRowsParams p, const float* pooled) {
  const RowGroup group(p.batch * p.num_prefix, p.channels);
  if (group.channel >= p.channels) return;
  const int64_t head = group.channel / (p.channels / p.num_heads);
  int64_t offset[kRowsTogether];
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    offset[i] = (group.row(i) * p.num_heads + head) * p.dim;
  }
  const bool vectors = vectors_aligned<T>(p.value, p.dim, 0, p.dim);
  const RowSums sum = row_sums(
      pooled, offset, static_cast<const T*>(p.value) + group.channel * p.dim, p.dim, vectors);
  if (threadIdx.x % kWarp > 0) return;
  const float bias = bias_of(p.value_bias, group.channel);
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    if (group.exists(i)) write_row<T>(p, group.row(i), group.channel, sum.v[i] + bias);
  }
}

// ---- Launches

// Parts of the workspace of exact rows, in floats; each starts at a 16-byte boundary.
struct ExactParts {
  int64_t q, absorbed, scores, pooled, end;

  explicit ExactParts(const PrefixRowsParams& p) {
    const auto whole = [](int64_t floats) { return (floats + 3) / 4 * 4; };
    const int64_t queries = p.batch * p.num_prefix * p.num_heads;
    q = 0;
    absorbed = q + whole(p.batch * p.num_prefix * p.channels);
    scores = absorbed + whole(queries * p.dim);
    pooled = scores + whole(queries * (p.num_prefix + p.patches));
    end = pooled + whole(queries * p.dim);
  }
};

// Pairs of x, of the key and of the vectors in the workspace.
template <class T>
bool pairs_aligned(const PrefixRowsParams& p) {
  return is_aligned(p.x, 2 * sizeof(T)) && is_aligned(p.key, 2 * sizeof(T)) && p.dim % 2 == 0 &&
         p.x_stride_batch % 2 == 0 && p.x_stride_token % 2 == 0;
}

template <class T>
Status run(const PrefixRowsParams& p, float* workspace, Stream stream) {
  const ExactParts parts(p);
  float* const q = workspace + parts.q;
  float* const absorbed = workspace + parts.absorbed;
  float* const scores = workspace + parts.scores;
  float* const pooled = workspace + parts.pooled;
  const auto divided = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t rows = p.batch * p.num_prefix, slices = divided(p.dim, kSlice);
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const bool aligned = pairs_aligned<T>(p);

  const int64_t row_blocks = row_product_blocks(rows, p.channels);
  Status status = launch_blocks(query_kernel<T>, row_blocks, kProductWarps, 0, stream, p, q);
  if (status != Status::kOk) return status;
  status =
      launch_blocks(aligned ? absorb_kernel<T, true> : absorb_kernel<T, false>,
                    slices * p.num_heads * divided(rows, kRowsTogether), kProductWarps,
                    kProductWarps * kRowsTogether * kWarp * sizeof(float2), stream, p, q, absorbed);
  if (status != Status::kOk) return status;
  const int64_t score_warps =
      p.batch * divided(tokens, kScoreTokens) * divided(queries, kScoreQueries);
  status =
      launch_blocks(aligned ? score_kernel<T, true> : score_kernel<T, false>,
                    divided(score_warps, kScoreWarps), kScoreWarps, 0, stream, p, absorbed, scores);
  if (status != Status::kOk) return status;
  status = launch_blocks(aligned ? pool_kernel<T, true> : pool_kernel<T, false>,
                         p.batch * slices * divided(queries, kPoolQueries), kPoolWarps,
                         sizeof(PoolShared), stream, p, scores, pooled);
  if (status != Status::kOk) return status;
  return launch_blocks(exact_rows_kernel<T>, row_blocks, kProductWarps, 0, stream, p, pooled);
}

}  // namespace

int64_t exact_prefix_rows_workspace(const PrefixRowsParams& p) {
  return ExactParts(p).end * static_cast<int64_t>(sizeof(float));
}

Status exact_prefix_rows(const PrefixRowsParams& p, void* workspace, Stream stream) {
  if (p.batch == 0 || p.num_prefix == 0) return Status::kOk;
  if (!valid(p) || workspace == nullptr || p.query == nullptr || p.key == nullptr ||
      p.num_heads < 1 || p.channels % p.num_heads != 0) {
    return Status::kInvalidArgument;
  }
  float* const floats = static_cast<float*>(workspace);
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, floats, stream);
    case DType::kFloat16:
      return run<__half>(p, floats, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, floats, stream);
    case DType::kFloat64:
      break;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cuda
