// The matrix product of bf16 by AVX512_BF16, with sums in fp32: one instruction adds the products
// of sixteen pairs of numbers to sixteen sums.
//
// A tile of kRows x kPanel results stays in registers over the whole depth. The weight is packed
// into strips of 16 columns, a pair of numbers of each side by side; a tile reads the strips of its
// panel in order, and its rows as they lie, a pair at a time.
#include "kernels/cpu/gemm_avx512_bf16.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/cpu/half.h"
#include "kernels/cpu/pairs_impl.h"
#include "kernels/cpu/unroll.h"

namespace dwattn::cpu::pairs {
namespace {

constexpr int64_t kLanes = 16,
                  kDepth = 32;  // columns of a strip, and numbers of a transposed block
constexpr int64_t kBlockBytes = kLanes * kDepth * 2;
constexpr int kRows = 6, kStrips = 4;  // 24 of the 32 registers hold sums
constexpr int64_t kPanel = kStrips * kLanes;

constexpr int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
constexpr int64_t strip_bytes(int64_t k) { return pieces(k, kDepth) * kBlockBytes; }

const char* bytes(const BFloat16* at) { return reinterpret_cast<const char*>(at); }

// Columns j..j+15 of the product are rows of the weight; zeros behind the last one and behind the
// last number of each.
void pack_strip(const WeightParams& p, int64_t j, char* to) {
  const BFloat16* const weight = static_cast<const BFloat16*>(p.weight) + j * p.stride;
  const int64_t rows = std::min(p.n - j, kLanes);
  for (int64_t k = 0; k < p.k; k += kDepth, to += kBlockBytes) {
    const int64_t depth = std::min(p.k - k, kDepth);
    if (rows == kLanes && depth == kDepth) {
      transpose_pairs(bytes(weight + k), 2 * p.stride, to);
      continue;
    }
    alignas(64) BFloat16 padded[kLanes][kDepth] = {};
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(padded[row], weight + row * p.stride + k, static_cast<size_t>(2 * depth));
    }
    transpose_pairs(bytes(padded[0]), sizeof padded[0], to);
  }
}

// Whether the last pair of a row would take the number behind it: such rows are copied first.
constexpr bool copied(int64_t k) { return k % 2 != 0; }
constexpr int64_t copied_stride(int64_t k) { return k + 1; }

class Gemm {
 public:
  Gemm(const GemmParams& p, void* workspace)
      : p_(p),
        pairs_(pieces(p.k, 2)),
        strip_bytes_(strip_bytes(p.k)),
        copies_(static_cast<BFloat16*>(workspace)) {}

  void run(const ParallelFor& parallel) const {
    const int64_t block = rows_of_a_block(p_, kRows, 2 * p_.n * p_.k, parallel.threads);
    const int64_t blocks = pieces(p_.m, block);
    auto tasks = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task % blocks * block;
        compute_rows(task / blocks, i, std::min(i + block, p_.m));
      }
    };
    parallel(p_.batch * blocks, block * (p_.n + p_.k), tasks);
  }

 private:
  // Rows first..last-1 of one element of the batch.
  void compute_rows(int64_t b, int64_t first, int64_t last) const {
    const BFloat16* a =
        static_cast<const BFloat16*>(p_.a) + b * p_.a_stride_batch + first * p_.a_stride_row;
    int64_t stride = p_.a_stride_row;
    if (copied(p_.k)) {
      stride = copied_stride(p_.k);
      BFloat16* const rows = copies_ + (b * p_.m + first) * stride;
      for (int64_t i = 0; i < last - first; ++i) {
        std::memcpy(rows + i * stride, a + i * p_.a_stride_row, static_cast<size_t>(2 * p_.k));
        rows[i * stride + p_.k] = BFloat16{0};
      }
      a = rows;
    }
    BFloat16* const out =
        static_cast<BFloat16*>(p_.out) + b * p_.out_stride_batch + first * p_.out_stride_row;
    for (int64_t j = 0; j < p_.n; j += kPanel) {
      switch (pieces(std::min(p_.n - j, kPanel), kLanes)) {
        case 1:
          panel<1>(a, stride, last - first, j, out + j);
          break;
        case 2:
          panel<2>(a, stride, last - first, j, out + j);
          break;
        case 3:
          panel<3>(a, stride, last - first, j, out + j);
          break;
        default:
          panel<kStrips>(a, stride, last - first, j, out + j);
      }
    }
  }

  template <int N>
  void panel(const BFloat16* a, int64_t stride, int64_t rows, int64_t j, BFloat16* out) const {
    for (int64_t i = 0; i < rows; i += kRows) {
      const int here = static_cast<int>(std::min<int64_t>(rows - i, kRows));
      tile<N>(a + i * stride, stride, here, j, out + i * p_.out_stride_row);
    }
  }

  // Rows behind the last are computed like the last, and not stored.
  template <int N>
  void tile(const BFloat16* a, int64_t stride, int rows, int64_t j, BFloat16* out) const {
    const char* row[kRows];
    DWATTN_UNROLL
    for (int r = 0; r < kRows; ++r) row[r] = bytes(a + (r < rows ? r : rows - 1) * stride);
    __m512 sum[kRows][N];
    DWATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    const char* packed =
        p_.k == 0 ? nullptr
                  : static_cast<const char*>(p_.weight->packed) + j / kLanes * strip_bytes_;
    for (int64_t d = 0; d < pairs_; ++d, packed += 2 * 2 * kLanes) {
      __m512bh right[N];
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) {
        right[v] = (__m512bh)_mm512_loadu_si512(packed + v * strip_bytes_);
      }
      DWATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, row[r] + 4 * d, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
        DWATTN_UNROLL
        for (int v = 0; v < N; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
      }
    }
    // Last, so that the partial sums are not rounded at the magnitude of the bias.
    __m512 last[N];
    __mmask16 there[N];
    DWATTN_UNROLL
    for (int v = 0; v < N; ++v) {
      const int64_t columns = std::min(p_.n - j - v * kLanes, kLanes);
      there[v] = static_cast<__mmask16>((1u << columns) - 1u);
      last[v] = p_.bias == nullptr ? _mm512_setzero_ps()
                                   : _mm512_maskz_loadu_ps(there[v], bias_at(j + v * kLanes));
    }
    DWATTN_UNROLL
    for (int r = 0; r < kRows; ++r, out += p_.out_stride_row) {
      if (r == rows) return;
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sum[r][v], last[v]));
        _mm256_mask_storeu_epi16(out + v * kLanes, there[v], rounded);
      }
    }
  }

  const float* bias_at(int64_t j) const { return static_cast<const float*>(p_.bias) + j; }

  const GemmParams& p_;
  const int64_t pairs_, strip_bytes_;
  BFloat16* const copies_;
};

}  // namespace

int64_t packed_weight_bytes(const WeightParams& p) {
  return pieces(p.n, kLanes) * strip_bytes(p.k);
}

Status pack_weight(const WeightParams& p, const ParallelFor& parallel) {
  const int64_t bytes_each = strip_bytes(p.k);
  auto strips = [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      pack_strip(p, strip * kLanes, static_cast<char*>(p.packed) + strip * bytes_each);
    }
  };
  parallel(pieces(p.n, kLanes), kLanes * p.k, strips);
  return Status::kOk;
}

int64_t gemm_workspace(const GemmParams& p) {
  return copied(p.k) ? p.batch * p.m * copied_stride(p.k) * 2 : 0;
}

Status gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel) {
  Gemm(p, workspace).run(parallel);
  return Status::kOk;
}

}  // namespace dwattn::cpu::pairs
