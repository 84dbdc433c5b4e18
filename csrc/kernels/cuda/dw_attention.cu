// Y = aggregation of x Wv^T + bv in one kernel. Shapes:
//   x (B, P + H*W, D), Wv (C, D), bv (C), K (C, 3, 3), ctx (B, C) -> Y (B, H*W, C)
//
// A block of threads owns 64 channels and a rectangle of patches of one image (dw_window.h). It
// walks the tokens of the rectangle and its border in row-major order, 128 at a time: a tile of V
// is accumulated over all of D from a pipeline of asynchronous copies, rounded, and put into shared
// memory behind the two rows and two tokens that came before it. Then every output whose lower
// neighbours have arrived is computed from there and written. So V is computed once, except for the
// borders between rectangles, and the copies for the next tile run under the aggregation.
#include "kernels/cuda/dw_attention_sm90.h"
#include "kernels/cuda/dw_lines.cuh"
#include "kernels/cuda/tile_product.cuh"

namespace dwattn::cuda {
namespace {

static_assert(kTileColumns == kSlice, "a tile is as wide as the channels of a block");

template <class T>
constexpr int kStages = sizeof(T) == 2 ? 4 : 3;

// Rows of V in shared memory are padded against bank conflicts when the accumulators are put there,
// in the pattern of the tensor cores or in that of the FMAs.
template <class T>
constexpr int kLineStride = kSlice + (std::is_same<T, float>::value ? 4 : 8);

constexpr int kCoefficientRows = 11;  // nine taps, ctx, bv

template <class T>
constexpr size_t shared_bytes(int window_width) {
  return kStages<T> * kStageBytes + kCoefficientRows * kSlice * sizeof(float) +
         (1 + history(window_width) + kTileRows) * kLineStride<T> * sizeof(T);
}

// What every listed architecture grants a block; sm_87 and sm_80 run two such blocks at a time as
// long as they stay below 81 KB, which 16-bit elements do up to a width of 42.
constexpr size_t kMostShared = 99 << 10;

// The history must also fit into one tile, out of which it is copied.
template <class T>
constexpr int widest_window() {
  int width = 1;
  while (shared_bytes<T>(width + 1) <= kMostShared && history(width + 1) <= kTileRows) ++width;
  return width;
}

// Fills the stages: the inner dimension of tile 0 chunk by chunk, then that of tile 1, and so on. A
// thread copies the same chunk of every 32nd row.
template <class T, bool kAligned>
class Loader {
 public:
  DWATTN_DEVICE Loader(const DwAttentionParams& p, const Window& window)
      : p_(p), window_(window), row_(threadIdx.x / 4), chunk_(threadIdx.x % 4 * kChunk<T>) {
    x_ = static_cast<const T*>(p.x) + window.image * p.x_stride_batch;
    const int64_t channel = window.channel + row_;
    wv_ = static_cast<const T*>(p.wv) + channel * p.wv_stride + chunk_;
    wv_step_ = kRowStep * p.wv_stride;
    wv_rows_ = p.channels > channel
                   ? static_cast<int>(least((p.channels - channel + kRowStep - 1) / kRowStep, 2))
                   : 0;
    offset_ = chunk_offset(row_, threadIdx.x % 4);
  }

  DWATTN_DEVICE void next(unsigned char* stage) {
    if (depth_ == 0) find_rows();
    const int left = static_cast<int>(p_.dim) - depth_ - chunk_;
    unsigned char* const to = stage + offset_;
#pragma unroll
    for (int i = 0; i < kRowsOfX; ++i) {
      load_chunk<T, kAligned>(to + i * 2 * kSixteenRows, x_rows_[i] + depth_,
                              i < x_count_ ? left : 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsOfW; ++i) {
      load_chunk<T, kAligned>(to + kColumnsOfStage + i * 2 * kSixteenRows,
                              wv_ + i * wv_step_ + depth_, i < wv_rows_ ? left : 0);
    }
    depth_ += kStageDepth<T>;
    if (depth_ >= p_.dim) {
      depth_ = 0;
      token_ += kTileRows;
    }
  }

 private:
  static constexpr int kRowStep = kTileThreads / 4;
  static constexpr int kRowsOfX = kTileRows / kRowStep;
  static constexpr int kRowsOfW = kTileColumns / kRowStep;

  // The rows of x in this tile; those below the window are not read.
  DWATTN_DEVICE void find_rows() {
    const unsigned width = window_.width;
    const int rest = window_.tokens() - token_ - row_;
    x_count_ = rest > 0 ? (rest + kRowStep - 1) / kRowStep : 0;
#pragma unroll
    for (int i = 0; i < kRowsOfX; ++i) {
      const unsigned token = i < x_count_ ? token_ + row_ + kRowStep * i : 0;
      const unsigned row = token / width;
      const int64_t patch = window_.patch(p_, row, token - row * width);
      x_rows_[i] = x_ + (p_.num_prefix + patch) * p_.x_stride_token + chunk_;
    }
  }

  const DwAttentionParams& p_;
  const Window& window_;
  const int row_, chunk_;  // of this thread
  unsigned offset_;        // of both in a stage
  const T* x_;
  const T* wv_;
  int64_t wv_step_;
  int wv_rows_, x_count_ = 0;  // how many of this thread's rows exist
  const T* x_rows_[kRowsOfX];
  int depth_ = 0;
  int token_ = 0;
};

DWATTN_DEVICE float2 coefficient(const float* coefficients, int row) {
  return *reinterpret_cast<const float2*>(coefficients + row * kSlice + threadIdx.x % kWarp * 2);
}

// Writes the outputs of the window's tokens first..last-1, of which `tile` is the first in the
// tile: a run of tokens for each warp, a pair of channels for each lane.
template <class T, bool kAligned>
DWATTN_DEVICE void aggregate_runs(const DwAttentionParams& p, const Window& window,
                                  const Lines<T, kLineStride<T>>& lines, const float* coefficients,
                                  int tile, int first, int last) {
  constexpr int kWarps = kTileThreads / kWarp;
  const int share = (last - first + kWarps - 1) / kWarps;
  const int begin = first + static_cast<int>(threadIdx.x) / kWarp * share;
  PairCoefficients k;
#pragma unroll
  for (int i = 0; i < 9; ++i) k.taps[i] = coefficient(coefficients, i);
  k.ctx = coefficient(coefficients, 9);
  aggregate<T, kAligned>(p, window, lines, k, threadIdx.x % kWarp * 2, tile, begin,
                         min(begin + share, last));
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
  const Window window(p, plan, blockIdx.x, kSlice);
  const Lines<T, kLineStride<T>> lines{
      reinterpret_cast<T*>(coefficients + kCoefficientRows * kSlice), history(window.width)};

  const int tokens = window.tokens();
  const int tiles = (tokens + kTileRows - 1) / kTileRows;
  const int depth_steps = max(1, (static_cast<int>(p.dim) + kStageDepth<T> - 1) / kStageDepth<T>);
  int64_t to_load = static_cast<int64_t>(tiles) * depth_steps;
  Loader<T, kAligned> loader(p, window);
  for (int stage = 0; stage < kStages<T> - 1; ++stage) {
    if (to_load-- > 0) loader.next(shared + stage * kStageBytes);
    cp_async_commit();
  }
  load_coefficients(p, ctx, window, coefficients);
  lines.clear(threadIdx.x, kTileThreads);

  const int end_output = window.end_row * window.width;
  int written = window.first_row * window.width;  // outputs before this token are done
  TileProduct<T> product;
  unsigned char* stage = shared;
  unsigned char* ahead = shared + (kStages<T> - 1) * kStageBytes;  // to be filled next
  unsigned char* const last_stage = ahead;
  for (int tile = 0; tile < tokens; tile += kTileRows) {
    product.clear();
    const bool reaches = product.reaches(tokens - tile);
    for (int depth = 0; depth < depth_steps; ++depth) {
      cp_async_wait<kStages<T> - 2>();
      __syncthreads();  // this step's stage is complete, the previous one is free
      if (to_load-- > 0) loader.next(ahead);
      cp_async_commit();
      if (reaches) product.add(stage);
      ahead = stage;
      stage = stage == last_stage ? shared : stage + kStageBytes;
    }
    const float* const bias = coefficients + 10 * kSlice;
    product.for_each_pair([&](int row, int column, float v, float w) {
      store_whole_pair(lines.at(lines.history + row) + column,
                       make_float2(v + bias[column], w + bias[column + 1]));
    });
    __syncthreads();  // the tile is complete
    const bool last = tile + kTileRows >= tokens;
    const int complete = last ? tokens : tile + kTileRows - window.width - 1;
    const int end = min(complete, end_output);
    if (end > written) {
      aggregate_runs<T, kAligned>(p, window, lines, coefficients, tile, written, end);
      written = end;
    }
    if (last) break;
    __syncthreads();  // nobody reads the history any more
    lines.advance(kTileRows, threadIdx.x, kTileThreads);
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
  if (hopper_wanted()) {
    const Status status = dw_attention_sm90(p, ctx, stream);
    if (status != Status::kUnsupportedIsa) return status;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return p.tf32 ? run<Tf32>(p, ctx, stream) : run<float>(p, ctx, stream);
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
