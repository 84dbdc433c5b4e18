// What both kinds of prefix rows share: where their rows lie, and checks and launches.
#pragma once

#include "kernels/cuda/prefix_rows.h"
#include "kernels/cuda/row_product.cuh"

namespace dwattn::cuda {

// The prefix tokens of all images are numbered through; they are fewer than 2^30.
struct PrefixPlace {
  int64_t image, token;

  DWATTN_DEVICE PrefixPlace(const PrefixRowsParams& p, int64_t row)
      : image(static_cast<unsigned>(row) / static_cast<unsigned>(p.num_prefix)),
        token(row - image * p.num_prefix) {}
};

// Offsets in x of the rows of a group.
DWATTN_DEVICE void offsets_in_x(const PrefixRowsParams& p, const RowGroup& group,
                                int64_t (&offset)[kRowsTogether]) {
#pragma unroll
  for (int i = 0; i < kRowsTogether; ++i) {
    const PrefixPlace place(p, group.row(i));
    offset[i] = place.image * p.x_stride_batch + place.token * p.x_stride_token;
  }
}

template <class T>
DWATTN_DEVICE void write_row(const PrefixRowsParams& p, int64_t row, int64_t channel, float value) {
  const PrefixPlace place(p, row);
  static_cast<T*>(
      p.rows)[place.image * p.rows_stride_batch + place.token * p.rows_stride_token + channel] =
      from_float<T>(value);
}

template <class T>
DWATTN_DEVICE bool x_vectors(const PrefixRowsParams& p) {
  return vectors_aligned<T>(p.x, p.x_stride_batch, p.x_stride_token, p.dim);
}

DWATTN_DEVICE float bias_of(const float* bias, int64_t channel) {
  return bias != nullptr ? bias[channel] : 0.0f;
}

template <class... Params>
Status launch_blocks(void (*kernel)(Params...), int64_t blocks, int warps, size_t shared,
                     Stream stream, typename AsIs<Params>::type... arguments) {
  if (blocks > INT32_MAX) return Status::kInvalidArgument;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(static_cast<unsigned>(warps * kWarp)), shared, stream, arguments...);
}

inline bool valid(const PrefixRowsParams& p) {
  constexpr int64_t kMost = 1 << 30;
  const auto within = [](int64_t size) { return size >= 1 && size < kMost; };
  return within(p.batch) && within(p.num_prefix) && p.num_prefix < kMost / p.batch &&
         within(p.patches) && within(p.dim) && within(p.channels) && p.x != nullptr &&
         p.value != nullptr && p.rows != nullptr;
}

}  // namespace dwattn::cuda
