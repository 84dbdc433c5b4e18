// The aggregation of a V in memory. Shapes:
//   V (B, P + H*W, C), K (C, 3, 3), ctx (B, C) -> Y (B, H*W, C)
//
// A warp owns 64 channels, a pair per lane, and a strip of four output rows; it slides along the
// columns with the six rows of V around the strip in registers, so a value is loaded 1.5 times.
#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/patch_mean.cuh"

namespace dwattn::cuda {
namespace {

constexpr int kRows = 4;  // output rows of a strip
constexpr int kWarps = 4;

struct Cut {
  int64_t slices, strips, segments, columns;  // columns of a segment
};

// A strip is cut into segments only as far as it takes to occupy the GPU: each adds two columns.
Cut cut(const DwAggregateParams& p) {
  constexpr int64_t kWarpsPerMultiprocessor = 16, kFewestColumns = 4;
  Cut c{};
  c.slices = (p.channels + kSlice - 1) / kSlice;
  c.strips = (p.height + kRows - 1) / kRows;
  const int64_t warps = p.batch * c.slices * c.strips;
  const int64_t wanted = kWarpsPerMultiprocessor * multiprocessors();
  c.columns = p.width;
  while (c.columns > kFewestColumns && warps * ((p.width + c.columns - 1) / c.columns) < wanted) {
    c.columns = (c.columns + 1) / 2;
  }
  c.segments = (p.width + c.columns - 1) / c.columns;
  return c;
}

struct Strip {
  float2 v[kRows + 2];  // rows row - 1 .. row + kRows of one column
};

// ctx = sum_t kappa[t] (V[t] + bias) + mu (mean + bias) + beta, one channel per thread.
template <class T>
__global__ void value_context_kernel(const DwAggregateParams p, const float* mean, float* ctx) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.batch * p.channels) return;
  const int64_t image = index / p.channels, channel = index - image * p.channels;
  const auto at = [channel](const void* values, int64_t row_start) {
    return values != nullptr ? static_cast<const float*>(values)[row_start + channel] : 0.0f;
  };
  const float bias = at(p.v_bias, 0);
  const T* const v = static_cast<const T*>(p.v) + image * p.v_stride_batch + channel;
  float sum = at(p.beta, 0);
  for (int64_t t = 0; p.kappa != nullptr && t < p.num_prefix; ++t) {
    sum = fmaf(at(p.kappa, t * p.channels), to_float(v[t * p.v_stride_token]) + bias, sum);
  }
  if (p.mu != nullptr) sum = fmaf(at(p.mu, 0), mean[index] + bias, sum);
  ctx[index] = sum;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp)
    dw_aggregate_kernel(const DwAggregateParams p, const Cut cut, const float* ctx) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t channel = index % cut.slices * kSlice + threadIdx.x % kWarp * 2;
  index /= cut.slices;
  const int64_t first_column = index % cut.segments * cut.columns;
  index /= cut.segments;
  const int64_t row = index % cut.strips * kRows;
  const int64_t image = index / cut.strips;
  const int64_t valid = p.channels - channel;
  if (image >= p.batch || valid <= 0) return;

  const auto coefficient = [&](const void* values, int64_t first, int64_t step) {
    if (values == nullptr) return zero2();
    const float* const from = static_cast<const float*>(values) + first;
    return make_float2(from[0], valid > 1 ? from[step] : 0.0f);
  };
  float2 taps[9];
#pragma unroll
  for (int i = 0; i < 9; ++i) taps[i] = coefficient(p.kernel, channel * 9 + i, 9);
  const float2 bias = coefficient(p.v_bias, channel, 1);
  const float2 context = coefficient(ctx, image * p.channels + channel, 1);

  const T* const v = static_cast<const T*>(p.v) + image * p.v_stride_batch + channel;
  T* const y = static_cast<T*>(p.y) + image * p.y_stride_batch + channel;
  const auto load = [&](int64_t column) {
    Strip strip;
#pragma unroll
    for (int r = 0; r < kRows + 2; ++r) {
      const int64_t from = row + r - 1;
      const bool inside = from >= 0 && from < p.height && column >= 0 && column < p.width;
      const int64_t token = p.num_prefix + from * p.width + column;
      strip.v[r] = inside ? add2(load_pair<T, kAligned>(v + token * p.v_stride_token, valid), bias)
                          : zero2();
    }
    return strip;
  };
  Strip left = load(first_column - 1), middle = load(first_column);
  const int64_t end = first_column + cut.columns < p.width ? first_column + cut.columns : p.width;
  for (int64_t column = first_column; column < end; ++column) {
    const Strip right = load(column + 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float2 sum = context;
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        sum = fma2(taps[3 * r], left.v[i + r], sum);
        sum = fma2(taps[3 * r + 1], middle.v[i + r], sum);
        sum = fma2(taps[3 * r + 2], right.v[i + r], sum);
      }
      if (row + i < p.height) {
        T* const to = y + ((row + i) * p.width + column) * p.y_stride_token;
        store_pair<T, kAligned>(to, sum, valid);
      }
    }
    left = middle;
    middle = right;
  }
}

bool has_context(const DwAggregateParams& p) {
  return p.mu != nullptr || p.beta != nullptr || (p.kappa != nullptr && p.num_prefix > 0);
}

template <class T>
Status context(const DwAggregateParams& p, float* ctx, float* mean, Stream stream) {
  if (p.mu != nullptr) {
    const T* const patches = static_cast<const T*>(p.v) + p.num_prefix * p.v_stride_token;
    const Status status = patch_mean(patches, p.v_stride_batch, p.v_stride_token, p.batch,
                                     p.height * p.width, p.channels, mean, stream);
    if (status != Status::kOk) return status;
  }
  constexpr int kThreads = 256;
  const int64_t blocks = (p.batch * p.channels + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  return launch(value_context_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                stream, p, mean, ctx);
}

template <class T>
Status run(const DwAggregateParams& p, void* workspace, Stream stream) {
  float* ctx = nullptr;
  if (has_context(p)) {
    if (workspace == nullptr) return Status::kInvalidArgument;
    ctx = static_cast<float*>(workspace);
    const Status status = context<T>(p, ctx, ctx + p.batch * p.channels, stream);
    if (status != Status::kOk) return status;
  }
  const bool aligned = is_aligned(p.v, 2 * sizeof(T)) && is_aligned(p.y, 2 * sizeof(T)) &&
                       p.v_stride_batch % 2 == 0 && p.v_stride_token % 2 == 0 &&
                       p.y_stride_batch % 2 == 0 && p.y_stride_token % 2 == 0 &&
                       p.channels % 2 == 0;
  const Cut c = cut(p);
  const int64_t warps = p.batch * c.slices * c.strips * c.segments;
  const int64_t blocks = (warps + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  return launch(aligned ? dw_aggregate_kernel<T, true> : dw_aggregate_kernel<T, false>,
                dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarp), 0, stream, p, c, ctx);
}

}  // namespace

int64_t dw_aggregate_workspace(const DwAggregateParams& p) {
  if (!has_context(p)) return 0;
  const int64_t vectors = p.mu != nullptr ? 2 : 1;  // ctx, and the mean of V
  return vectors * p.batch * p.channels * static_cast<int64_t>(sizeof(float));
}

Status dw_aggregate(const DwAggregateParams& p, void* workspace, Stream stream) {
  if (p.batch == 0 || p.channels == 0) return Status::kOk;
  if (p.height < 1 || p.width < 1 || p.num_prefix < 0 || p.batch < 0 || p.channels < 0 ||
      p.v == nullptr || p.y == nullptr || p.kernel == nullptr) {
    return Status::kInvalidArgument;
  }
  if (p.v_dtype != p.y_dtype) return Status::kUnsupportedDType;
  switch (p.v_dtype) {
    case DType::kFloat32:
      return run<float>(p, workspace, stream);
    case DType::kFloat16:
      return run<__half>(p, workspace, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, workspace, stream);
    case DType::kFloat64:
      break;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cuda
