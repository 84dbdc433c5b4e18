// Static prefix rows: P + 1 rows of an image are projected, its prefix tokens and its mean patch.
#include "kernels/cuda/patch_mean.cuh"
#include "kernels/cuda/prefix_place.cuh"

namespace dwattn::cuda {
namespace {

// Y_t = a V_t + b mean(V)
template <class T>
__global__ void __launch_bounds__(kProductWarps* kWarp)
    static_rows_kernel(const PrefixRowsParams p, const float* mean) {
  const RowGroup group(p.batch * p.num_prefix, p.channels);
  if (group.channel >= p.channels) return;
  const T* const weight = static_cast<const T*>(p.value) + group.channel * p.dim;
  const bool vectors = vectors_aligned<T>(p.value, p.dim, 0, p.dim);
  int64_t offset[kRowsTogether];
  offsets_in_x(p, group, offset);
  const RowSums own =
      row_sums(static_cast<const T*>(p.x), offset, weight, p.dim, vectors && x_vectors<T>(p));
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    offset[i] = PrefixPlace(p, group.row(i)).image * p.dim;
  }
  const RowSums average = row_sums(mean, offset, weight, p.dim, vectors);
  if (threadIdx.x % kWarp > 0) return;
  const float bias = bias_of(p.value_bias, group.channel);
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    if (!group.exists(i)) continue;
    const int64_t at = PrefixPlace(p, group.row(i)).token * p.channels + group.channel;
    write_row<T>(p, group.row(i), group.channel,
                 fmaf(p.a[at], own.v[i] + bias, p.b[at] * (average.v[i] + bias)));
  }
}

template <class T>
Status run(const PrefixRowsParams& p, float* workspace, Stream stream) {
  const float* mean = p.mean;
  if (mean == nullptr) {
    const T* const patches = static_cast<const T*>(p.x) + p.num_prefix * p.x_stride_token;
    const Status status = patch_mean(patches, p.x_stride_batch, p.x_stride_token, p.batch,
                                     p.patches, p.dim, workspace, stream);
    if (status != Status::kOk) return status;
    mean = workspace;
  }
  return launch_blocks(static_rows_kernel<T>,
                       row_product_blocks(p.batch * p.num_prefix, p.channels), kProductWarps, 0,
                       stream, p, mean);
}

}  // namespace

int64_t static_prefix_rows_workspace(const PrefixRowsParams& p) {
  if (p.mean != nullptr) return 0;
  return (p.batch * p.dim + 3) / 4 * 4 * static_cast<int64_t>(sizeof(float));
}

Status static_prefix_rows(const PrefixRowsParams& p, void* workspace, Stream stream) {
  if (p.batch == 0 || p.num_prefix == 0) return Status::kOk;
  if (!valid(p) || p.a == nullptr || p.b == nullptr ||
      (p.mean == nullptr && workspace == nullptr)) {
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
