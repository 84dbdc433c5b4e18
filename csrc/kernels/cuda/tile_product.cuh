// A 128 x 64 tile of x Wv^T, made by 128 threads from stages in shared memory.
//
// A stage holds 64 bytes of the inner dimension (32 elements of 2 bytes or 16 of 4) of 128 rows of
// x and 64 rows of Wv. Two rows are a line of eight chunks of 16 bytes, whose places are exchanged
// from line to line, so that eight consecutive rows, or every second row, read at one chunk meet
// all banks once.
#pragma once

#include "kernels/cuda/fragments.cuh"

namespace dwattn::cuda {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 64;
constexpr int kTileThreads = 128;
constexpr int kStageRowBytes = 64;
constexpr int kStageBytes = (kTileRows + kTileColumns) * kStageRowBytes;
constexpr int kColumnsOfStage = kTileRows * kStageRowBytes;  // where the rows of Wv start

template <class T>
constexpr int kStageDepth = kStageRowBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Byte offset of a chunk in the rows of a stage.
DWATTN_DEVICE unsigned chunk_offset(unsigned row, unsigned chunk) {
  return row / 2 * (2 * kStageRowBytes) + ((row % 2 * 4 + chunk) ^ (row / 2 % 8)) * 16;
}
// 16 rows further the exchange is the same, so only the distance counts.
constexpr int kSixteenRows = 16 * kStageRowBytes;

// One chunk from global memory of which `left` elements exist (if any), else zeros.
template <class T, bool kAligned>
DWATTN_DEVICE void load_chunk(unsigned char* to, const T* from, int left) {
  if constexpr (kAligned) {
    cp_async16(to, from, left > 0);
  } else {
    T* const elements = reinterpret_cast<T*>(to);
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      elements[e] = e < left ? from[e] : from_float<T>(0.0f);
    }
  }
}

// The accumulators of one thread. Two-byte elements and TF32: four warps of 64 x 32, on the tensor
// cores.
template <class T>
class TileProduct {
 public:
  DWATTN_DEVICE TileProduct() {
    const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      rows_[k] = chunk_offset(first_row() + lane % 16, 2 * k + lane / 16);
      columns_[k] = kColumnsOfStage +
                    chunk_offset(first_column() + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
    }
  }

  // Whether this warp has to do with the first `rows` rows of the tile.
  static DWATTN_DEVICE bool reaches(int rows) { return static_cast<int>(first_row()) < rows; }

  DWATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[i][j][e] = 0.0f;
      }
    }
  }

  DWATTN_DEVICE void add(const unsigned char* stage) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) load_fragments<T>(b[j], stage + columns_[k] + j * kSixteenRows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        load_fragments<T>(a, stage + rows_[k] + i * kSixteenRows);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_step<T>(sum_[i][j], a, pair);
        }
      }
    }
  }

  // put(row, column, v, w): elements (row, column) and (row, column + 1).
  template <class Put>
  DWATTN_DEVICE void for_each_pair(const Put& put) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = static_cast<int>(first_row()) + i * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = static_cast<int>(first_column()) + j * 8 + lane % 4 * 2;
          put(row, column, sum_[i][j][2 * half], sum_[i][j][2 * half + 1]);
        }
      }
    }
  }

 private:
  static constexpr int kSteps = kStageRowBytes / 32;  // in a stage

  static DWATTN_DEVICE unsigned first_row() { return threadIdx.x / kWarp / 2 * 64; }
  static DWATTN_DEVICE unsigned first_column() { return threadIdx.x / kWarp % 2 * 32; }

  float sum_[4][4][4];
  unsigned rows_[kSteps], columns_[kSteps];  // byte offsets in a stage of the rows this lane names
};

// fp32: 16 x 8 threads, each with rows y, y + 16, ... and the column pairs 2x, 2x + 16, ...
template <>
class TileProduct<float> {
 public:
  static DWATTN_DEVICE bool reaches(int) { return true; }

  DWATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum_[i][j] = 0.0f;
    }
  }

  DWATTN_DEVICE void add(const unsigned char* stage) {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      float4 b[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) b[j] = load(stage + kColumnsOfStage, column_of(j), chunk);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 a = load(stage, threadIdx.x / 8 + 16 * i, chunk);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float sum = fmaf(a.x, b[j].x, sum_[i][j]);
          sum = fmaf(a.y, b[j].y, sum);
          sum = fmaf(a.z, b[j].z, sum);
          sum_[i][j] = fmaf(a.w, b[j].w, sum);
        }
      }
    }
  }

  template <class Put>
  DWATTN_DEVICE void for_each_pair(const Put& put) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        put(threadIdx.x / 8 + 16 * i, column_of(j), sum_[i][j], sum_[i][j + 1]);
      }
    }
  }

 private:
  static DWATTN_DEVICE unsigned column_of(int j) {
    return threadIdx.x % 8 * 2 + j / 2 * 16 + j % 2;
  }
  static DWATTN_DEVICE float4 load(const unsigned char* rows, unsigned row, int chunk) {
    return *reinterpret_cast<const float4*>(rows + chunk_offset(row, chunk));
  }

  float sum_[8][8];
};

}  // namespace dwattn::cuda
