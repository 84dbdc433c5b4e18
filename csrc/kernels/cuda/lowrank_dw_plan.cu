// How lowrank_dw_attention cuts its work into blocks, and what a block keeps in shared memory. Host
// code.
#include <algorithm>
#include <limits>

#include "kernels/cuda/band_product.cuh"
#include "kernels/cuda/lowrank_dw_attention.h"

namespace dwattn::cuda {
namespace {

constexpr int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// The plan for a given tile. Rows of patches are kept three more than the tile has: one above, one
// below, and one so that the aggregation can write over what it no longer needs.
LowrankDwPlan plan_of_tile(const LowrankDwParams& p, int64_t height, int64_t width) {
  const int64_t size = dtype_size(p.dtype);
  const int64_t channels = parts(p.rank, kBandChunkBytes / size) * (kBandChunkBytes / size);
  const int64_t slot_stride = channels + kBandVectorBytes / size;
  const int64_t rank_tile = p.rank <= 64 ? 64 : 128;
  const int64_t stage_rows = kBandRows + rank_tile;
  const int64_t stage_bytes = stage_rows * (kBandChunkBytes + kBandVectorBytes);
  LowrankDwPlan plan;
  plan.tile_height = static_cast<int32_t>(height);
  plan.tile_width = static_cast<int32_t>(width);
  plan.channels = static_cast<int32_t>(channels);
  plan.slot_stride = static_cast<int32_t>(slot_stride);
  plan.rank_tile = static_cast<int32_t>(rank_tile);
  plan.shared_bytes = (height + 3) * (width + 2) * slot_stride * size + kBandStages * stage_bytes;
  plan.blocks = p.batch * parts(p.height, height) * parts(p.width, width);
  return plan;
}

// Time of a block in units of 32 tokens, the share of a warp, passing through one of the products.
// The weights pass through the multiprocessor once per tile of tokens; starting costs about two
// units.
int64_t block_cost(const LowrankDwParams& p, int64_t height, int64_t width) {
  constexpr int64_t kWarpTokens = 32, kStart = 2;
  const int64_t inner = std::min(height + 2, p.height) * std::min(width + 2, p.width);
  const int64_t outer = height * width;
  return parts(inner, kWarpTokens) + parts(outer, kWarpTokens) + parts(inner, kBandRows) +
         parts(outer, kBandRows) + kStart;
}

// Two blocks that share a multiprocessor hide each other's waiting. The kernel for fp32 has no
// registers for two, in TF32 neither.
double total_cost(const LowrankDwParams& p, const DeviceLimits& limits, const LowrankDwPlan& plan) {
  constexpr int64_t kReserved = 1024;  // bytes per block, by the driver
  constexpr double kSharing = 0.85;
  const bool fits_twice = p.dtype != DType::kFloat32 &&
                          2 * (plan.shared_bytes + kReserved) <= limits.shared_bytes + kReserved;
  const int64_t rounds = parts(plan.blocks, limits.multiprocessors);
  return static_cast<double>(rounds) *
         static_cast<double>(block_cost(p, plan.tile_height, plan.tile_width)) *
         (fits_twice && rounds > 1 ? kSharing : 1.0);
}

bool sizes_valid(const LowrankDwParams& p) {
  const auto within = [](int64_t size, int64_t end) { return size >= 1 && size < end; };
  constexpr int64_t kSide = 1 << 15, kFeatures = 1 << 20, kImages = int64_t{1} << 31;
  return within(p.height, kSide) && within(p.width, kSide) && within(p.dim, kFeatures) &&
         within(p.dim_out, kFeatures) && within(p.rank, kFeatures) && p.batch >= 0 &&
         p.batch < kImages && p.num_prefix >= 0;
}

// The smallest number of parts above the one that makes parts of `part`, that makes smaller ones.
int64_t next_parts(int64_t size, int64_t part) {
  return part == 1 ? size + 1 : parts(size, part - 1);
}

}  // namespace

// Tries every tile that cuts the grid into equal parts: about 4 sqrt(height * width) of them.
Status plan_lowrank_dw(const LowrankDwParams& p, const DeviceLimits& limits, LowrankDwPlan* plan) {
  if (p.dtype == DType::kFloat64) return Status::kUnsupportedDType;
  if (!sizes_valid(p) || limits.multiprocessors < 1) return Status::kInvalidArgument;
  double best = std::numeric_limits<double>::infinity();
  int64_t height = 0, width = 0;
  for (int64_t rows = 1; rows <= p.height; rows = next_parts(p.height, height)) {
    height = parts(p.height, rows);
    for (int64_t columns = 1; columns <= p.width; columns = next_parts(p.width, width)) {
      width = parts(p.width, columns);
      const LowrankDwPlan tried = plan_of_tile(p, height, width);
      if (tried.shared_bytes > limits.shared_bytes ||
          tried.blocks > std::numeric_limits<int32_t>::max()) {
        continue;
      }
      const double cost = total_cost(p, limits, tried);
      if (cost < best) {
        best = cost;
        *plan = tried;
      }
    }
  }
  return best < std::numeric_limits<double>::infinity() ? Status::kOk : Status::kInvalidArgument;
}

}  // namespace dwattn::cuda
