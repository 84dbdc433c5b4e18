// linear: a block makes 128 rows x kColumns features from a pipeline of copies. A few rows, such as
// the prefix tokens of one image, take a warp per feature instead.
#include "kernels/cuda/band_product.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/row_product.cuh"

namespace dwattn::cuda {
namespace {

// The rows of all images are numbered through; they are fewer than 2^30, and a division of 64 bits
// is dear.
struct RowPlace {
  int64_t image, token;

  DWATTN_DEVICE RowPlace(const LinearParams& p, int64_t row)
      : image(static_cast<unsigned>(row) / static_cast<unsigned>(p.rows)),
        token(row - image * p.rows) {}
};

// Stages chunks of K of the block's rows of y and of its rows of the weights.
template <class T, int kColumns>
class LinearLoader {
 public:
  DWATTN_DEVICE LinearLoader(const LinearParams& p, int64_t first_row, int64_t first_feature)
      : p_(p),
        weight_(static_cast<const T*>(p.weight) + first_feature * p.weight_stride),
        features_left_(static_cast<int>(p.dim_out - first_feature)),
        y_aligned_(vectors_aligned<T>(p.y, p.y_stride_batch, p.y_stride_token, p.dim)),
        weight_aligned_(vectors_aligned<T>(p.weight, p.weight_stride, 0, p.dim)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first_row + staged_row() + i * kRowStep;
      const bool exists = row < p.batch * p.rows;
      const RowPlace place(p, exists ? row : 0);
      length_[i] = exists ? static_cast<int>(p.dim) : 0;
      y_[i] = static_cast<const T*>(p.y) + place.image * p.y_stride_batch +
              place.token * p.y_stride_token;
    }
  }

  DWATTN_DEVICE void operator()(T* stage) {
    constexpr int kStride = BandChunk<T>::kStride, kVector = BandChunk<T>::kVector;
    const int v = threadIdx.x % 4 * kVector;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      stage_vector(stage + (staged_row() + i * kRowStep) * kStride + v, y_[i], k_ + v, length_[i],
                   y_aligned_);
    }
    T* const weights = stage + kBandRows * kStride + v;
#pragma unroll
    for (int i = 0; i < kColumns / kRowStep; ++i) {
      const int n = staged_row() + i * kRowStep;
      const bool exists = n < features_left_;
      stage_vector(weights + BandProduct<T, kColumns>::stored_row(n) * kStride,
                   weight_ + (exists ? n : 0) * p_.weight_stride, k_ + v,
                   exists ? static_cast<int>(p_.dim) : 0, weight_aligned_);
    }
    k_ += BandChunk<T>::kLength;
  }

 private:
  static constexpr int kRowStep = kBandThreads / 4;  // four threads share a row of 64 bytes
  static constexpr int kRows = kBandRows / kRowStep;

  static DWATTN_DEVICE int staged_row() { return threadIdx.x / 4; }

  const LinearParams& p_;
  const T* const weight_;
  const int features_left_;
  const bool y_aligned_, weight_aligned_;
  const T* y_[kRows];
  int length_[kRows];  // of a row, or 0 where there is none
  int k_ = 0;
};

template <class T, int kColumns>
__global__ void __launch_bounds__(kBandThreads, kBandBlocks<T>)
    linear_kernel(const LinearParams p) {
  using Product = BandProduct<T, kColumns>;
  constexpr int kStride = BandChunk<T>::kStride, kLength = BandChunk<T>::kLength;
  DYN_SHARED(T, stages);
  const int64_t across = (p.dim_out + kColumns - 1) / kColumns;
  const int64_t first_row = blockIdx.x / across * kBandRows;
  const int64_t first_feature = blockIdx.x % across * kColumns;
  const int64_t all_rows = p.batch * p.rows;
  const int rows = static_cast<int>(all_rows - first_row);

  Product product;
  int operand[Product::kOperandRows];
#pragma unroll
  for (int i = 0; i < Product::kOperandRows; ++i) operand[i] = product.operand_row(i) * kStride;
  LinearLoader<T, kColumns> load(p, first_row, first_feature);
  auto consume = [&](const T* stage) {
    product.multiply(stage, operand, stage + kBandRows * kStride, rows);
  };
  stream_chunks(stages, (kBandRows + kColumns) * kStride,
                (static_cast<int>(p.dim) + kLength - 1) / kLength, load, consume);

  Epilogue<T, LinearParams> epilogue(p, p.bias);
#pragma unroll
  for (int g = 0; g < Product::kGroups; ++g) {
    epilogue.choose(first_feature + product.column(g));
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i) {
      const int64_t row = first_row + product.row(i);
      if (row >= all_rows) continue;
      float values[Product::kVector];
#pragma unroll
      for (int e = 0; e < Product::kVector; ++e) values[e] = product.value(i, g, e);
      const RowPlace place(p, row);
      epilogue.write(place.image, place.token, values);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kProductWarps* kWarp) few_rows_kernel(const LinearParams p) {
  const RowGroup group(p.batch * p.rows, p.dim_out);
  const int64_t d = group.channel;
  if (d >= p.dim_out) return;
  const bool vectors = vectors_aligned<T>(p.y, p.y_stride_batch, p.y_stride_token, p.dim) &&
                       vectors_aligned<T>(p.weight, p.weight_stride, 0, p.dim);
  int64_t offset[kRowsTogether];
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    const RowPlace place(p, group.row(i));
    offset[i] = place.image * p.y_stride_batch + place.token * p.y_stride_token;
  }
  const RowSums sum =
      row_sums(static_cast<const T*>(p.y), offset,
               static_cast<const T*>(p.weight) + d * p.weight_stride, p.dim, vectors);
  if (threadIdx.x % kWarp > 0) return;
  const float bias = p.bias != nullptr ? p.bias[d] : 0.0f;
  const float gamma = p.gamma != nullptr ? p.gamma[d] : 1.0f;
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    if (!group.exists(i)) continue;
    const RowPlace place(p, group.row(i));
    float base = 0.0f;
    if (p.residual != nullptr) {
      base = to_float(static_cast<const T*>(p.residual)[place.image * p.residual_stride_batch +
                                                        place.token * p.residual_stride_token + d]);
    }
    static_cast<T*>(
        p.out)[place.image * p.out_stride_batch + place.token * p.out_stride_token + d] =
        from_float<T>(fmaf(gamma, sum.v[i] + bias, base));
  }
}

template <class T, int kColumns>
Status run_tiles(const LinearParams& p, int64_t tiles, Stream stream) {
  constexpr size_t kShared =
      kBandStages * (kBandRows + kColumns) * BandChunk<T>::kStride * sizeof(T);
  return launch(linear_kernel<T, kColumns>, dim3(static_cast<unsigned>(tiles)), dim3(kBandThreads),
                kShared, stream, p);
}

// Up to this many rows a tile of 128 would be mostly empty.
constexpr int64_t kFewRows = 16;

template <class T>
Status run_few(const LinearParams& p, Stream stream) {
  const int64_t blocks = row_product_blocks(p.batch * p.rows, p.dim_out);
  return launch(few_rows_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kProductWarps * kWarp), 0, stream, p);
}

// The element type of few_rows_kernel, which takes no products in TF32.
template <class T>
using InMemory = std::conditional_t<std::is_same<T, Tf32>::value, float, T>;

template <class T>
Status run(const LinearParams& p, Stream stream) {
  const int64_t rows = p.batch * p.rows;
  if (rows <= kFewRows) return run_few<InMemory<T>>(p, stream);
  const int64_t down = (rows + kBandRows - 1) / kBandRows;
  const int64_t wide = down * ((p.dim_out + 127) / 128), narrow = down * ((p.dim_out + 63) / 64);
  if (narrow > INT32_MAX) return Status::kInvalidArgument;
  // Wide tiles read less; narrow ones keep more multiprocessors busy.
  return wide >= kBandBlocks<T> * multiprocessors() ? run_tiles<T, 128>(p, wide, stream)
                                                    : run_tiles<T, 64>(p, narrow, stream);
}

bool valid(const LinearParams& p) {
  constexpr int64_t kMost = 1 << 30;
  const auto within = [](int64_t size) { return size >= 1 && size < kMost; };
  return within(p.batch) && within(p.rows) && p.rows < kMost / p.batch && within(p.dim) &&
         within(p.dim_out) && p.y != nullptr && p.weight != nullptr && p.out != nullptr;
}

}  // namespace

Status linear(const LinearParams& p, Stream stream) {
  if (p.batch == 0 || p.rows == 0) return Status::kOk;
  if (!valid(p)) return Status::kInvalidArgument;
  switch (p.dtype) {
    case DType::kFloat32:
      return p.tf32 ? run<Tf32>(p, stream) : run<float>(p, stream);
    case DType::kFloat16:
      return run<__half>(p, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, stream);
    case DType::kFloat64:
      break;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cuda
