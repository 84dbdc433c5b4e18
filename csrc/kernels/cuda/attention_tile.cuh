// Pieces of attention for a block of 128 threads: a tile of 64 queries in shared memory meets tiles
// of keys and values. Rows of a tile are `stride` elements apart; the head dimension is padded with
// zeros. 16-bit types run on the tensor cores, fp32 on FMA, behind one interface:
//   Scores   S (64 x kKeys) = Q K^T; a thread owns kRows rows and kColumns columns of it, and the
//            kSharing threads that share a row are neighbours in a warp
//   Outputs  O (64 x kHead) += P V for the same rows
#pragma once

#include "kernels/cuda/device.cuh"

namespace dwattn::cuda {

constexpr int kQueries = 64;
constexpr int kAttentionThreads = 128;
constexpr int kHeadStep = 16;  // the padded head dimension is a multiple of it

// Elements between rows of a tile: no bank conflicts in ldmatrix and float4 reads.
template <class T>
__host__ __device__ constexpr int row_stride(int padded_head) {
  return padded_head + 16 / static_cast<int>(sizeof(T));
}

// Rows of q, k or v of one (image, head).
template <class T>
struct HeadRows {
  const T* base;
  int64_t stride;
  int tokens, length;
  bool aligned;  // 16-byte aligned rows whose length is a multiple of 16 bytes

  DWATTN_DEVICE HeadRows(const void* data, int64_t offset, int64_t token_stride, int64_t n,
                         int64_t head_dim)
      : base(static_cast<const T*>(data) + offset),
        stride(token_stride),
        tokens(static_cast<int>(n)),
        length(static_cast<int>(head_dim)) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % kVector == 0 &&
              length % kVector == 0;
  }

  // Stages rows [first, first + count), zeros where there is no element. Asynchronous if aligned.
  DWATTN_DEVICE void stage(T* to, int first, int count, int padded_head) const {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const int vectors = padded_head / kVector;
    for (int i = threadIdx.x; i < count * vectors; i += kAttentionThreads) {
      const int row = i / vectors, c = i % vectors * kVector, token = first + row;
      T* const shared = to + row * row_stride<T>(padded_head) + c;
      const bool exists = token < tokens;
      const T* const from = base + (exists ? token * stride : 0) + c;
      if (aligned) {
        cp_async16(shared, from, exists && c < length);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        shared[e] = exists && c + e < length ? from[e] : from_float<T>(0.0f);
      }
    }
  }
};

// ---- Tensor cores: four warps of 16 rows

template <class T, int kKeys>
class Scores {
 public:
  static constexpr int kRows = 2;
  static constexpr int kColumns = kKeys / 4;
  static constexpr int kSharing = 4;

  static DWATTN_DEVICE int row(int i) {
    return threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + 8 * i;
  }
  static DWATTN_DEVICE int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  DWATTN_DEVICE float& at(int i, int j) { return s_[j / 2][i * 2 + j % 2]; }

  DWATTN_DEVICE void compute(const T* q, const T* k, int padded_head) {
    const int lane = threadIdx.x % kWarp, stride = row_stride<T>(padded_head);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s_[n][e] = 0.0f;
    }
    const T* const a = q + (threadIdx.x / kWarp * 16 + lane % 16) * stride + lane / 16 * 8;
    const T* const b = k + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
    for (int d = 0; d < padded_head; d += kHeadStep) {
      uint32_t fa[4];
      ldmatrix_x4(fa, a + d);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t fb[4];
        ldmatrix_x4(fb, b + n * 16 * stride + d);
        const uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
        mma_16816<T>(s_[2 * n], fa, left);
        mma_16816<T>(s_[2 * n + 1], fa, right);
      }
    }
  }

  // Columns 16 n ... 16 n + 15 of S, rounded: the left operand of the next product.
  DWATTN_DEVICE void operand(int n, uint32_t (&a)[4]) const {
    a[0] = pack2<T>(s_[2 * n][0], s_[2 * n][1]);
    a[1] = pack2<T>(s_[2 * n][2], s_[2 * n][3]);
    a[2] = pack2<T>(s_[2 * n + 1][0], s_[2 * n + 1][1]);
    a[3] = pack2<T>(s_[2 * n + 1][2], s_[2 * n + 1][3]);
  }

 private:
  float s_[kKeys / 8][4];
};

template <class T, int kHead, int kKeys>
class Outputs {
 public:
  static constexpr size_t kScratch = 0;  // elements of shared memory for P

  DWATTN_DEVICE Outputs() {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o_[n][e] = 0.0f;
    }
  }

  DWATTN_DEVICE void scale(int i, float factor) {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      o_[n][2 * i] *= factor;
      o_[n][2 * i + 1] *= factor;
    }
  }

  // Row i times `factor` to the first `length` elements at `to`.
  DWATTN_DEVICE void write(int i, T* to, int length, float factor) const {
    const bool pairs = reinterpret_cast<uintptr_t>(to) % 4 == 0 && length % 2 == 0;
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n) {
      const int c = n * 8 + threadIdx.x % 4 * 2;
      const float low = o_[n][2 * i] * factor, high = o_[n][2 * i + 1] * factor;
      if (pairs) {
        if (c < length) *reinterpret_cast<uint32_t*>(to + c) = pack2<T>(low, high);
      } else {
        if (c < length) to[c] = from_float<T>(low);
        if (c + 1 < length) to[c + 1] = from_float<T>(high);
      }
    }
  }

  DWATTN_DEVICE void keep(const Scores<T, kKeys>&, T*) const {}

  DWATTN_DEVICE void add(const Scores<T, kKeys>& p, const T*, const T* v, int padded_head) {
    const int lane = threadIdx.x % kWarp, stride = row_stride<T>(padded_head);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t fa[4];
      p.operand(n, fa);
      const T* const b = v + (n * 16 + lane % 16) * stride + lane / 16 * 8;
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) {
        if (d * 16 >= padded_head) break;
        uint32_t fb[4];
        ldmatrix_x4_trans(fb, b + d * 16);
        const uint32_t left[2] = {fb[0], fb[1]}, right[2] = {fb[2], fb[3]};
        mma_16816<T>(o_[2 * d], fa, left);
        mma_16816<T>(o_[2 * d + 1], fa, right);
      }
    }
  }

 private:
  float o_[kHead / 8][4];
};

// ---- fp32: 16 x 8 threads

template <int kKeys>
class Scores<float, kKeys> {
 public:
  static constexpr int kRows = 4;
  static constexpr int kColumns = kKeys / 8;
  static constexpr int kSharing = 8;

  static DWATTN_DEVICE int row(int i) { return threadIdx.x / 8 + 16 * i; }
  static DWATTN_DEVICE int column(int j) { return threadIdx.x % 8 + 8 * j; }
  DWATTN_DEVICE float& at(int i, int j) { return s_[i][j]; }
  DWATTN_DEVICE float at(int i, int j) const { return s_[i][j]; }

  DWATTN_DEVICE void compute(const float* q, const float* k, int padded_head) {
    const int stride = row_stride<float>(padded_head);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) s_[i][j] = 0.0f;
    }
    const float* const a = q + row(0) * stride;
    const float* const b = k + column(0) * stride;
    for (int d = 0; d < padded_head; d += 4) {
      float4 fa[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        fa[i] = *reinterpret_cast<const float4*>(a + i * 16 * stride + d);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float4 fb = *reinterpret_cast<const float4*>(b + j * 8 * stride + d);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float sum = fmaf(fa[i].x, fb.x, s_[i][j]);
          sum = fmaf(fa[i].y, fb.y, sum);
          sum = fmaf(fa[i].z, fb.z, sum);
          s_[i][j] = fmaf(fa[i].w, fb.w, sum);
        }
      }
    }
  }

 private:
  float s_[kRows][kColumns];
};

template <int kHead, int kKeys>
class Outputs<float, kHead, kKeys> {
 public:
  static constexpr int kRows = Scores<float, kKeys>::kRows;
  static constexpr int kColumns = kHead / 8;
  static constexpr int kStride = kKeys + 4;
  static constexpr size_t kScratch = kQueries * kStride;

  static DWATTN_DEVICE int column(int j) { return threadIdx.x % 8 + 8 * j; }

  DWATTN_DEVICE Outputs() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) o_[i][j] = 0.0f;
    }
  }

  DWATTN_DEVICE void scale(int i, float factor) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) o_[i][j] *= factor;
  }

  DWATTN_DEVICE void write(int i, float* to, int length, float factor) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (column(j) < length) to[column(j)] = o_[i][j] * factor;
    }
  }

  // P goes through shared memory, since the threads of a row need all of it.
  DWATTN_DEVICE void keep(const Scores<float, kKeys>& p, float* scratch) const {
    using P = Scores<float, kKeys>;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < P::kColumns; ++j)
        scratch[P::row(i) * kStride + P::column(j)] = p.at(i, j);
    }
  }

  DWATTN_DEVICE void add(const Scores<float, kKeys>&, const float* scratch, const float* v,
                         int padded_head) {
    const int stride = row_stride<float>(padded_head);
    for (int k = 0; k < kKeys; ++k) {
      float p[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) p[i] = scratch[Scores<float, kKeys>::row(i) * kStride + k];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (8 * j >= padded_head) break;
        const float value = v[k * stride + column(j)];
#pragma unroll
        for (int i = 0; i < kRows; ++i) o_[i][j] = fmaf(p[i], value, o_[i][j]);
      }
    }
  }

 private:
  float o_[kRows][kColumns];
};

}  // namespace dwattn::cuda
