#include "kernels/cpu/attention_variance.h"

namespace dwattn::cpu {
namespace {

// A tile should stay in the second-level cache of one core, beside the keys and values that stream
// through it.
constexpr int64_t kTileBytes = 5 << 18;
constexpr int64_t kMaxTileRows = 64;
// Keys and values of so many bytes are packed at a time: they come from the cache that all cores
// share, in order, while a tile is computed.
constexpr int64_t kPackedBytes = 8 << 20;

constexpr int64_t line(int64_t bytes) { return (bytes + 63) & -64; }

bool valid(const AttentionVarianceParams& p) {
  const bool sizes = p.heads >= 1 && p.tokens >= 1 && p.head_dim >= 1;
  const bool pointers = p.q != nullptr && p.k != nullptr && (p.v == nullptr) == (p.out == nullptr);
  const bool state =
      p.mean != nullptr && p.m2 != nullptr && p.count >= 0 && p.skip >= 0 && p.skip < p.tokens;
  return sizes && pointers && state;
}

}  // namespace

AttentionTiles::AttentionTiles(const AttentionVarianceParams& p)
    : skip(p.skip),
      vectors(padded_lanes(p.tokens - p.skip) / kLanePad),
      channels(padded_lanes(p.head_dim)) {
  const int64_t folded = p.batch < kImagesPerFold ? p.batch : kImagesPerFold;
  const int64_t per_row = p.tokens * (4 * folded + 4 + 2 * 8);
  int64_t rows = kTileBytes / per_row / kLanePad * kLanePad;
  rows = rows < kLanePad ? kLanePad : rows > kMaxTileRows ? kMaxTileRows : rows;
  const int64_t most = rows / kLanePad;
  per_head = (vectors + most - 1) / most;
  lanes = (vectors + per_head - 1) / per_head * kLanePad;
  weights_bytes = line((p.tokens + 1) * lanes * folded * 4);  // and 1 / sum of each row
  shift_bytes = line(p.tokens * lanes * 4);
  sums_bytes = line(p.tokens * lanes * 8);
  queries_bytes = line(channels * lanes * 4);          // once as they come, once transposed
  output_bytes = line(lanes * (channels + 2) * 4);     // and maxima and sums of the rows
  const int64_t packed = 2 * p.tokens * channels * 4;  // of an image
  images = kPackedBytes / packed / kImagesPerFold * kImagesPerFold;
  images = images < folded ? folded : images > p.batch ? p.batch : images;
  packed_bytes = line(images * packed);
}

int64_t attention_variance_workspace(const AttentionVarianceParams& params, int64_t workers) {
  return AttentionTiles(params).bytes() * workers;
}

Status attention_variance(const AttentionVarianceParams& params, void* workspace, int64_t workers,
                          const ParallelFor& parallel, Isa isa) {
  if (params.batch == 0) return Status::kOk;
  if (!valid(params) || workspace == nullptr || workers < 1) return Status::kInvalidArgument;
  if (params.state_dtype != DType::kFloat64) return Status::kUnsupportedDType;
  if (isa == Isa::kAuto) isa = default_isa();
  if (!isa_usable(isa)) return Status::kUnsupportedIsa;
  const AttentionTiles tiles(params);
  switch (isa) {
#ifdef DWATTN_HAVE_AVX512
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::attention_variance(params, tiles, workspace, workers, parallel);
#endif
#ifdef DWATTN_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::attention_variance(params, tiles, workspace, workers, parallel);
#endif
    default:
      return generic::attention_variance(params, tiles, workspace, workers, parallel);
  }
}

}  // namespace dwattn::cpu
