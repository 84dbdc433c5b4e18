// Attention and running statistics of its maps on the CPU. See ../attention_variance_params.h for
// the definition.
//
// Work is cut into tiles: up to kMaxTileRows queries of one head, for all images of the batch. Keys
// and values of a head are brought together once for several tiles. A tile forms S = scale Q K^T
// with its queries along the lanes of vectors, so that neither K nor V is transposed and a softmax
// runs down the lanes, multiplies by V while E is in the cache, and folds E into the moments of the
// batch, which meet the state once per call, or per kPackedBytes of keys and values. E exists for a
// tile and kImagesPerFold images only. Queries that the state leaves out are not in tiles: one more
// query behind whole vectors would cost as much as another vector of them.
#pragma once

#include "kernels/attention_variance_params.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"

namespace dwattn::cpu {

// Bytes of scratch memory for `workers` tasks at a time, which need 64-byte alignment.
int64_t attention_variance_workspace(const AttentionVarianceParams& params, int64_t workers);

// Inputs fp32, fp16 or bf16, computed in fp32; the state is fp64. E of an image and `out` have the
// same bits however images are batched and work is divided among threads.
Status attention_variance(const AttentionVarianceParams& params, void* workspace, int64_t workers,
                          const ParallelFor& parallel, Isa isa = Isa::kAuto);

// Images whose E is kept until it is folded: fewer passes over the moments.
constexpr int64_t kImagesPerFold = 4;
// Lanes and channels are padded to a multiple of every vector width.
constexpr int64_t kLanePad = 16;
constexpr int64_t padded_lanes(int64_t count) {
  return (count + kLanePad - 1) / kLanePad * kLanePad;
}
// Keys whose weights are multiplied by V at a time.
constexpr int64_t kKeyBlock = 96;

// How a head is cut into tiles, and what one tile needs, in bytes.
struct AttentionTiles {
  explicit AttentionTiles(const AttentionVarianceParams& params);

  // First query of a tile; the tiles are as equal as whole vectors allow.
  int64_t first_row(int64_t tile) const { return skip + tile * vectors / per_head * kLanePad; }

  int64_t skip;      // queries in front of the tiles
  int64_t vectors;   // of kLanePad queries, in a head
  int64_t per_head;  // tiles
  int64_t lanes;     // of a tile, at most
  int64_t channels;  // padded d_h
  int64_t images;    // whose keys and values are packed at a time
  int64_t packed_bytes, weights_bytes, shift_bytes, sums_bytes, queries_bytes, output_bytes;
  int64_t bytes() const {
    return packed_bytes + weights_bytes + shift_bytes + 2 * sums_bytes + 2 * queries_bytes +
           output_bytes;
  }
};

#define DWATTN_DECLARE_ISA(ISA)                                                                 \
  namespace ISA {                                                                               \
  Status attention_variance(const AttentionVarianceParams& params, const AttentionTiles& tiles, \
                            void* workspace, int64_t workers, const ParallelFor& parallel);     \
  }
DWATTN_DECLARE_ISA(generic)
DWATTN_DECLARE_ISA(avx2)
DWATTN_DECLARE_ISA(avx512)
#undef DWATTN_DECLARE_ISA

}  // namespace dwattn::cpu
