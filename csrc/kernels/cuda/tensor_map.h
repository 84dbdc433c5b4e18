// Descriptions of tensors in global memory for the copy engine of Hopper (device_sm90.cuh). Made by
// the driver, on the host, without touching the tensor.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace dwattn::cuda {

// Opaque; the size and alignment of the driver's CUtensorMap.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// A tensor of 16-bit elements (outer, rows, columns), strides in elements, column stride 1. Copies
// move boxes of `box_rows` x 64 columns. 16-byte aligned: the pointer and both strides.
struct TensorShape {
  DType dtype;  // kFloat16 or kBFloat16
  const void* data;
  int64_t columns, rows, outer;
  int64_t row_stride, outer_stride;
  int box_rows;  // at most 256
};

constexpr int kBoxColumns = 64;  // 128 bytes, the width of the exchange of chunks

// kLaunchFailed where the driver knows no tensor maps or refuses this one.
Status make_tensor_map(const TensorShape& shape, TensorMap* map);

}  // namespace dwattn::cuda
