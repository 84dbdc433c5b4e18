// Gradients of the aggregation: one kernel that reads G and V once, and a small one that adds up
// its partial sums. Shapes:
//   G (B, H*W, C), V (B, P + H*W, C) -> dV (B, P + H*W, C), sums (B, parts, kSums, C) -> gradients
//
// dV and dK meet the same 3x3 window of G around a patch (see dw_backward.h), so V is needed at the
// patch itself only. As in dw_aggregate.cu a warp owns 64 channels, a pair per lane, and slides
// along strips of three rows with the five rows of G around them in registers; the sums over what
// it has seen stay in registers too.
#include "kernels/cuda/dw_backward.h"
#include "kernels/cuda/patch_mean.cuh"

namespace dwattn::cuda {
namespace {

constexpr int kRows = 3;  // rows of a strip
constexpr int kWarps = 4;
// 124 to 166 registers a thread, by architecture: room for a fourth block, or a fourth row, would
// make the compiler spill some of them.
constexpr int kBlocksPerMultiprocessor = 3;

// What is summed over the patches of an image: V times G for the nine taps (0 to 8), and these.
enum Sum { kGrad = 9, kValue = 10, kSums = 11 };

// A unit of work is a strip of rows, `columns` wide; a block takes every parts-th group of kWarps
// units of an image and a slice of channels.
struct Cut {
  int64_t slices, segments, columns, units, parts;
};

// The error of a sum grows with its length: a warp adds up to about so many patches before its sums
// are put down. A grid of 37 x 37 and less is not cut for this.
constexpr int64_t kLongestWalk = 512;

Cut cut(const DwBackwardParams& p) {
  constexpr int64_t kFewestColumns = 4;
  Cut c{};
  c.slices = (p.channels + kSlice - 1) / kSlice;
  const int64_t strips = (p.height + kRows - 1) / kRows;
  const int64_t walks = p.batch * c.slices;
  const int64_t wanted = kBlocksPerMultiprocessor * kWarps * multiprocessors();
  const auto segments = [&p](int64_t columns) { return (p.width + columns - 1) / columns; };
  c.columns = p.width;
  while (c.columns > kFewestColumns &&
         (walks * strips * segments(c.columns) < wanted || c.columns * kRows > kLongestWalk)) {
    c.columns = (c.columns + 1) / 2;
  }
  c.segments = segments(c.columns);
  c.units = strips * c.segments;
  // Longer walks of fewer warps leave fewer partial sums.
  const int64_t spare = walks * c.units / wanted, longest = kLongestWalk / (c.columns * kRows);
  const int64_t units = spare < longest ? spare : longest;
  const int64_t per_block = kWarps * (units > 1 ? units : 1);
  c.parts = (c.units + per_block - 1) / per_block;
  return c;
}

struct Strip {
  float2 g[kRows + 2];  // rows row - 1 .. row + kRows of one column
};

struct Sums {
  float2 of[kSums];
};

// What a lane needs for its pair of channels of one image.
template <class T>
struct Channels {
  const T* grad;
  const T* v;  // patches; null without gradients of the coefficients
  T* dv;       // patches; null if not wanted
  int64_t valid;
  float2 taps[9];
  float2 context;  // mu S / (H W)
};

template <class T, bool kAligned>
DWATTN_DEVICE Strip load_column(const DwBackwardParams& p, const Channels<T>& c, int64_t row,
                                int64_t column) {
  Strip strip;
#pragma unroll
  for (int r = 0; r < kRows + 2; ++r) {
    const int64_t from = row + r - 1;
    const bool inside = from >= 0 && from < p.height && column >= 0 && column < p.width;
    const T* const at = c.grad + (from * p.width + column) * p.grad_stride_token;
    strip.g[r] = inside ? load_pair<T, kAligned>(at, c.valid) : zero2();
  }
  return strip;
}

// One column of a strip: writes dV and adds to the sums.
template <class T, bool kAligned>
DWATTN_DEVICE void visit(const DwBackwardParams& p, const Channels<T>& c, int64_t row,
                         int64_t column, const Strip& left, const Strip& middle, const Strip& right,
                         Sums& sums) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row + i < p.height) {
      const int64_t patch = (row + i) * p.width + column;
      sums.of[kGrad] = add2(sums.of[kGrad], middle.g[i + 1]);
      if (c.v != nullptr) {
        const float2 value = load_pair<T, kAligned>(c.v + patch * p.v_stride_token, c.valid);
        sums.of[kValue] = add2(sums.of[kValue], value);
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          sums.of[3 * r] = fma2(value, right.g[i + 2 - r], sums.of[3 * r]);
          sums.of[3 * r + 1] = fma2(value, middle.g[i + 2 - r], sums.of[3 * r + 1]);
          sums.of[3 * r + 2] = fma2(value, left.g[i + 2 - r], sums.of[3 * r + 2]);
        }
      }
      if (c.dv != nullptr) {
        float2 sum = c.context;
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          sum = fma2(c.taps[3 * r], right.g[i + 2 - r], sum);
          sum = fma2(c.taps[3 * r + 1], middle.g[i + 2 - r], sum);
          sum = fma2(c.taps[3 * r + 2], left.g[i + 2 - r], sum);
        }
        store_pair<T, kAligned>(c.dv + patch * p.dv_stride_token, sum, c.valid);
      }
    }
  }
}

// The sums of the warps, added in their order, to `to (kSums, C)` of this block's slice.
DWATTN_DEVICE void write_sums(const Sums& sums, int64_t first_channel, int64_t channels,
                              float* to) {
  DYN_SHARED(float2, shared);  // (kWarps, kSums, kWarp)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int s = 0; s < kSums; ++s) shared[(warp * kSums + s) * kWarp + lane] = sums.of[s];
  __syncthreads();
  const float* const values = reinterpret_cast<const float*>(shared);
  for (int i = threadIdx.x; i < kSums * kSlice; i += kWarps * kWarp) {
    float sum = values[i];
    for (int other = 1; other < kWarps; ++other) sum += values[other * kSums * kSlice + i];
    const int64_t channel = first_channel + i % kSlice;
    if (channel < channels) to[i / kSlice * channels + channel] = sum;
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksPerMultiprocessor)
    backward_kernel(const DwBackwardParams p, const Cut cut, const float* mean, float* partial) {
  int64_t index = blockIdx.x;
  const int64_t first_channel = index % cut.slices * kSlice;
  index /= cut.slices;
  const int64_t part = index % cut.parts, image = index / cut.parts;
  const int64_t channel = first_channel + threadIdx.x % kWarp * 2;

  Channels<T> c;
  c.valid = p.channels - channel;
  c.grad = static_cast<const T*>(p.grad) + image * p.grad_stride_batch + channel;
  c.v = p.v == nullptr ? nullptr
                       : static_cast<const T*>(p.v) + image * p.v_stride_batch +
                             p.num_prefix * p.v_stride_token + channel;
  c.dv = p.dv == nullptr ? nullptr
                         : static_cast<T*>(p.dv) + image * p.dv_stride_batch +
                               p.num_prefix * p.dv_stride_token + channel;
  const auto coefficient = [&](const float* from, int64_t first, int64_t step) {
    if (from == nullptr) return zero2();
    return make_float2(c.valid > 0 ? from[first] : 0.0f, c.valid > 1 ? from[first + step] : 0.0f);
  };
#pragma unroll
  for (int i = 0; i < 9; ++i) c.taps[i] = coefficient(p.kernel, channel * 9 + i, 9);
  c.context = fma2(coefficient(p.mu, channel, 1),
                   coefficient(mean, image * p.channels + channel, 1), zero2());

  Sums sums;
#pragma unroll
  for (int s = 0; s < kSums; ++s) sums.of[s] = zero2();
  for (int64_t unit = part * kWarps + threadIdx.x / kWarp; unit < cut.units;
       unit += cut.parts * kWarps) {
    const int64_t row = unit / cut.segments * kRows;
    const int64_t first = unit % cut.segments * cut.columns;
    const int64_t end = first + cut.columns < p.width ? first + cut.columns : p.width;
    Strip left = load_column<T, kAligned>(p, c, row, first - 1);
    Strip middle = load_column<T, kAligned>(p, c, row, first);
    for (int64_t column = first; column < end; ++column) {
      const Strip right = load_column<T, kAligned>(p, c, row, column + 1);
      visit<T, kAligned>(p, c, row, column, left, middle, right, sums);
      left = middle;
      middle = right;
    }
  }
  write_sums(sums, first_channel, p.channels,
             partial + (image * cut.parts + part) * kSums * p.channels);
}

// ---- Second pass: from the sums of images and parts to the gradients

constexpr int kFinishRows = 8;

// A block computes one result for 32 channels: a tap, dbeta, dmu, or what belongs to a prefix
// token. Its warps take every eighth image; their sums are added in the order of the warps.
enum Job { kBeta = 9, kMu = 10, kPrefix = 11 };

template <class T>
struct Finish {
  const DwBackwardParams& p;
  const float* partial;
  int64_t parts, channel;

  DWATTN_DEVICE float sum(int64_t image, int which) const {
    const float* from = partial + (image * parts * kSums + which) * p.channels + channel;
    float total = 0.0f;
#pragma unroll 4
    for (int64_t part = 0; part < parts; ++part) total += from[part * kSums * p.channels];
    return total;
  }

  // The image's share in the result of a job.
  DWATTN_DEVICE float share(int64_t job, int64_t image, float factor) const {
    if (job < kBeta) return sum(image, static_cast<int>(job));
    const float grad = sum(image, kGrad);
    if (job == kBeta) return grad;
    if (job == kMu) return grad * sum(image, kValue) * factor;
    return prefix_token(job - kPrefix, image, grad, factor);
  }

  // Writes dV of a prefix token, returns its share in dkappa.
  DWATTN_DEVICE float prefix_token(int64_t t, int64_t image, float grad, float kappa) const {
    if (p.dv != nullptr) {
      T* const to = static_cast<T*>(p.dv) + image * p.dv_stride_batch + t * p.dv_stride_token;
      to[channel] = from_float<T>(p.kappa != nullptr ? kappa * grad : 0.0f);
    }
    if (p.v == nullptr) return 0.0f;
    const T* const v = static_cast<const T*>(p.v) + image * p.v_stride_batch + t * p.v_stride_token;
    return grad * to_float(v[channel]);
  }

  // What share() multiplies with, the same for all images.
  DWATTN_DEVICE float factor(int64_t job) const {
    if (job == kMu) return 1.0f / static_cast<float>(p.height * p.width);
    if (job < kPrefix || p.kappa == nullptr) return 0.0f;
    return p.kappa[(job - kPrefix) * p.channels + channel];
  }

  // Where the result goes, or null.
  DWATTN_DEVICE float* target(int64_t job) const {
    const auto at = [](float* values, int64_t index) {
      return values == nullptr ? nullptr : values + index;
    };
    if (job < kBeta) return at(p.dkernel, channel * 9 + job);
    if (job == kBeta) return at(p.dbeta, channel);
    if (job == kMu) return at(p.dmu, channel);
    return at(p.dkappa, (job - kPrefix) * p.channels + channel);
  }
};

template <class T>
__global__ void __launch_bounds__(kFinishRows* kWarp)
    finish_kernel(const DwBackwardParams p, int64_t parts, const float* partial) {
  DYN_SHARED(float, sums);  // (kFinishRows, kWarp)
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t groups = (p.channels + kWarp - 1) / kWarp;
  const int64_t job = blockIdx.x / groups, channel = blockIdx.x % groups * kWarp + lane;
  const Finish<T> finish{p, partial, parts, channel};
  float total = 0.0f;
  if (channel < p.channels) {
    const float factor = finish.factor(job);
    for (int64_t image = warp; image < p.batch; image += kFinishRows) {
      total += finish.share(job, image, factor);
    }
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || channel >= p.channels) return;
  for (int other = 1; other < kFinishRows; ++other) total += sums[other * kWarp + lane];
  float* const to = finish.target(job);
  if (to != nullptr) *to = total;
}

bool needs_mean(const DwBackwardParams& p) { return p.dv != nullptr && p.mu != nullptr; }

template <class T>
bool all_aligned(const DwBackwardParams& p) {
  const auto pairs = [](const void* data, int64_t batch, int64_t token) {
    return is_aligned(data, 2 * sizeof(T)) && batch % 2 == 0 && token % 2 == 0;
  };
  return p.channels % 2 == 0 && pairs(p.grad, p.grad_stride_batch, p.grad_stride_token) &&
         (p.v == nullptr || pairs(p.v, p.v_stride_batch, p.v_stride_token)) &&
         (p.dv == nullptr || pairs(p.dv, p.dv_stride_batch, p.dv_stride_token));
}

template <class T>
Status run(const DwBackwardParams& p, float* partial, Stream stream) {
  const Cut c = cut(p);
  float* mean = nullptr;
  if (needs_mean(p)) {
    mean = partial + p.batch * c.parts * kSums * p.channels;
    const Status status =
        patch_mean(static_cast<const T*>(p.grad), p.grad_stride_batch, p.grad_stride_token, p.batch,
                   p.height * p.width, p.channels, mean, stream);
    if (status != Status::kOk) return status;
  }
  const int64_t blocks = p.batch * c.slices * c.parts;
  const int64_t jobs = kPrefix + p.num_prefix;
  const int64_t finish_blocks = (p.channels + kWarp - 1) / kWarp * jobs;
  if (blocks > INT32_MAX || finish_blocks > INT32_MAX) return Status::kInvalidArgument;
  const Status status =
      launch(all_aligned<T>(p) ? backward_kernel<T, true> : backward_kernel<T, false>,
             dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarp),
             kWarps * kSums * kWarp * sizeof(float2), stream, p, c, mean, partial);
  if (status != Status::kOk) return status;
  return launch(finish_kernel<T>, dim3(static_cast<unsigned>(finish_blocks)),
                dim3(kFinishRows * kWarp), kFinishRows * kWarp * sizeof(float), stream, p, c.parts,
                partial);
}

bool is_valid(const DwBackwardParams& p) {
  if (p.height < 1 || p.width < 1 || p.num_prefix < 0 || p.batch < 0 || p.channels < 0) {
    return false;
  }
  const bool of_coefficients =
      p.dkernel != nullptr || p.dmu != nullptr || (p.dkappa != nullptr && p.num_prefix > 0);
  const bool has_images = p.batch > 0 && p.channels > 0;
  return !has_images || (p.grad != nullptr && (p.v != nullptr || !of_coefficients) &&
                         (p.kernel != nullptr || p.dv == nullptr));
}

}  // namespace

int64_t dw_backward_workspace(const DwBackwardParams& p) {
  if (!is_valid(p)) return 0;
  const int64_t rows = p.batch * (cut(p).parts * kSums + (needs_mean(p) ? 1 : 0));
  return rows * p.channels * static_cast<int64_t>(sizeof(float));
}

Status dw_backward(const DwBackwardParams& p, void* workspace, Stream stream) {
  if (!is_valid(p)) return Status::kInvalidArgument;
  if (p.channels == 0) return Status::kOk;
  if (workspace == nullptr && p.batch > 0) return Status::kInvalidArgument;
  float* const partial = static_cast<float*>(workspace);
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, partial, stream);
    case DType::kFloat16:
      return run<__half>(p, partial, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, partial, stream);
    case DType::kFloat64:
      break;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cuda
