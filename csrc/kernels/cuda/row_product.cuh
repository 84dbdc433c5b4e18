// Products of a few rows with a weight matrix, for which a tile would be mostly empty: a warp reads
// one row of the weights once for four rows, in fp32.
#pragma once

#include "kernels/cuda/band_product.cuh"

namespace dwattn::cuda {

constexpr int kProductWarps = 8;
constexpr int kRowsTogether = 4;

// What a warp makes: one channel of four rows. Rows beyond the last repeat it and are dropped.
struct RowGroup {
  int64_t channel, first, count;

  DWATTN_DEVICE RowGroup(int64_t rows, int64_t channels) : count(rows) {
    const int64_t groups = (channels + kProductWarps - 1) / kProductWarps;
    channel = blockIdx.x % groups * kProductWarps + threadIdx.x / kWarp;
    first = blockIdx.x / groups * kRowsTogether;
  }

  DWATTN_DEVICE bool exists(int i) const { return first + i < count; }
  DWATTN_DEVICE int64_t row(int i) const { return first + i < count ? first + i : count - 1; }
};

// Blocks of kProductWarps warps that such products take.
constexpr int64_t row_product_blocks(int64_t rows, int64_t channels) {
  return (channels + kProductWarps - 1) / kProductWarps *
         ((rows + kRowsTogether - 1) / kRowsTogether);
}

struct RowSums {
  float v[kRowsTogether];
};

template <int kCount, class Row>
DWATTN_DEVICE void load_floats(const Row* from, float (&v)[kCount]) {
  constexpr int kPart = BandChunk<Row>::kVector;
#pragma unroll
  for (int i = 0; i < kCount; i += kPart) {
    float part[kPart];
    load_vector(from + i, part);
#pragma unroll
    for (int e = 0; e < kPart; ++e) v[i + e] = part[e];
  }
}

// Four rows, at their offsets, times a row of weights; every lane gets the sums. `vectors` promises
// 16-byte aligned rows of both whose length is a multiple of the vector of T.
template <class T, class Row>
DWATTN_DEVICE RowSums row_sums(const Row* rows, const int64_t (&offset)[kRowsTogether],
                               const T* weight, int64_t length, bool vectors) {
  constexpr int kVector = BandChunk<T>::kVector;
  const int lane = threadIdx.x % kWarp;
  RowSums sum = {};
  if (vectors) {
#pragma unroll 2
    for (int64_t k = lane * kVector; k < length; k += kWarp * kVector) {
      float w[kVector];
      load_vector(weight + k, w);
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i) {
        float v[kVector];
        load_floats(rows + offset[i] + k, v);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum.v[i] = fmaf(w[e], v[e], sum.v[i]);
      }
    }
  } else {
#pragma unroll 4
    for (int64_t k = lane; k < length; k += kWarp) {
      const float w = to_float(weight[k]);
#pragma unroll
      for (int i = 0; i < kRowsTogether; ++i) {
        sum.v[i] = fmaf(w, to_float(rows[offset[i] + k]), sum.v[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) sum.v[i] = warp_sum(sum.v[i]);
  return sum;
}

}  // namespace dwattn::cuda
