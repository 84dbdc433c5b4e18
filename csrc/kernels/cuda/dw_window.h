// How the fused kernel cuts an image: a block of threads owns a slice of channels and a rectangle
// of output patches, and projects the rectangle plus the neighbours its stencil reaches.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dwattn::cuda {

struct DwPlan {
  int slices;  // of channels
  int rows;    // of a rectangle
  int columns;
  int bands;          // rectangles below each other
  int columns_count;  // rectangles beside each other
};

constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Rectangles of `size` in steps along an axis reach one neighbour on each side that exists.
constexpr int reach(int size, int64_t extent) {
  return static_cast<int>(std::min<int64_t>(extent, size + 2));
}

// The columns of a rectangle are as many as `widest` allows. Rows: few bands repeat little work,
// many bands fill the GPU; the plan with the fewest rounds of tiles wins.
inline DwPlan plan_dw(int64_t batch, int64_t height, int64_t width, int64_t channels, int widest,
                      int tile_rows, int slice, int resident_blocks) {
  DwPlan plan{};
  plan.slices = divide_up(channels, slice);
  plan.columns_count = width <= widest ? 1 : divide_up(width, widest - 2);
  plan.columns = divide_up(width, plan.columns_count);
  plan.columns_count = divide_up(width, plan.columns);
  const int64_t across = batch * plan.slices * plan.columns_count;
  const int64_t reached_columns = reach(plan.columns, width);
  int64_t best = INT64_MAX;
  for (int64_t bands = 1; bands <= height; ++bands) {
    const int rows = divide_up(height, bands);
    if (rows * (bands - 1) >= height) continue;  // the last band would be empty
    const int64_t tiles = divide_up(reach(rows, height) * reached_columns, tile_rows);
    const int64_t rounds = (across * bands + resident_blocks - 1) / resident_blocks * tiles;
    if (rounds < best) {
      best = rounds;
      plan.rows = rows;
      plan.bands = static_cast<int>(bands);
    }
    if (across * bands > 4 * static_cast<int64_t>(resident_blocks))
      break;  // full; only overhead grows
  }
  return plan;
}

}  // namespace dwattn::cuda
