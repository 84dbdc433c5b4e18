// Tensor maps by the driver's cuTensorMapEncodeTiled, which is looked up at run time: the library
// then links no driver and loads where there is none. Host code.
#include "kernels/cuda/tensor_map.h"

#ifdef DWATTN_SIMT_HOST
#include "simt_hopper.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace dwattn::cuda {

#ifdef DWATTN_SIMT_HOST

Status make_tensor_map(const TensorShape& shape, TensorMap* map) {
  const bool made = simt::make_tensor_map(
      map->words, shape.data, {shape.columns, shape.rows, shape.outer},
      {2 * shape.row_stride, 2 * shape.outer_stride}, {kBoxColumns, shape.box_rows, 1});
  return made ? Status::kOk : Status::kLaunchFailed;
}

#else

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= 64,
              "the driver writes its own type");

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  constexpr char kName[] = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;  // the CUDA version that brought it
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &function, kSince, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

}  // namespace

Status make_tensor_map(const TensorShape& shape, TensorMap* map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return Status::kLaunchFailed;
  const auto unsigned64 = [](int64_t v) { return static_cast<cuuint64_t>(v); };
  const cuuint64_t sizes[3] = {unsigned64(shape.columns), unsigned64(shape.rows),
                               unsigned64(shape.outer)};
  const cuuint64_t strides[2] = {unsigned64(2 * shape.row_stride),
                                 unsigned64(2 * shape.outer_stride)};
  const cuuint32_t box[3] = {kBoxColumns, static_cast<cuuint32_t>(shape.box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUtensorMapDataType type = shape.dtype == DType::kFloat16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), type, 3, const_cast<void*>(shape.data), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status::kOk : Status::kLaunchFailed;
}

#endif

}  // namespace dwattn::cuda
