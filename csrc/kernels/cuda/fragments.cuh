// Operands of the tensor cores from rows of shared memory, the same for every type: a step is 32
// bytes of each row, 16 elements of two bytes or 8 of TF32, and ldmatrix deals them out as the
// products want them (four bytes of a row are two elements of two bytes or one of TF32).
#pragma once

#include <type_traits>

#include "kernels/cuda/device.cuh"

namespace dwattn::cuda {

// Four 8-row pieces of 16 bytes: ldmatrix_x4, rounded to what is multiplied.
template <class T>
DWATTN_DEVICE void load_fragments(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4(r, row);
  if constexpr (std::is_same<T, Tf32>::value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = round_tf32(r[i]);
  }
}

// c (16x8, fp32) += the products of a step.
template <class T>
DWATTN_DEVICE void multiply_step(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<T, Tf32>::value) {
    mma_1688_tf32(c, a, b);
  } else {
    mma_16816<T>(c, a, b);
  }
}

}  // namespace dwattn::cuda
