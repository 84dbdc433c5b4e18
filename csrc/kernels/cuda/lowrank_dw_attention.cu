// lowrank_dw_attention: a block owns tile_height x tile_width patches of one image (a "band").
//   1. U (band and a border of one patch, r channels) = x A^T + a_bias, into shared memory
//   2. U' = aggregation of U, written over it
//   3. out (band, D_out) = epilogue(U' B^T)
// x, A and B are streamed through three stages behind U.
//
// U of patch (y, x) lies in slot (y - y0 + 2, x - x0 + 1) of (tile_height + 3) x (tile_width + 2)
// slots, and U' of band patch (i, j) in slot (i, j + 1): two rows higher, where nothing is read any
// more.
#include "kernels/cuda/band_product.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/lowrank_dw_attention.h"

namespace dwattn::cuda {
namespace {

constexpr int kOutTile = 128;  // output features per pass over U'

// The patches of a block, in coordinates of the grid.
struct Band {
  int64_t image;
  int y0, x0, height, width;     // written
  int top, left, rows, columns;  // the part of the band and its border that is in the grid
  int grid_width, slot_stride, slot_columns;

  DWATTN_DEVICE Band(const LowrankDwParams& p, const LowrankDwPlan& plan) {
    const int grid_height = static_cast<int>(p.height);
    grid_width = static_cast<int>(p.width);
    const int across = (grid_width + plan.tile_width - 1) / plan.tile_width;
    const int down = (grid_height + plan.tile_height - 1) / plan.tile_height;
    const int block = static_cast<int>(blockIdx.x);
    image = block / (across * down);
    y0 = block / across % down * plan.tile_height;
    x0 = block % across * plan.tile_width;
    height = min(plan.tile_height, grid_height - y0);
    width = min(plan.tile_width, grid_width - x0);
    top = max(y0 - 1, 0);
    left = max(x0 - 1, 0);
    rows = min(y0 + height + 1, grid_height) - top;
    columns = min(x0 + width + 1, grid_width) - left;
    slot_stride = plan.slot_stride;
    slot_columns = plan.tile_width + 2;
  }

  DWATTN_DEVICE int slot(int row, int column) const {
    return (row * slot_columns + column) * slot_stride;
  }
  // Where U of the m-th patch that is projected lies, and U' of the m-th patch of the band.
  DWATTN_DEVICE int projected_slot(int m) const {
    return slot(top + m / columns - y0 + 2, left + m % columns - x0 + 1);
  }
  DWATTN_DEVICE int aggregated_slot(int m) const { return slot(m / width, m % width + 1); }

  // Indices in the grid of the same patches.
  DWATTN_DEVICE int projected_patch(int m) const {
    return (top + m / columns) * grid_width + left + m % columns;
  }
  DWATTN_DEVICE int written_patch(int m) const {
    return (y0 + m / width) * grid_width + x0 + m % width;
  }
};

// Zeros where the border lies outside the grid.
template <class T>
DWATTN_DEVICE void clear_border(const LowrankDwParams& p, const LowrankDwPlan& plan,
                                const Band& band, T* u) {
  constexpr int kVector = BandChunk<T>::kVector, kWarps = kBandThreads / kWarp;
  const int columns = band.width + 2, positions = (band.height + 2) * columns;
  for (int i = threadIdx.x / kWarp; i < positions; i += kWarps) {
    const int row = i / columns, column = i % columns;
    const int y = band.y0 - 1 + row, x = band.x0 - 1 + column;
    if (y >= 0 && y < p.height && x >= 0 && x < p.width) continue;
    T* const slot = u + band.slot(row + 1, column);
    for (int c = threadIdx.x % kWarp * kVector; c < plan.channels; c += kWarp * kVector) {
      *reinterpret_cast<uint4*>(slot + c) = make_uint4(0, 0, 0, 0);
    }
  }
}

// ---- 1. U = x A^T + a_bias

// Stages chunks of x and A: for each tile of tokens all tiles of channels, for each of them all of
// D.
template <class T, int kRankTile>
class ProjectionLoader {
 public:
  DWATTN_DEVICE ProjectionLoader(const LowrankDwParams& p, const LowrankDwPlan& plan,
                                 const Band& band)
      : p_(p),
        band_(band),
        x_(static_cast<const T*>(p.x) + band.image * p.x_stride_batch +
           p.num_prefix * p.x_stride_token),
        x_aligned_(vectors_aligned<T>(p.x, p.x_stride_batch, p.x_stride_token, p.dim)),
        a_aligned_(vectors_aligned<T>(p.a, p.a_stride, 0, p.dim)),
        rank_tiles_((plan.channels + kRankTile - 1) / kRankTile) {
    find_patches();
  }

  DWATTN_DEVICE void operator()(T* stage) {
    constexpr int kStride = BandChunk<T>::kStride, kVector = BandChunk<T>::kVector;
    const int dim = static_cast<int>(p_.dim), v = threadIdx.x % 4 * kVector, k = k_ + v;
    const T* const a = static_cast<const T*>(p_.a);
    T* const to = stage + first_row() * kStride + v;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool exists = patch_[i] >= 0;
      stage_vector(to + i * kRowStep * kStride, x_ + (exists ? patch_[i] : 0) * p_.x_stride_token,
                   k, exists ? dim : 0, x_aligned_);
    }
    T* const weights = stage + kBandRows * kStride + v;
#pragma unroll
    for (int i = 0; i < kRankTile / kRowStep; ++i) {
      const int n = first_row() + i * kRowStep, c = rank_tile_ * kRankTile + n;
      stage_vector(weights + BandProduct<T, kRankTile>::stored_row(n) * kStride,
                   a + c * p_.a_stride, k, c < p_.rank ? dim : 0, a_aligned_);
    }
    advance();
  }

 private:
  static constexpr int kRowStep = kBandThreads / 4;  // four threads share a row of 64 bytes
  static constexpr int kTokens = kBandRows / kRowStep;

  static DWATTN_DEVICE int first_row() { return threadIdx.x / 4; }

  DWATTN_DEVICE void advance() {
    k_ += BandChunk<T>::kLength;
    if (k_ < p_.dim) return;
    k_ = 0;
    if (++rank_tile_ < rank_tiles_) return;
    rank_tile_ = 0;
    first_token_ += kBandRows;
    find_patches();
  }

  DWATTN_DEVICE void find_patches() {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int m = first_token_ + first_row() + i * kRowStep;
      patch_[i] = m < band_.rows * band_.columns ? band_.projected_patch(m) : -1;
    }
  }

  const LowrankDwParams& p_;
  const Band& band_;
  const T* const x_;
  const bool x_aligned_, a_aligned_;
  const int rank_tiles_;
  int patch_[kTokens];  // in the grid, or -1
  int first_token_ = 0, rank_tile_ = 0, k_ = 0;
};

// Rounds a finished tile of U and puts it into its slots. Padding channels become zero.
template <class T, int kRankTile>
DWATTN_DEVICE void keep_projection(const LowrankDwParams& p, const LowrankDwPlan& plan,
                                   const Band& band, const BandProduct<T, kRankTile>& product,
                                   int first_token, int first_channel, T* u) {
  using Product = BandProduct<T, kRankTile>;
  int slot[Product::kRows];
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i) {
    const int m = first_token + product.row(i);
    slot[i] = m < band.rows * band.columns ? band.projected_slot(m) : -1;
  }
#pragma unroll
  for (int g = 0; g < Product::kGroups; ++g) {
    const int c = first_channel + product.column(g);
    if (c >= plan.channels) continue;
    float bias[Product::kVector];
#pragma unroll
    for (int e = 0; e < Product::kVector; ++e) {
      bias[e] = p.a_bias != nullptr && c + e < p.rank ? p.a_bias[c + e] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i) {
      float values[Product::kVector];
#pragma unroll
      for (int e = 0; e < Product::kVector; ++e) values[e] = product.value(i, g, e) + bias[e];
      if (slot[i] >= 0) store_vector(u + slot[i] + c, values);
    }
  }
}

template <class T, int kRankTile>
DWATTN_DEVICE void project(const LowrankDwParams& p, const LowrankDwPlan& plan, const Band& band,
                           T* u, T* stages) {
  using Product = BandProduct<T, kRankTile>;
  constexpr int kStride = BandChunk<T>::kStride, kLength = BandChunk<T>::kLength;
  const int chunks = (static_cast<int>(p.dim) + kLength - 1) / kLength;
  const int rank_tiles = (plan.channels + kRankTile - 1) / kRankTile;
  const int tokens = band.rows * band.columns;
  const int tiles = (tokens + kBandRows - 1) / kBandRows;

  Product product;
  int operand[Product::kOperandRows];
#pragma unroll
  for (int i = 0; i < Product::kOperandRows; ++i) operand[i] = product.operand_row(i) * kStride;

  int chunk = 0, first_token = 0, first_channel = 0;
  ProjectionLoader<T, kRankTile> load(p, plan, band);
  auto consume = [&](const T* stage) {
    product.multiply(stage, operand, stage + kBandRows * kStride, tokens - first_token);
    if (++chunk < chunks) return;
    keep_projection<T, kRankTile>(p, plan, band, product, first_token, first_channel, u);
    product.clear();
    chunk = 0;
    first_channel += kRankTile;
    if (first_channel < plan.channels) return;
    first_channel = 0;
    first_token += kBandRows;
  };
  stream_chunks(stages, (kBandRows + kRankTile) * kStride, tiles * rank_tiles * chunks, load,
                consume);
}

// ---- 2. U' = aggregation of U, in place

template <class T>
DWATTN_DEVICE void load4(const T* from, float (&v)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 f = *reinterpret_cast<const float4*>(from);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(from);
    const float2 a = unpack2<T>(bits.x), b = unpack2<T>(bits.y);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
  }
}

template <class T>
DWATTN_DEVICE void store4(T* to, const float (&v)[4]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
  }
}

// A thread keeps the coefficients of four channels and takes every so many columns of a row. Row i
// of U' goes where row i - 2 of U was, which only rows above i read: one barrier per row is enough.
template <class T>
DWATTN_DEVICE void aggregate(const LowrankDwParams& p, const LowrankDwPlan& plan, const Band& band,
                             T* u) {
  const int quads = plan.channels / 4, sharing = min(quads, kBandThreads);
  const int first = threadIdx.x / sharing, step = kBandThreads / sharing;
  for (int base = 0; base < quads; base += kBandThreads) {
    const int quad = base + threadIdx.x % sharing, c = quad * 4;
    const bool active = first < step && quad < quads;
    float weight[9][4], ctx[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool exists = active && c + e < p.rank;
      ctx[e] = exists && p.ctx != nullptr ? p.ctx[band.image * p.rank + c + e] : 0.0f;
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        weight[tap][e] = exists ? p.kernel[(c + e) * 9 + tap] : 0.0f;
      }
    }
    for (int i = 0; i < band.height; ++i) {
      for (int j = first; active && j < band.width; j += step) {
        float sum[4] = {ctx[0], ctx[1], ctx[2], ctx[3]};
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          float value[4];
          load4(u + band.slot(i + 1 + tap / 3, j + tap % 3) + c, value);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e] = fmaf(weight[tap][e], value[e], sum[e]);
        }
        store4(u + band.slot(i, j + 1) + c, sum);
      }
      __syncthreads();
    }
  }
}

// ---- 3. out = epilogue(U' B^T)

// Stages chunks of B: for each tile of tokens all tiles of output features, for each of them all of
// r.
template <class T>
class ExpansionLoader {
 public:
  DWATTN_DEVICE ExpansionLoader(const LowrankDwParams& p, const LowrankDwPlan& plan)
      : p_(p), channels_(plan.channels), aligned_(vectors_aligned<T>(p.b, p.b_stride, 0, p.rank)) {}

  DWATTN_DEVICE void operator()(T* stage) {
    constexpr int kStride = BandChunk<T>::kStride, kVector = BandChunk<T>::kVector;
    constexpr int kRowStep = kBandThreads / 4;
    const T* const b = static_cast<const T*>(p_.b);
    const int rank = static_cast<int>(p_.rank), v = threadIdx.x % 4 * kVector;
#pragma unroll
    for (int i = 0; i < kOutTile / kRowStep; ++i) {
      const int n = threadIdx.x / 4 + i * kRowStep;
      const int64_t d = first_feature_ + n;
      stage_vector(stage + BandProduct<T, kOutTile>::stored_row(n) * kStride + v,
                   b + d * p_.b_stride, k_ + v, d < p_.dim_out ? rank : 0, aligned_);
    }
    advance();
  }

 private:
  DWATTN_DEVICE void advance() {
    k_ += BandChunk<T>::kLength;
    if (k_ < channels_) return;
    k_ = 0;
    first_feature_ += kOutTile;
    if (first_feature_ >= p_.dim_out) first_feature_ = 0;
  }

  const LowrankDwParams& p_;
  const int channels_;
  const bool aligned_;
  int64_t first_feature_ = 0;
  int k_ = 0;
};

template <class T>
DWATTN_DEVICE void write_tile(const LowrankDwParams& p, const Band& band,
                              const BandProduct<T, kOutTile>& product,
                              Epilogue<T, LowrankDwParams>& epilogue, int first_token,
                              int64_t first_feature) {
  using Product = BandProduct<T, kOutTile>;
#pragma unroll
  for (int g = 0; g < Product::kGroups; ++g) {
    epilogue.choose(first_feature + product.column(g));
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i) {
      const int m = first_token + product.row(i);
      if (m >= band.height * band.width) continue;
      float values[Product::kVector];
#pragma unroll
      for (int e = 0; e < Product::kVector; ++e) values[e] = product.value(i, g, e);
      epilogue.write(band.image, p.num_prefix + band.written_patch(m), values);
    }
  }
}

template <class T>
DWATTN_DEVICE void expand(const LowrankDwParams& p, const LowrankDwPlan& plan, const Band& band,
                          const T* u, T* stages, int stage_size) {
  using Product = BandProduct<T, kOutTile>;
  constexpr int kLength = BandChunk<T>::kLength;
  const int tokens = band.height * band.width;
  const int tiles = (tokens + kBandRows - 1) / kBandRows;
  const int out_tiles = (static_cast<int>(p.dim_out) + kOutTile - 1) / kOutTile;

  Product product;
  Epilogue<T, LowrankDwParams> epilogue(p, p.b_bias);
  int operand[Product::kOperandRows];
  int k = 0, first_token = 0;
  int64_t first_feature = 0;
  const auto find_operands = [&] {
#pragma unroll
    for (int i = 0; i < Product::kOperandRows; ++i) {
      operand[i] = band.aggregated_slot(min(first_token + product.operand_row(i), tokens - 1));
    }
  };
  find_operands();
  ExpansionLoader<T> load(p, plan);
  auto consume = [&](const T* stage) {
    product.multiply(u + k, operand, stage, tokens - first_token);
    k += kLength;
    if (k < plan.channels) return;
    write_tile<T>(p, band, product, epilogue, first_token, first_feature);
    product.clear();
    k = 0;
    first_feature += kOutTile;
    if (first_feature < p.dim_out) return;
    first_feature = 0;
    first_token += kBandRows;
    find_operands();
  };
  stream_chunks(stages, stage_size, tiles * out_tiles * (plan.channels / kLength), load, consume);
}

// Blocks per multiprocessor that registers are kept for. A second one seldom finds room for its U
// of four bytes, in TF32 as in fp32.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;

template <class T, int kRankTile>
__global__ void __launch_bounds__(kBandThreads, kBlocks<T>)
    lowrank_dw_kernel(const LowrankDwParams p, const LowrankDwPlan plan) {
  DYN_SHARED(T, u);
  const Band band(p, plan);
  T* const stages = u + band.slot(plan.tile_height + 3, 0);
  constexpr int kStageSize = (kBandRows + kRankTile) * BandChunk<T>::kStride;

  clear_border(p, plan, band, u);
  project<T, kRankTile>(p, plan, band, u, stages);
  aggregate(p, plan, band, u);
  expand<T>(p, plan, band, u, stages, kStageSize);
}

bool valid(const LowrankDwParams& p, const LowrankDwPlan& plan) {
  return p.x != nullptr && p.a != nullptr && p.b != nullptr && p.kernel != nullptr &&
         p.out != nullptr && plan.tile_height >= 1 && plan.tile_width >= 1 &&
         plan.channels >= p.rank && (plan.rank_tile == 64 || plan.rank_tile == 128);
}

template <class T>
Status run(const LowrankDwParams& p, const LowrankDwPlan& plan, Stream stream) {
  const auto kernel = plan.rank_tile == 64 ? lowrank_dw_kernel<T, 64> : lowrank_dw_kernel<T, 128>;
  return launch(kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(kBandThreads),
                static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace

Status lowrank_dw_attention(const LowrankDwParams& p, const LowrankDwPlan& plan, Stream stream) {
  if (p.batch == 0) return Status::kOk;
  if (!valid(p, plan)) return Status::kInvalidArgument;
  switch (p.dtype) {
    case DType::kFloat32:
      return p.tf32 ? run<Tf32>(p, plan, stream) : run<float>(p, plan, stream);
    case DType::kFloat16:
      return run<__half>(p, plan, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, plan, stream);
    default:
      return Status::kUnsupportedDType;
  }
}

Status device_limits(DeviceLimits* limits) {
#ifdef DWATTN_SIMT_HOST
  *limits = {99 << 10, multiprocessors()};
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return Status::kLaunchFailed;
  }
  *limits = {bytes, multiprocessors()};
#endif
  return Status::kOk;
}

}  // namespace dwattn::cuda
