// Products with an operand that stays in shared memory: C (128 x kColumns) += A B^T, with C in the
// registers of 256 threads.
//   A (128 x a chunk of k): rows anywhere in shared memory, given by offsets
//   B (kColumns x a chunk): rows kStride elements apart
// 16-bit types and TF32 run on the tensor cores, fp32 on FMA. Both hand out C in the same way: a
// thread owns kRows rows and in each of them kGroups groups of kVector adjacent columns, 16 bytes
// of T, so that whatever follows reads and writes whole vectors. For this the rows of B are stored
// permuted
// (`stored_row`), which costs nothing.
#pragma once

#include "kernels/cuda/fragments.cuh"

namespace dwattn::cuda {

constexpr int kBandThreads = 256;
constexpr int kBandRows = 128;
constexpr int kBandStages = 3;
constexpr int kBandChunkBytes = 64;  // of k, staged at a time
constexpr int kBandVectorBytes = 16;

// Blocks per multiprocessor that registers are kept for: two hide each other's barriers.
template <class T>
constexpr int kBandBlocks = std::is_same<T, float>::value ? 1 : 2;

template <class T>
struct BandChunk {
  static constexpr int kVector = kBandVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kLength = kBandChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kStride = kLength + kVector;  // ldmatrix and float4 meet all banks once
};

// ---- 16-byte vectors

// Whether rows of `length` elements can be moved by 16-byte vectors.
template <class T>
__host__ __device__ inline bool vectors_aligned(const void* base, int64_t stride, int64_t stride2,
                                                int64_t length) {
  constexpr int64_t kVector = BandChunk<T>::kVector;
  return reinterpret_cast<uintptr_t>(base) % kBandVectorBytes == 0 && stride % kVector == 0 &&
         stride2 % kVector == 0 && length % kVector == 0;
}

template <class T>
DWATTN_DEVICE void load_vector(const T* from, float (&v)[BandChunk<T>::kVector]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  if constexpr (sizeof(T) == 4) {
    memcpy(v, &bits, 16);
  } else {
    const float2 a = unpack2<T>(bits.x), b = unpack2<T>(bits.y), c = unpack2<T>(bits.z),
                 d = unpack2<T>(bits.w);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
    v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
  }
}

template <class T>
DWATTN_DEVICE void store_vector(T* to, const float (&v)[BandChunk<T>::kVector]) {
  uint4 bits;
  if constexpr (sizeof(T) == 4) {
    memcpy(&bits, v, 16);
  } else {
    bits = make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]),
                      pack2<T>(v[6], v[7]));
  }
  *reinterpret_cast<uint4*>(to) = bits;
}

// Elements [k, k + kVector) of a global row to shared memory, with zeros from `count` on. `aligned`
// promises 16-byte aligned rows and a count that is a multiple of kVector.
template <class T>
DWATTN_DEVICE void stage_vector(T* shared, const T* row, int k, int count, bool aligned) {
  if (aligned) {
    cp_async16(shared, row + k, k < count);
    return;
  }
#pragma unroll
  for (int e = 0; e < BandChunk<T>::kVector; ++e) {
    shared[e] = k + e < count ? row[k + e] : from_float<T>(0.0f);
  }
}

// ---- Tensor cores: 4 x 2 warps, each 32 rows x kColumns / 2 columns

template <class T, int kColumns>
class BandProduct {
 public:
  static constexpr int kVector = BandChunk<T>::kVector;
  static constexpr int kGroupFragments = kVector / 2;  // 8 columns wide, two of them per lane
  static constexpr int kGroupColumns = 8 * kGroupFragments;
  static constexpr int kOperandRows = 2;
  static constexpr int kRows = 4;
  static constexpr int kGroups = kColumns / 2 / kGroupColumns;

  DWATTN_DEVICE BandProduct() : lane_(threadIdx.x % kWarp), warp_(threadIdx.x / kWarp) { clear(); }

  DWATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c_[i][j][e] = 0.0f;
      }
    }
  }

  // Where row n of B is stored. Columns 2t, 2t + 1 of the adjacent fragments of a group become the
  // adjacent columns kVector * t ... kVector * (t + 1) - 1 of C.
  static DWATTN_DEVICE int stored_row(int n) {
    const int m = n % kGroupColumns;
    return n - m + m % kVector / 2 * 8 + m / kVector * 2 + m % 2;
  }

  // The rows of A whose offsets `multiply` takes.
  DWATTN_DEVICE int operand_row(int i) const { return first_row() + i * 16 + lane_ % 16; }
  DWATTN_DEVICE int row(int i) const { return first_row() + i / 2 * 16 + i % 2 * 8 + lane_ / 4; }
  DWATTN_DEVICE int column(int g) const {
    return first_column() + g * kGroupColumns + lane_ % 4 * kVector;
  }
  DWATTN_DEVICE float value(int i, int g, int e) const {
    return c_[i / 2][g * kGroupFragments + e / 2][i % 2 * 2 + e % 2];
  }

  // Adds the products of one chunk. Only the first `rows` rows of A matter.
  DWATTN_DEVICE void multiply(const T* a, const int (&offset)[kOperandRows], const T* b, int rows) {
    // Two neighbouring warps share their rows, so that few rows still use all four tensor cores.
    if (first_row() >= rows) return;
#pragma unroll
    for (int k = 0; k < BandChunk<T>::kLength; k += 2 * kVector) {
      uint32_t fa[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_fragments<T>(fa[i], a + offset[i] + k + lane_ / 16 * kVector);
#pragma unroll
      for (int j = 0; j < kFragments / 2; ++j) {
        uint32_t fb[4];
        const int n = first_column() + j * 16 + lane_ % 8 + lane_ / 16 * 8;
        load_fragments<T>(fb, b + n * BandChunk<T>::kStride + k + lane_ / 8 % 2 * kVector);
        const uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_step<T>(c_[i][2 * j], fa[i], left);
          multiply_step<T>(c_[i][2 * j + 1], fa[i], right);
        }
      }
    }
  }

 private:
  DWATTN_DEVICE int first_row() const { return warp_ / 2 * 32; }
  DWATTN_DEVICE int first_column() const { return warp_ % 2 * (kColumns / 2); }

  static constexpr int kFragments = kColumns / 16;  // of a warp, across

  const int lane_, warp_;
  float c_[2][kFragments][4];
};

// ---- fp32: 16 x 16 threads, each 8 rows x kColumns / 16 columns

template <int kColumns>
class BandProduct<float, kColumns> {
 public:
  static constexpr int kVector = BandChunk<float>::kVector;
  static constexpr int kOperandRows = 8;
  static constexpr int kRows = 8;
  static constexpr int kGroups = kColumns / 64;

  DWATTN_DEVICE BandProduct() : tx_(threadIdx.x % 16), ty_(threadIdx.x / 16) { clear(); }

  DWATTN_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 4 * kGroups; ++j) c_[i][j] = 0.0f;
    }
  }

  // A thread reads rows of B that are 16 apart, and owns four adjacent columns of C.
  static DWATTN_DEVICE int stored_row(int n) {
    const int m = n % 64;
    return n - m + m / 4 + m % 4 * 16;
  }

  DWATTN_DEVICE int operand_row(int i) const { return row(i); }
  DWATTN_DEVICE int row(int i) const { return ty_ + 16 * i; }
  DWATTN_DEVICE int column(int g) const { return g * 64 + tx_ * 4; }
  DWATTN_DEVICE float value(int i, int g, int e) const { return c_[i][g * 4 + e]; }

  DWATTN_DEVICE void multiply(const float* a, const int (&offset)[kOperandRows], const float* b,
                              int rows) {
#pragma unroll
    for (int k = 0; k < BandChunk<float>::kLength; k += 4) {
      float4 fb[4 * kGroups];
#pragma unroll
      for (int j = 0; j < 4 * kGroups; ++j) {
        const int n = j / 4 * 64 + j % 4 * 16 + tx_;
        fb[j] = *reinterpret_cast<const float4*>(b + n * BandChunk<float>::kStride + k);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (16 * i >= rows) break;
        const float4 fa = *reinterpret_cast<const float4*>(a + offset[i] + k);
#pragma unroll
        for (int j = 0; j < 4 * kGroups; ++j) {
          float sum = fmaf(fa.x, fb[j].x, c_[i][j]);
          sum = fmaf(fa.y, fb[j].y, sum);
          sum = fmaf(fa.z, fb[j].z, sum);
          c_[i][j] = fmaf(fa.w, fb[j].w, sum);
        }
      }
    }
  }

 private:
  const int tx_, ty_;
  float c_[kRows][4 * kGroups];
};

// ---- Streaming

// Runs `consume(stage)` on `count` chunks which `load(stage)` stages asynchronously, two chunks
// ahead. Stages are `size` elements apart. All threads take part. It ends with a barrier: the
// stages are free, and what `consume` wrote can be read by everyone.
template <class T, class Load, class Consume>
DWATTN_DEVICE void stream_chunks(T* stages, int size, int count, Load& load, Consume& consume) {
#pragma unroll
  for (int s = 0; s < kBandStages - 1; ++s) {
    if (s < count) load(stages + s * size);
    cp_async_commit();
  }
  int current = 0, next = kBandStages - 1;
  for (int i = 0; i < count; ++i) {
    cp_async_wait<kBandStages - 2>();
    __syncthreads();  // everyone's part of this chunk has landed, and the stage of `next` is free
    if (i + kBandStages - 1 < count) load(stages + next * size);
    cp_async_commit();
    consume(stages + current * size);
    current = current + 1 == kBandStages ? 0 : current + 1;
    next = next + 1 == kBandStages ? 0 : next + 1;
  }
  __syncthreads();
}

}  // namespace dwattn::cuda
