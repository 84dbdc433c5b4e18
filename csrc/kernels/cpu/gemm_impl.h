// The blocked matrix product, compiled once per instruction set. A task computes one panel of
// columns: it packs a block of b so that the inner loop reads it in order, then runs over the rows
// of a with a register tile of kRows x kPanel accumulators.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/simd.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

template <class T>
class Gemm {
  using V = Vec<T>;
#if defined(__AVX512F__)  // 32 registers
  static constexpr int kRows = 6, kVectors = 4;
#else
  static constexpr int kRows = 4, kVectors = 2;
#endif
  static constexpr int kPanel = kVectors * V::width;
  static constexpr int64_t kDepth = 256;

 public:
  explicit Gemm(const GemmParams& p) : p_(p) {}

  void run(const ParallelFor& parallel) const {
    auto panels = [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) compute_panel(panel * kPanel);
    };
    parallel((p_.n + kPanel - 1) / kPanel, p_.m * p_.k, panels);
  }

 private:
  const T* a(int64_t i, int64_t k) const { return static_cast<const T*>(p_.a) + i * p_.lda + k; }
  const T* b(int64_t j, int64_t k) const { return static_cast<const T*>(p_.b) + j * p_.ldb + k; }
  T* c(int64_t i, int64_t j) const { return static_cast<T*>(p_.c) + i * p_.ldc + j; }

  void compute_panel(int64_t j) const {
    alignas(64) T packed[kDepth * kPanel];
    const int columns = static_cast<int>(p_.n - j < kPanel ? p_.n - j : kPanel);
    int64_t k = 0;
    do {  // also once for k == 0, to write zeros
      const int64_t depth = p_.k - k < kDepth ? p_.k - k : kDepth;
      pack(j, columns, k, depth, packed);
      int64_t i = 0;
      for (; i + kRows <= p_.m; i += kRows) tile<kRows>(i, j, columns, k, depth, packed);
      for (; i < p_.m; ++i) tile<1>(i, j, columns, k, depth, packed);
      k += depth;
    } while (k < p_.k);
  }

  void pack(int64_t j, int columns, int64_t k, int64_t depth, T* packed) const {
    for (int column = 0; column < kPanel; ++column) {
      const T* source = column < columns ? b(j + column, k) : nullptr;
      for (int64_t d = 0; d < depth; ++d) packed[d * kPanel + column] = source ? source[d] : T(0);
    }
  }

  template <int R>
  void tile(int64_t i, int64_t j, int columns, int64_t k, int64_t depth, const T* packed) const {
    V sum[R][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
    }
    const T* rows = a(i, k);
    for (int64_t d = 0; d < depth; ++d, packed += kPanel) {
      V right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = V::load(packed + v * V::width);
      for (int r = 0; r < R; ++r) {
        const V left = V::all(rows[r * p_.lda + d]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int rest = columns - v * V::width;
        if (rest > 0) add_to(c(i + r, j + v * V::width), sum[r][v], k > 0, rest);
      }
    }
  }

  static void add_to(T* at, V sum, bool accumulate, int rest) {
    if (rest >= V::width) {
      (accumulate ? sum + V::load(at) : sum).store(at);
    } else {
      (accumulate ? sum + V::load_n(at, rest) : sum).store_n(at, rest);
    }
  }

  const GemmParams& p_;
};

}  // namespace

Status gemm_nt(const GemmParams& p, const ParallelFor& parallel) {
  switch (p.dtype) {
    case DType::kFloat32:
      Gemm<float>(p).run(parallel);
      return Status::kOk;
    case DType::kFloat64:
      Gemm<double>(p).run(parallel);
      return Status::kOk;
    default:
      return Status::kUnsupportedDType;
  }
}

}  // namespace dwattn::cpu::DWATTN_ISA
