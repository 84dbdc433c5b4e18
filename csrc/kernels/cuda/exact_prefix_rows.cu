// Exact prefix rows in five kernels. A "query" is one prefix token seen by one head, numbered
// t * heads + h; an image has Q of them. Shapes, all in the workspace and fp32:
//   q (B, P, Cp), absorbed (B, Q, D), scores (B, Q, N), pooled (B, Q, D)
// For the tensor cores `absorbed` is kept as two rows of T (AbsorbedPair), in the same place.
#include "kernels/cuda/prefix_attention.cuh"
#include "kernels/cuda/prefix_attention_tensor.cuh"

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
// With kSplit it stores a row of T and the row of what that lost by rounding (AbsorbedPair).
template <class T, bool kAligned, bool kSplit>
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
  const int64_t query = (first + warp) * p.num_heads + head;
  if constexpr (kSplit) {
    T* const high = reinterpret_cast<T*>(absorbed) + 2 * query * p.dim + feature;
    const AbsorbedPair<T> pair(total.x, total.y);
    if (valid > 0) *reinterpret_cast<uint32_t*>(high) = pair.high;
    if (valid > 0) *reinterpret_cast<uint32_t*>(high + p.dim) = pair.low;
  } else {
    store_pair<float, kAligned>(absorbed + query * p.dim + feature, total, valid);
  }
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

constexpr int64_t divided(int64_t size, int64_t part) { return (size + part - 1) / part; }

template <class T>
Status absorb(const PrefixRowsParams& p, bool tensor, const float* q, float* absorbed,
              Stream stream) {
  auto kernel =
      pairs_aligned<T>(p) ? absorb_kernel<T, true, false> : absorb_kernel<T, false, false>;
  if constexpr (sizeof(T) == 2) {
    if (tensor) kernel = absorb_kernel<T, true, true>;
  }
  const int64_t blocks =
      divided(p.dim, kSlice) * p.num_heads * divided(p.batch * p.num_prefix, kRowsTogether);
  return launch_blocks(kernel, blocks, kProductWarps,
                       kProductWarps * kRowsTogether * kWarp * sizeof(float2), stream, p, q,
                       absorbed);
}

// scores and pooled on FMA.
template <class T>
Status attend(const PrefixRowsParams& p, const float* absorbed, float* scores, float* pooled,
              Stream stream) {
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const bool aligned = pairs_aligned<T>(p);
  const int64_t warps = p.batch * divided(tokens, kScoreTokens) * divided(queries, kScoreQueries);
  const Status status =
      launch_blocks(aligned ? score_kernel<T, true> : score_kernel<T, false>,
                    divided(warps, kScoreWarps), kScoreWarps, 0, stream, p, absorbed, scores);
  if (status != Status::kOk) return status;
  return launch_blocks(aligned ? pool_kernel<T, true> : pool_kernel<T, false>,
                       p.batch * divided(p.dim, kSlice) * divided(queries, kPoolQueries),
                       kPoolWarps, sizeof(PoolShared), stream, p, scores, pooled);
}

// The same on tensor cores.
template <class T>
Status attend_tensor(const PrefixRowsParams& p, const float* absorbed, float* scores, float* pooled,
                     Stream stream) {
  const int64_t queries = p.num_prefix * p.num_heads, tokens = p.num_prefix + p.patches;
  const int64_t groups = p.batch * divided(queries, kTensorQueries);
  const int64_t warps = groups * divided(tokens, kTensorTokens);
  const Status status =
      launch_blocks(score_tensor_kernel<T>, divided(warps, kScoreWarps), kScoreWarps, 0, stream, p,
                    reinterpret_cast<const T*>(absorbed), scores);
  if (status != Status::kOk) return status;
  return launch_blocks(pool_tensor_kernel<T>, groups * divided(p.dim, kTensorFeatures),
                       kTensorWarps, sizeof(TensorPoolShared), stream, p, scores, pooled);
}

template <class T>
Status run(const PrefixRowsParams& p, float* workspace, Stream stream) {
  const ExactParts parts(p);
  float* const q = workspace + parts.q;
  float* const absorbed = workspace + parts.absorbed;
  float* const scores = workspace + parts.scores;
  float* const pooled = workspace + parts.pooled;
  const bool tensor = sizeof(T) == 2 && is_aligned(p.key, 2 * sizeof(T)) &&
                      vectors_aligned<T>(p.x, p.x_stride_batch, p.x_stride_token, p.dim);

  const int64_t blocks = row_product_blocks(p.batch * p.num_prefix, p.channels);
  Status status = launch_blocks(query_kernel<T>, blocks, kProductWarps, 0, stream, p, q);
  if (status == Status::kOk) status = absorb<T>(p, tensor, q, absorbed, stream);
  if (status != Status::kOk) return status;
  if constexpr (sizeof(T) == 2) {
    status = tensor ? attend_tensor<T>(p, absorbed, scores, pooled, stream)
                    : attend<T>(p, absorbed, scores, pooled, stream);
  } else {
    status = attend<T>(p, absorbed, scores, pooled, stream);
  }
  if (status != Status::kOk) return status;
  return launch_blocks(exact_rows_kernel<T>, blocks, kProductWarps, 0, stream, p, pooled);
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
