// The kernel for Hopper and when it is taken. What it does: dw_attention_sm90.cuh.
#include <cstdlib>

#include "kernels/cuda/dw_attention_sm90.cuh"
#include "kernels/cuda/dw_attention_sm90.h"

namespace dwattn::cuda {
namespace {

using namespace hopper;

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    dw_attention_sm90_kernel(const DwAttentionParams p, const Work work, const float* ctx,
                             const __grid_constant__ TensorMap x,
                             const __grid_constant__ TensorMap wv) {
  if constexpr (kHopper) {
    DYN_SHARED(unsigned char, memory);
    const Shared shared(memory);
    const int warp = warp_index();
    if (threadIdx.x == 0) {
      Barriers& barriers = *shared.barriers;
      for (int stage = 0; stage < kStages; ++stage) {
        barriers.full[stage].init(1);
        barriers.empty[stage].init(kMultiplyWarps);
      }
      barriers.tile_full.init(kMultiplyWarps);
      barriers.tile_empty.init(kAggregateWarps);
      barriers.aggregated.init(kAggregateWarps);
      publish_barriers();
    }
    __syncthreads();
    if (warp < kMultiplyWarps) {
      for_each_piece(p, work, Multiplier<T>(p, shared));
    } else if (warp < kMultiplyWarps + kAggregateWarps) {
      aggregate_pieces<T>(p, work, ctx, shared);
    } else if (threadIdx.x % kWarp == 0) {
      load(p, work, x, wv, shared);
    }
  } else {
    stop();
  }
}

bool aligned_rows(const void* base, int64_t stride, int64_t stride2) {
  return is_aligned(base, 16) && stride % 8 == 0 && stride2 % 8 == 0 && stride > 0 && stride2 > 0;
}

bool applies(const DwAttentionParams& p) {
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.dim >= 1 &&
         p.channels % 2 == 0 && p.width <= widest_image() &&
         aligned_rows(p.x, p.x_stride_token, p.x_stride_batch) &&
         aligned_rows(p.wv, p.wv_stride, p.wv_stride) && is_aligned(p.y, 4) &&
         p.y_stride_batch % 2 == 0 && p.y_stride_token % 2 == 0;
}

template <class T>
Status run(const DwAttentionParams& p, const float* ctx, Stream stream) {
  const int resident = multiprocessors();
  Work work{};
  work.plan = plan_dw(p.batch, p.height, p.width, p.channels, static_cast<int>(p.width), kGroupRows,
                      kColumns, resident);
  const int64_t pieces = p.batch * work.plan.slices * work.plan.bands;
  const int64_t tokens = p.num_prefix + p.height * p.width;
  if (pieces > INT32_MAX || tokens > INT32_MAX) return Status::kUnsupportedIsa;
  work.pieces = static_cast<unsigned>(pieces);
  TensorMap x, wv;
  const TensorShape x_shape{p.dtype,          p.x,       p.dim, tokens, p.batch, p.x_stride_token,
                            p.x_stride_batch, kGroupRows};
  const TensorShape wv_shape{
      p.dtype, p.wv, p.dim, p.channels, 1, p.wv_stride, p.channels * p.wv_stride, kColumns};
  if (make_tensor_map(x_shape, &x) != Status::kOk ||
      make_tensor_map(wv_shape, &wv) != Status::kOk) {
    return Status::kUnsupportedIsa;
  }
  const unsigned blocks = static_cast<unsigned>(pieces < resident ? pieces : resident);
  return launch(dw_attention_sm90_kernel<T>, dim3(blocks), dim3(kThreads),
                shared_bytes(static_cast<int>(p.width)), stream, p, work, ctx, x, wv);
}

bool device_is_hopper() {
#ifdef DWATTN_SIMT_HOST
  return true;
#else
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#endif
}

}  // namespace

bool hopper_wanted() {
  const char* const value = std::getenv("DWATTN_CUDA_HOPPER");
  return value != nullptr && value[0] == '1' && value[1] == '\0';
}

bool hopper_built() {
#if defined(DWATTN_SIMT_HOST) || defined(DWATTN_CUDA_90A)
  return true;
#else
  return false;
#endif
}

Status dw_attention_sm90(const DwAttentionParams& p, const float* ctx, Stream stream) {
  if (!hopper_built() || !applies(p) || !device_is_hopper()) return Status::kUnsupportedIsa;
  return p.dtype == DType::kFloat16 ? run<__half>(p, ctx, stream)
                                    : run<__nv_bfloat16>(p, ctx, stream);
}

}  // namespace dwattn::cuda
