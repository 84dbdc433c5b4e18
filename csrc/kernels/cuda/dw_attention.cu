// Y = aggregation of x Wv^T + bv in one kernel. Shapes:
//   x (B, P + H*W, D), Wv (C, D), bv (C), K (C, 3, 3), ctx (B, C) -> Y (B, H*W, C)
//
// A block of threads owns 64 channels and a rectangle of patches of one image (dw_window.h). It walks
// the tokens of the rectangle and its border in row-major order, 128 at a time: a tile of V is
// accumulated over all of D from a pipeline of asynchronous copies, rounded, and put into a ring in
// shared memory that holds this tile and the two rows and two tokens before it. Then every output whose
// lower neighbours have arrived is computed from the ring and written. So V is computed once, except
// for the borders between rectangles, and the copies for the next tile run under the aggregation.
#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/dw_window.h"
#include "kernels/cuda/pairs.cuh"
#include "kernels/cuda/tile_product.cuh"

namespace dwattn::cuda {
namespace {

static_assert(kTileColumns == kSlice, "a tile is as wide as the channels of a block");

template <class T>
constexpr int kStages = sizeof(T) == 2 ? 4 : 3;

// Rows of the ring are padded against bank conflicts when the accumulators are put into it.
template <class T>
constexpr int kRingStride = kSlice + (sizeof(T) == 2 ? 8 : 4);

constexpr int kCoefficientRows = 11;  // nine taps, ctx, bv

__host__ __device__ constexpr int ring_rows(int window_width) { return kTileRows + 2 * (window_width + 1); }

template <class T>
constexpr size_t shared_bytes(int window_width) {
  return kStages<T> * kStageBytes + kCoefficientRows * kSlice * sizeof(float) +
         ring_rows(window_width) * kRingStride<T> * sizeof(T);
}

// What every listed architecture grants a block; sm_87 and sm_80 run two such blocks at a time as
// long as they stay below 81 KB, which 16-bit elements do up to a width of 42.
constexpr size_t kMostShared = 99 << 10;

template <class T>
constexpr int widest_window() {
  int width = 1;
  while (shared_bytes<T>(width + 1) <= kMostShared) ++width;
  return width;
}

// The part of an image that a block projects (its window) and the part that it writes.
struct Window {
  int64_t image;
  int64_t channel;         // first of the slice
  int top, left;           // of the window in the grid
  int height, width;       // of the window
  int first_row, end_row;  // written, in rows of the window
  int first_column, end_column;

  DWATTN_DEVICE Window(const DwAttentionParams& p, const DwPlan& plan) {
    unsigned index = blockIdx.x;
    channel = static_cast<int64_t>(index % plan.slices) * kSlice;
    index /= plan.slices;
    const int column = static_cast<int>(index % plan.columns_count) * plan.columns;
    index /= plan.columns_count;
    const int row = static_cast<int>(index % plan.bands) * plan.rows;
    image = index / plan.bands;
    cut(row, plan.rows, static_cast<int>(p.height), top, height, first_row, end_row);
    cut(column, plan.columns, static_cast<int>(p.width), left, width, first_column, end_column);
  }

  DWATTN_DEVICE int tokens() const { return height * width; }

  // Index in the grid of a token of the window.
  DWATTN_DEVICE int64_t patch(const DwAttentionParams& p, int row, int column) const {
    return (top + row) * p.width + left + column;
  }

 private:
  static DWATTN_DEVICE void cut(int begin, int size, int extent, int& start, int& length,
                                int& first, int& end) {
    const int stop = min(begin + size, extent);
    start = max(begin - 1, 0);
    length = min(stop + 1, extent) - start;
    first = begin - start;
    end = stop - start;
  }
};

// Fills the stages: the inner dimension of tile 0 chunk by chunk, then that of tile 1, and so on.
template <class T, bool kAligned>
class Loader {
 public:
  DWATTN_DEVICE Loader(const DwAttentionParams& p, const Window& window) : p_(p), window_(window) {
    x_ = static_cast<const T*>(p.x) + window.image * p.x_stride_batch;
    wv_ = static_cast<const T*>(p.wv) + window.channel * p.wv_stride;
  }

  DWATTN_DEVICE void next(unsigned char* stage) {
    if (depth_ == 0) find_rows();
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    const int64_t from = depth_ + chunk * kChunk<T>;
    const int64_t left = p_.dim - from;
#pragma unroll
    for (int i = 0; i < kRowsOfX; ++i) {
      const bool exists = x_rows_[i] != nullptr && left > 0;
      load_chunk<T, kAligned>(stage + chunk_offset(row + 32 * i, chunk),
                              exists ? x_rows_[i] + from : x_, exists ? left : 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsOfW; ++i) {
      const int channel = row + 32 * i;
      const bool exists = window_.channel + channel < p_.channels && left > 0;
      load_chunk<T, kAligned>(stage + kColumnsOfStage + chunk_offset(channel, chunk),
                              exists ? wv_ + channel * p_.wv_stride + from : wv_,
                              exists ? left : 0);
    }
    depth_ += kStageDepth<T>;
    if (depth_ >= p_.dim) {
      depth_ = 0;
      token_ += kTileRows;
    }
  }

 private:
  static constexpr int kRowsOfX = kTileRows * 4 / kTileThreads;
  static constexpr int kRowsOfW = kTileColumns * 4 / kTileThreads;

  DWATTN_DEVICE void find_rows() {
#pragma unroll
    for (int i = 0; i < kRowsOfX; ++i) {
      const int token = token_ + threadIdx.x / 4 + 32 * i;
      const int row = token / window_.width;
      const int64_t patch = window_.patch(p_, row, token - row * window_.width);
      x_rows_[i] =
          token < window_.tokens() ? x_ + (p_.num_prefix + patch) * p_.x_stride_token : nullptr;
    }
  }

  const DwAttentionParams& p_;
  const Window& window_;
  const T* x_;
  const T* wv_;
  const T* x_rows_[kRowsOfX];  // null below the window
  int64_t depth_ = 0;
  int token_ = 0;
};

// The last tokens of V. Token t of the window lies in row t % rows.
template <class T>
struct Ring {
  T* values;
  int rows;

  DWATTN_DEVICE T* at(int row) const { return values + row * kRingStride<T>; }
  // The row `step` tokens after (or before) a row, for less than one turn.
  DWATTN_DEVICE int moved(int row, int step) const {
    const int sum = row + step;
    return sum < 0 ? sum + rows : sum >= rows ? sum - rows : sum;
  }
};

// The three values of V in a column of the stencil; zero outside the window.
template <class T>
struct Column {
  float2 v[3];

  DWATTN_DEVICE void load(const Ring<T>& ring, const Window& window, int ring_row, int row) {
    const int pair = threadIdx.x % kWarp * 2;
    const int width = window.width;
    v[0] = row > 0 ? load_whole_pair(ring.at(ring.moved(ring_row, -width)) + pair) : zero2();
    v[1] = load_whole_pair(ring.at(ring_row) + pair);
    v[2] = row + 1 < window.height ? load_whole_pair(ring.at(ring.moved(ring_row, width)) + pair)
                                   : zero2();
  }
  DWATTN_DEVICE void clear() { v[0] = v[1] = v[2] = zero2(); }
};

DWATTN_DEVICE float2 coefficient(const float* coefficients, int row) {
  return *reinterpret_cast<const float2*>(coefficients + row * kSlice + threadIdx.x % kWarp * 2);
}

// Writes the outputs of the window's tokens first..last-1: a run of tokens for each warp, a pair of
// channels for each lane, sliding along the rows.
template <class T, bool kAligned>
DWATTN_DEVICE void aggregate(const DwAttentionParams& p, const Window& window, const Ring<T>& ring,
                             const float* coefficients, int first, int last) {
  constexpr int kWarps = kTileThreads / kWarp;
  const int share = (last - first + kWarps - 1) / kWarps;
  const int begin = first + static_cast<int>(threadIdx.x) / kWarp * share;
  const int end = min(begin + share, last);
  const int64_t channel = window.channel + threadIdx.x % kWarp * 2;
  const int64_t valid = p.channels - channel;
  T* const y = static_cast<T*>(p.y) + window.image * p.y_stride_batch + channel;

  float2 taps[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) taps[i] = coefficient(coefficients, i);
  const float2 ctx = coefficient(coefficients, 9);

  Column<T> left, middle, right;
  int row = begin / window.width, column = begin - row * window.width;
  int ring_row = begin % ring.rows;
  bool fresh = true;
  for (int token = begin; token < end; ++token) {
    if (fresh) {
      if (column > 0) {
        left.load(ring, window, ring.moved(ring_row, -1), row);
      } else {
        left.clear();
      }
      middle.load(ring, window, ring_row, row);
      fresh = false;
    }
    const int next = ring.moved(ring_row, 1);
    if (column + 1 < window.width) {
      right.load(ring, window, next, row);
    } else {
      right.clear();
    }
    if (column >= window.first_column && column < window.end_column) {
      float2 sum = ctx;
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        sum = fma2(taps[3 * r], left.v[r], sum);
        sum = fma2(taps[3 * r + 1], middle.v[r], sum);
        sum = fma2(taps[3 * r + 2], right.v[r], sum);
      }
      store_pair<T, kAligned>(y + window.patch(p, row, column) * p.y_stride_token, sum, valid);
    }
    left = middle;
    middle = right;
    ring_row = next;
    if (++column == window.width) {
      column = 0;
      ++row;
      fresh = true;
    }
  }
}

DWATTN_DEVICE void load_coefficients(const DwAttentionParams& p, const float* ctx,
                                     const Window& window, float* coefficients) {
  for (int i = threadIdx.x; i < kCoefficientRows * kSlice; i += kTileThreads) {
    const int row = i / kSlice;
    const int64_t channel = window.channel + i % kSlice;
    float value = 0.0f;
    if (channel < p.channels) {
      if (row < 9) {
        value = p.kernel[channel * 9 + row];
      } else if (row == 9) {
        value = ctx != nullptr ? ctx[window.image * p.channels + channel] : 0.0f;
      } else {
        value = p.bv != nullptr ? p.bv[channel] : 0.0f;
      }
    }
    coefficients[i] = value;
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kTileThreads, 2)
    dw_attention_kernel(const DwAttentionParams p, const DwPlan plan, const float* ctx) {
  DYN_SHARED(unsigned char, shared);
  float* const coefficients = reinterpret_cast<float*>(shared + kStages<T> * kStageBytes);
  const Window window(p, plan);
  const Ring<T> ring{reinterpret_cast<T*>(coefficients + kCoefficientRows * kSlice),
                     ring_rows(window.width)};
  load_coefficients(p, ctx, window, coefficients);

  const int tokens = window.tokens();
  const int tiles = (tokens + kTileRows - 1) / kTileRows;
  const int depth_steps = max(1, static_cast<int>((p.dim + kStageDepth<T> - 1) / kStageDepth<T>));
  const int64_t steps = static_cast<int64_t>(tiles) * depth_steps;
  Loader<T, kAligned> loader(p, window);
  for (int step = 0; step < kStages<T> - 1; ++step) {
    if (step < steps) loader.next(shared + step * kStageBytes);
    cp_async_commit();
  }

  const int first_output = window.first_row * window.width;
  const int end_output = window.end_row * window.width;
  TileProduct<T> product;
  int stage = 0;
  int64_t step = 0;
  int written = first_output;  // outputs before this token are done
  int ring_row = 0;            // of the tile's first token
  for (int tile = 0; tile < tiles; ++tile) {
    product.clear();
    for (int depth = 0; depth < depth_steps; ++depth, ++step) {
      cp_async_wait<kStages<T> - 2>();
      __syncthreads();  // this step's stage is complete; the previous one and the ring are free
      const int ahead = stage == 0 ? kStages<T> - 1 : stage - 1;
      if (step + kStages<T> - 1 < steps) loader.next(shared + ahead * kStageBytes);
      cp_async_commit();
      product.add(shared + stage * kStageBytes);
      stage = stage + 1 == kStages<T> ? 0 : stage + 1;
    }
    const float* const bias = coefficients + 10 * kSlice;
    product.for_each_pair([&](int row, int column, float v, float w) {
      store_whole_pair(ring.at(ring.moved(ring_row, row)) + column,
                       make_float2(v + bias[column], w + bias[column + 1]));
    });
    __syncthreads();  // the tile is in the ring
    const int filled = min((tile + 1) * kTileRows, tokens);
    const int complete = filled == tokens ? tokens : filled - window.width - 1;
    const int end = min(complete, end_output);
    if (end > written) {
      aggregate<T, kAligned>(p, window, ring, coefficients, written, end);
      written = end;
    }
    ring_row = ring.moved(ring_row, kTileRows);
  }
}

template <class T>
bool can_copy_chunks(const DwAttentionParams& p) {
  constexpr int64_t n = kChunk<T>;
  return is_aligned(p.x, 16) && is_aligned(p.wv, 16) && is_aligned(p.y, 2 * sizeof(T)) &&
         p.dim % n == 0 && p.x_stride_batch % n == 0 && p.x_stride_token % n == 0 &&
         p.wv_stride % n == 0 && p.y_stride_batch % 2 == 0 && p.y_stride_token % 2 == 0 &&
         p.channels % 2 == 0;
}

template <class T>
Status run(const DwAttentionParams& p, const float* ctx, Stream stream) {
  constexpr int kBlocksPerMultiprocessor = 2;
  constexpr int kWidest = widest_window<T>();
  static_assert(kWidest >= 3, "room for a column and its neighbours");
  const DwPlan plan = plan_dw(p.batch, p.height, p.width, p.channels, kWidest, kTileRows, kSlice,
                              kBlocksPerMultiprocessor * multiprocessors());
  const int64_t blocks = p.batch * plan.slices * plan.bands * plan.columns_count;
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  const auto kernel =
      can_copy_chunks<T>(p) ? dw_attention_kernel<T, true> : dw_attention_kernel<T, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads),
                shared_bytes<T>(reach(plan.columns, p.width)), stream, p, plan, ctx);
}

bool valid(const DwAttentionParams& p) {
  constexpr int64_t kMostPatches = INT32_MAX / 2;  // tokens of an image are counted in int
  return p.height >= 1 && p.width >= 1 && p.num_prefix >= 0 && p.dim >= 0 && p.channels >= 0 &&
         p.batch >= 0 && p.height <= kMostPatches / p.width && p.dim <= kMostPatches &&
         p.kernel != nullptr && p.y != nullptr &&
         (p.dim == 0 || (p.x != nullptr && p.wv != nullptr));
}

bool has_context(const DwAttentionParams& p) {
  return p.mu != nullptr || p.beta != nullptr || (p.kappa != nullptr && p.num_prefix > 0);
}

// ctx first, then the means of x from a 16-byte boundary.
int64_t context_floats(const DwAttentionParams& p) { return (p.batch * p.channels + 3) / 4 * 4; }

}  // namespace

int64_t dw_attention_workspace(const DwAttentionParams& p) {
  if (!has_context(p)) return 0;
  const int64_t means = p.mu != nullptr ? p.batch * p.dim : 0;
  return (context_floats(p) + means) * static_cast<int64_t>(sizeof(float));
}

Status dw_attention(const DwAttentionParams& p, void* workspace, Stream stream) {
  if (p.batch == 0 || p.channels == 0) return Status::kOk;
  if (!valid(p)) return Status::kInvalidArgument;
  float* ctx = nullptr;
  if (has_context(p)) {
    if (workspace == nullptr) return Status::kInvalidArgument;
    ctx = static_cast<float*>(workspace);
    const Status status = dw_context(p, ctx, ctx + context_floats(p), stream);
    if (status != Status::kOk) return status;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, ctx, stream);
    case DType::kFloat16:
      return run<__half>(p, ctx, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, ctx, stream);
    case DType::kFloat64:
      break;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cuda
