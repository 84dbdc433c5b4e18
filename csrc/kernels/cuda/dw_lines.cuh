// The sliding window of V in shared memory from which the fused kernels aggregate, and the part of
// an image that a block of threads owns.
#pragma once

#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/dw_window.h"
#include "kernels/cuda/pairs.cuh"

namespace dwattn::cuda {

// Tokens of V kept from earlier tiles: the stencil of the first output that had to wait for this
// tile reaches back one row and one token, and that output lies one row and one token back itself.
__host__ __device__ constexpr int history(int window_width) { return 2 * (window_width + 1); }

DWATTN_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The part of an image that a block projects (its window) and the part that it writes.
struct Window {
  int64_t image;
  int64_t channel;         // first of the slice
  int top, left;           // of the window in the grid
  int height, width;       // of the window
  int first_row, end_row;  // written, in rows of the window
  int first_column, end_column;

  // Of the index-th piece of the plan, whose slices are `slice` channels wide.
  DWATTN_DEVICE Window(const DwAttentionParams& p, const DwPlan& plan, unsigned index, int slice) {
    channel = static_cast<int64_t>(index % plan.slices) * slice;
    index /= plan.slices;
    const int column = static_cast<int>(index % plan.columns_count) * plan.columns;
    index /= plan.columns_count;
    const int row = static_cast<int>(index % plan.bands) * plan.rows;
    image = index / plan.bands;
    cut(row, plan.rows, static_cast<int>(p.height), top, height, first_row, end_row);
    cut(column, plan.columns, static_cast<int>(p.width), left, width, first_column, end_column);
  }

  DWATTN_DEVICE int tokens() const { return height * width; }

  // Index in the grid of a token of the window.
  DWATTN_DEVICE int64_t patch(const DwAttentionParams& p, int row, int column) const {
    return (top + row) * p.width + left + column;
  }

 private:
  static DWATTN_DEVICE void cut(int begin, int size, int extent, int& start, int& length,
                                int& first, int& end) {
    const int stop = min(begin + size, extent);
    start = max(begin - 1, 0);
    length = min(stop + 1, extent) - start;
    first = begin - start;
    end = stop - start;
  }
};

// V in shared memory: a line of zeros, the history, the tile; a line is the channels of a token,
// and lines are kStride elements apart.
template <class T, int kStride>
struct Lines {
  T* zeros;
  int history;  // lines

  DWATTN_DEVICE T* at(int line) const { return zeros + (1 + line) * kStride; }

  // At first nothing but zeros: the row above the window is never inside the grid.
  DWATTN_DEVICE void clear(int thread, int threads) const {
    for (int i = thread; i < (1 + history) * kStride; i += threads) zeros[i] = from_float<T>(0.0f);
  }

  // The end of a tile of `tile_lines` becomes the history of the next one. They do not overlap.
  DWATTN_DEVICE void advance(int tile_lines, int thread, int threads) const {
    constexpr int kChunks = kStride * static_cast<int>(sizeof(T)) / 16;
    uint4* const to = reinterpret_cast<uint4*>(at(0));
    const uint4* const from = reinterpret_cast<const uint4*>(at(tile_lines));
    for (int i = thread; i < history * kChunks; i += threads) to[i] = from[i];
  }
};

// What a lane needs to aggregate its pair of channels.
struct PairCoefficients {
  float2 taps[9], ctx;
};

// sum + the taps of one column of the stencil.
DWATTN_DEVICE float2 add_column(const float2 (&taps)[9], int column, const float2 (&v)[3],
                                float2 sum) {
#pragma unroll
  for (int r = 0; r < 3; ++r) sum = fma2(taps[3 * r + column], v[r], sum);
  return sum;
}

// Writes the outputs of the window's tokens begin..end-1 for the channels pair, pair + 1 of its
// slice; `tile` is the first token in the tile. Every column of V is loaded once and feeds the
// outputs to its left, at its place and to its right.
template <class T, bool kAligned, int kStride>
DWATTN_DEVICE void aggregate(const DwAttentionParams& p, const Window& window,
                             const Lines<T, kStride>& lines, const PairCoefficients& k, int pair,
                             int tile, int begin, int end) {
  if (begin >= end) return;
  const int valid = static_cast<int>(least(p.channels - window.channel - pair, 2));
  const int below = window.width * kStride;
  int row = begin / window.width, column = begin - row * window.width;
  const int start = column > 0 ? begin - 1 : begin;  // the left neighbour only contributes
  column -= begin - start;
  const T* v = lines.at(lines.history + start - tile) + pair;
  T* y = static_cast<T*>(p.y) + window.image * p.y_stride_batch +
         window.patch(p, row, column) * p.y_stride_token + window.channel + pair;
  const int64_t next_row = (p.width - window.width) * p.y_stride_token;
  const auto put = [&](int token, int at, T* to, float2 sum) {
    if (token >= begin && token < end && at >= window.first_column && at < window.end_column) {
      store_pair<T, kAligned>(to, sum, valid);
    }
  };

  float2 here = k.ctx, right = k.ctx;  // sums so far of the outputs at this column and at the next
  for (int token = start; token <= end; ++token) {
    if (token == end && column == 0) break;  // the last output had no right neighbour
    float2 column_v[3];
    column_v[0] = load_whole_pair(v - below);
    column_v[1] = load_whole_pair(v);
    column_v[2] = load_whole_pair(row + 1 < window.height ? v + below : lines.zeros + pair);
    if (column > 0) {
      put(token - 1, column - 1, y - p.y_stride_token, add_column(k.taps, 2, column_v, here));
    }
    here = add_column(k.taps, 1, column_v, right);
    right = add_column(k.taps, 0, column_v, k.ctx);
    if (++column == window.width) {
      put(token, column - 1, y, here);
      right = k.ctx;
      column = 0;
      ++row;
      y += next_row;
    }
    v += kStride;
    y += p.y_stride_token;
  }
}

}  // namespace dwattn::cuda
