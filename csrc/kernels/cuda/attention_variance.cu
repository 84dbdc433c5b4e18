// Attention with running statistics of its maps, in two kernels. Shapes:
//   q, k, v, out (B, n_h, N, d_h); lse (B, n_h, N); mean, M2 (n_h, N - skip, N - skip)
//
// attend_kernel: a block owns 64 queries of one (image, head) and walks the keys with a running
// maximum and sum (online softmax), which gives lse and out. fold_kernel: a block owns 64 x 64
// entries of the maps of one head and walks the images of the batch: S = Q K^T again, E = exp(scale
// S - lse), Welford's update of mean and M2 in registers. At the end it merges them into the state,
// which is read and written once per call.
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/attention_variance.h"

namespace dwattn::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr int kMaxHead = 128;

// Blocks per multiprocessor that registers are kept for.
template <int kHead>
constexpr int kAttendBlocks = kHead <= 64 ? 3 : 2;

template <class T>
constexpr int kKeyTile = sizeof(T) == 2 ? 64 : 32;  // fp32 P needs shared memory

// fp32 tiles are too large for a second stage.
template <class T>
constexpr int kFoldStages = sizeof(T) == 2 ? 2 : 1;
constexpr int kFoldKeys = 64;

__host__ __device__ inline int padded_head(const AttentionVarianceParams& p) {
  return (static_cast<int>(p.head_dim) + kHeadStep - 1) / kHeadStep * kHeadStep;
}

template <class T>
DWATTN_DEVICE HeadRows<T> queries_of(const AttentionVarianceParams& p, int64_t image,
                                     int64_t head) {
  return {p.q, image * p.q_stride_batch + head * p.q_stride_head, p.q_stride_token, p.tokens,
          p.head_dim};
}
template <class T>
DWATTN_DEVICE HeadRows<T> keys_of(const AttentionVarianceParams& p, int64_t image, int64_t head) {
  return {p.k, image * p.k_stride_batch + head * p.k_stride_head, p.k_stride_token, p.tokens,
          p.head_dim};
}
template <class T>
DWATTN_DEVICE HeadRows<T> values_of(const AttentionVarianceParams& p, int64_t image, int64_t head) {
  return {p.v, image * p.v_stride_batch + head * p.v_stride_head, p.v_stride_token, p.tokens,
          p.head_dim};
}

// ---- lse and out

// Over the neighbouring threads that share a row.
template <int kSharing>
DWATTN_DEVICE float shared_max(float v) {
#pragma unroll
  for (int step = 1; step < kSharing; step *= 2) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  }
  return v;
}
template <int kSharing>
DWATTN_DEVICE float shared_sum(float v) {
#pragma unroll
  for (int step = 1; step < kSharing; step *= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// The running maximum (of base-2 logits) and sum of the rows of a thread.
template <class S>
struct Softmax {
  float max[S::kRows], sum[S::kRows];  // the sum over this thread's columns only

  DWATTN_DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.0f;
    }
  }

  // Turns the scores of keys that start at `first` into weights relative to the new maximum of row
  // i; returns the factor that brings older weights of the row to it.
  DWATTN_DEVICE float update(S& s, int i, float scale, int first, int tokens) {
    float top = max[i];
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) {
      float& x = s.at(i, j);
      x = first + S::column(j) < tokens ? x * scale : -INFINITY;
      top = fmaxf(top, x);
    }
    top = shared_max<S::kSharing>(top);
    const float factor = exp2f(max[i] - top);
    max[i] = top;
    sum[i] *= factor;
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) {
      float& x = s.at(i, j);
      x = exp2f(x - top);
      sum[i] += x;
    }
    return factor;
  }
};

template <class T, int kHead>
DWATTN_DEVICE void write_attention(const AttentionVarianceParams& p, int64_t image, int64_t head,
                                   int first, const Softmax<Scores<T, kKeyTile<T>>>& softmax,
                                   const Outputs<T, kHead, kKeyTile<T>>& outputs) {
  using S = Scores<T, kKeyTile<T>>;
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const float sum = shared_sum<S::kSharing>(softmax.sum[i]);
    const int token = first + S::row(i);
    if (token >= p.tokens) continue;
    if (threadIdx.x % S::kSharing == 0) {
      p.lse[(image * p.heads + head) * p.tokens + token] = (softmax.max[i] + log2f(sum)) * kLn2;
    }
    if (p.out == nullptr) continue;
    T* const row = static_cast<T*>(p.out) + image * p.out_stride_batch + head * p.out_stride_head +
                   token * p.out_stride_token;
    outputs.write(i, row, static_cast<int>(p.head_dim), 1.0f / sum);
  }
}

template <class T>
size_t attend_shared_bytes(const AttentionVarianceParams& p, size_t scratch) {
  const size_t rows = kQueries + 2 * kKeyTile<T>;
  return (rows * row_stride<T>(padded_head(p)) + scratch) * sizeof(T);
}

template <class T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, kAttendBlocks<kHead>)
    attend_kernel(const AttentionVarianceParams p) {
  constexpr int kKeys = kKeyTile<T>;
  using S = Scores<T, kKeys>;
  const int tokens = static_cast<int>(p.tokens), head_length = padded_head(p);
  const int stride = row_stride<T>(head_length);
  DYN_SHARED(T, q);
  T* const k = q + kQueries * stride;
  T* const v = k + kKeys * stride;
  T* const scratch = v + kKeys * stride;

  const int tiles = (tokens + kQueries - 1) / kQueries;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) / tiles;
  const int64_t image = pair / p.heads, head = pair % p.heads;
  const int first = static_cast<int>(blockIdx.x) % tiles * kQueries;
  const bool with_output = p.out != nullptr;
  const HeadRows<T> keys = keys_of<T>(p, image, head), values = values_of<T>(p, image, head);

  queries_of<T>(p, image, head).stage(q, first, kQueries, head_length);
  keys.stage(k, 0, kKeys, head_length);
  cp_async_commit();
  if (with_output) values.stage(v, 0, kKeys, head_length);
  cp_async_commit();

  S scores;
  Softmax<S> softmax;
  Outputs<T, kHead, kKeys> outputs;
  // Keys of the next tile are copied while this one meets the values, and values of the next tile
  // while it meets the keys.
  for (int key = 0; key < tokens; key += kKeys) {
    const int next = key + kKeys;
    cp_async_wait<1>();
    __syncthreads();
    scores.compute(q, k, head_length);
    __syncthreads();
    if (next < tokens) keys.stage(k, next, kKeys, head_length);
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      outputs.scale(i, softmax.update(scores, i, p.scale * kLog2E, key, tokens));
    }
    outputs.keep(scores, scratch);
    cp_async_wait<1>();
    __syncthreads();
    if (with_output) outputs.add(scores, scratch, v, head_length);
    __syncthreads();
    if (with_output && next < tokens) values.stage(v, next, kKeys, head_length);
    cp_async_commit();
  }
  write_attention<T, kHead>(p, image, head, first, softmax, outputs);
}

// ---- Moments

// Mean and M2 of the entries of a thread over the images so far.
template <class S>
struct Moments {
  float mean[S::kRows][S::kColumns], m2[S::kRows][S::kColumns];

  DWATTN_DEVICE Moments() {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < S::kColumns; ++j) mean[i][j] = m2[i][j] = 0.0f;
    }
  }

  // Adds E of one more image; `share` is 1 / (images with this one). The logits are in base 2.
  DWATTN_DEVICE void add(S& s, const float (&lse)[S::kRows], float scale, float share) {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < S::kColumns; ++j) {
        const float e = exp2f(s.at(i, j) * scale - lse[i]);
        const float deviation = e - mean[i][j];
        mean[i][j] += deviation * share;
        m2[i][j] += deviation * (e - mean[i][j]);
      }
    }
  }
};

// Joins the moments of n more images to those of `count` in the state (Chan's formula).
template <class State>
struct Merge {
  State share, cross;
  bool fresh;  // nothing to read yet

  DWATTN_DEVICE Merge(int64_t count, int64_t n)
      : share(static_cast<State>(n) / static_cast<State>(count + n)),
        cross(static_cast<State>(count) * share),
        fresh(count == 0) {}

  // Returns by how much the new mean differs from the old one.
  DWATTN_DEVICE State mean(State* state, float batch_mean) const {
    const State old = fresh ? State(0) : *state, delta = static_cast<State>(batch_mean) - old;
    *state = old + delta * share;
    return delta;
  }
  DWATTN_DEVICE void m2(State* state, float batch_m2, State delta) const {
    const State old = fresh ? State(0) : *state;
    *state = old + static_cast<State>(batch_m2) + delta * delta * cross;
  }
};

template <class State, class S>
DWATTN_DEVICE void merge_moments(const AttentionVarianceParams& p, const Moments<S>& moments,
                                 int64_t head, int first_query, int first_key) {
  const Merge<State> merge(p.count, p.batch);
  const int tokens = static_cast<int>(p.tokens), skip = static_cast<int>(p.skip);
  const int64_t size = tokens - skip;
  State* const means = static_cast<State*>(p.mean);
  State* const m2s = static_cast<State*>(p.m2);
  State* const prefix = static_cast<State*>(p.prefix_mean);
#pragma unroll
  for (int i = 0; i < S::kRows; ++i) {
    const int query = first_query + S::row(i);
    if (query >= tokens) continue;
    const int64_t row = head * size + query - skip;
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) {
      const int key = first_key + S::column(j);
      if (key >= tokens) continue;
      if (key < skip) {  // only met where the prefix is wanted
        merge.mean(prefix + row * skip + key, moments.mean[i][j]);
        continue;
      }
      const int64_t entry = row * size + key - skip;
      const State delta = merge.mean(means + entry, moments.mean[i][j]);
      merge.m2(m2s + entry, moments.m2[i][j], delta);
    }
  }
}

// The tiles of the maps: queries start after the skipped ones, keys too unless their mean is
// wanted.
struct FoldTiles {
  int first_key, across, down;

  __host__ __device__ explicit FoldTiles(const AttentionVarianceParams& p)
      : first_key(p.prefix_mean != nullptr ? 0 : static_cast<int>(p.skip)),
        across((static_cast<int>(p.tokens) - first_key + kFoldKeys - 1) / kFoldKeys),
        down((static_cast<int>(p.tokens - p.skip) + kQueries - 1) / kQueries) {}
};

template <class T>
size_t fold_shared_bytes(const AttentionVarianceParams& p) {
  const size_t rows = kFoldStages<T> * (kQueries + kFoldKeys);
  return rows * row_stride<T>(padded_head(p)) * sizeof(T);
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads) fold_kernel(const AttentionVarianceParams p) {
  using S = Scores<T, kFoldKeys>;
  constexpr bool kAhead = kFoldStages<T> == 2;
  const int head_length = padded_head(p), stride = row_stride<T>(head_length);
  const int stage_size = (kQueries + kFoldKeys) * stride;
  DYN_SHARED(T, stages);

  const FoldTiles tiles(p);
  const int index = static_cast<int>(blockIdx.x);
  const int first_key = tiles.first_key + index % tiles.across * kFoldKeys;
  const int first_query = static_cast<int>(p.skip) + index / tiles.across % tiles.down * kQueries;
  const int64_t head = index / (tiles.across * tiles.down);

  const auto stage = [&](int image) {
    T* const q = stages + (kAhead && image % 2 == 1 ? stage_size : 0);
    queries_of<T>(p, image, head).stage(q, first_query, kQueries, head_length);
    keys_of<T>(p, image, head).stage(q + kQueries * stride, first_key, kFoldKeys, head_length);
    cp_async_commit();
  };

  S scores;
  Moments<S> moments;
  const int batch = static_cast<int>(p.batch);
  if (kAhead) stage(0);
  for (int image = 0; image < batch; ++image) {
    const int staged = kAhead ? image + 1 : image;
    if (staged < batch) {
      stage(staged);
    } else {
      cp_async_commit();
    }
    float lse[S::kRows];
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      const int query = first_query + S::row(i);
      const float* const row = p.lse + (image * p.heads + head) * p.tokens;
      lse[i] = query < p.tokens ? row[query] * kLog2E : 0.0f;
    }
    cp_async_wait<kFoldStages<T> - 1>();
    __syncthreads();
    const T* const q = stages + (kAhead && image % 2 == 1 ? stage_size : 0);
    scores.compute(q, q + kQueries * stride, head_length);
    __syncthreads();  // the stage may be overwritten
    moments.add(scores, lse, p.scale * kLog2E, 1.0f / static_cast<float>(image + 1));
  }
  if (p.state_dtype == DType::kFloat64) {
    merge_moments<double>(p, moments, head, first_query, first_key);
  } else {
    merge_moments<float>(p, moments, head, first_query, first_key);
  }
}

// ---- Launches

bool valid(const AttentionVarianceParams& p) {
  const bool sizes = p.heads >= 1 && p.heads < (1 << 20) && p.tokens >= 1 && p.tokens < (1 << 20) &&
                     p.head_dim >= 1 && p.head_dim <= kMaxHead && p.batch >= 1 &&
                     p.batch < (1 << 24);
  const bool pointers =
      p.q != nullptr && p.k != nullptr && p.lse != nullptr && (p.out == nullptr || p.v != nullptr);
  const bool state =
      p.mean == nullptr || (p.m2 != nullptr && p.count >= 0 && p.skip >= 0 && p.skip < p.tokens);
  return sizes && pointers && state;
}

template <class T, int kHead>
Status attend(const AttentionVarianceParams& p, Stream stream) {
  const int64_t blocks = p.batch * p.heads * ((p.tokens + kQueries - 1) / kQueries);
  if (blocks >= int64_t{1} << 31) return Status::kInvalidArgument;
  return launch(attend_kernel<T, kHead>, dim3(static_cast<unsigned>(blocks)),
                dim3(kAttentionThreads),
                attend_shared_bytes<T>(p, Outputs<T, kHead, kKeyTile<T>>::kScratch), stream, p);
}

template <class T>
Status fold(const AttentionVarianceParams& p, Stream stream) {
  const FoldTiles tiles(p);
  const int64_t blocks = p.heads * tiles.across * tiles.down;
  if (blocks >= int64_t{1} << 31) return Status::kInvalidArgument;
  return launch(fold_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads),
                fold_shared_bytes<T>(p), stream, p);
}

template <class T>
Status run(const AttentionVarianceParams& p, Stream stream) {
  const Status status =
      p.head_dim <= 64 ? attend<T, 64>(p, stream) : attend<T, kMaxHead>(p, stream);
  if (status != Status::kOk || p.mean == nullptr) return status;
  return fold<T>(p, stream);
}

}  // namespace

Status attention_variance(const AttentionVarianceParams& p, Stream stream) {
  if (p.batch == 0) return Status::kOk;
  if (!valid(p)) return Status::kInvalidArgument;
  if (p.mean != nullptr && p.state_dtype != DType::kFloat32 && p.state_dtype != DType::kFloat64) {
    return Status::kUnsupportedDType;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, stream);
    case DType::kFloat16:
      return run<__half>(p, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, stream);
    default:
      return Status::kUnsupportedDType;
  }
}

}  // namespace dwattn::cuda
