// The matrix product, compiled once per instruction set.
//
// A tile of kRows x kPanel results stays in registers over kSummed of the depth, and its sums are
// added on the stack: an output is written once, converted and with its bias. The weight is packed
// into panels of kPanel columns, which the tile reads in order; a task is a block of rows, small
// enough to stay in the cache while the panels pass by. Where there are few rows, all of which stay
// there, a task is a panel instead, which is packed on the way.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/unroll.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

#if defined(__AVX512F__)  // 32 registers
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)     // 16 registers
constexpr int kRows = 6, kVectors = 2;
#elif defined(__aarch64__)  // 32 registers
constexpr int kRows = 4, kVectors = 4;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// Products that an accumulator takes in before it is emptied: beyond, the error of one long sum
// would grow faster than that of a BLAS, which sums in blocks, too.
constexpr int64_t kSummed = 384;

template <class T>
constexpr int kPanel = kVectors * Vec<T>::width;

// Columns of the panel that begins at column j: whole vectors, and whole blocks.
template <class T>
int64_t panel_width(int64_t n, int64_t j) {
  constexpr int64_t unit = Vec<T>::width > kTransposed<T> ? Vec<T>::width : kTransposed<T>;
  const int64_t rest = (n - j + unit - 1) / unit * unit;
  return rest < kPanel<T> ? rest : kPanel<T>;
}

// Widens `count` numbers.
template <class T, class In>
void widen(const In* from, int64_t count, T* to) {
  using V = Vec<T>;
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::load(from + i).store(to + i);
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    V::load_n(from + i, rest).store_n(to + i, rest);
  }
}

template <class T, class In>
class Packing {
 public:
  explicit Packing(const WeightParams& p) : p_(p) {}

  // The panel that begins at column j.
  void panel(int64_t j, T* out) const {
    const int64_t width = panel_width<T>(p_.n, j);
    for (int64_t k = 0; k < p_.k; k += kDepth, out += kDepth * width) {
      const int64_t depth = p_.k - k < kDepth ? p_.k - k : kDepth;
      for (int64_t c = 0; c < width; c += kColumns) pack_block(j + c, k, depth, out + c, width);
    }
  }

 private:
  // So little of all columns at a time that what is written stays in the nearest cache.
  static constexpr int64_t kDepth = 32;
  // How far ahead the weight, which may come from memory, is asked for: several rows are read at a
  // time, which the hardware foresees badly.
  static constexpr int64_t kAhead = 4 * kDepth;
  // Columns that are packed together, so that the weight is transposed in blocks.
  static constexpr int64_t kColumns = kTransposed<T>;

  // Columns j..j+kColumns-1 of the packed weight, rows of the given one; zeros behind the last.
  void pack_block(int64_t j, int64_t k, int64_t depth, T* out, int64_t width) const {
    T buffers[kColumns][kDepth];
    const T* row[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) row[c] = numbers(j + c, k, depth, buffers[c]);
    int64_t d = 0;
    for (; d + kColumns <= depth; d += kColumns, out += kColumns * width) {
      transpose<T>(row, out, width);
      for (int64_t c = 0; c < kColumns; ++c) row[c] += kColumns;
    }
    for (; d < depth; ++d, out += width) {
      for (int64_t c = 0; c < kColumns; ++c) out[c] = *row[c]++;
    }
  }

  // `depth` numbers of row j from k on: in place, or in `buffer`.
  const T* numbers(int64_t j, int64_t k, int64_t depth, T* buffer) const {
    if (j >= p_.n) {
      for (int64_t d = 0; d < depth; ++d) buffer[d] = T(0);
      return buffer;
    }
    const In* from = static_cast<const In*>(p_.weight) + j * p_.stride + k;
    constexpr int64_t kLine = 64 / sizeof(In);
    for (int64_t d = kAhead; d < kAhead + kDepth; d += kLine) __builtin_prefetch(from + d);
    if constexpr (std::is_same_v<T, In>) return from;
    widen(from, depth, buffer);
    return buffer;
  }

  const WeightParams& p_;
};

// Packs the panel of a weight, whose numbers may be narrower than T, that begins at column j.
template <class T>
void pack_panel(const WeightParams& p, int64_t j, T* out) {
  if constexpr (std::is_same_v<T, double>) {
    Packing<double, double>(p).panel(j, out);
  } else if (p.dtype == DType::kFloat32) {
    Packing<float, float>(p).panel(j, out);
  } else if (p.dtype == DType::kFloat16) {
    Packing<float, Float16>(p).panel(j, out);
  } else {
    Packing<float, BFloat16>(p).panel(j, out);
  }
}

// All panels, one after the other.
template <class T>
void pack_panels(const WeightParams& p, const ParallelFor& parallel) {
  auto panels = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kPanel<T>; j < end * kPanel<T> && j < p.n; j += kPanel<T>) {
      pack_panel(p, j, static_cast<T*>(p.packed) + j * p.k);
    }
  };
  parallel((p.n + kPanel<T> - 1) / kPanel<T>, kPanel<T> * p.k, panels);
}

template <class T, class In, class Out>
class Gemm {
  using V = Vec<T>;

 public:
  Gemm(const GemmParams& p, void* workspace) : p_(p), widened_(static_cast<T*>(workspace)) {}

  void run(const ParallelFor& parallel) const {
    if (p_.weight->in_passing) {
      by_panels(parallel);
    } else {
      by_rows(parallel);
    }
  }

 private:
  const T* packed() const { return static_cast<const T*>(p_.weight->packed); }

  void by_rows(const ParallelFor& parallel) const {
    const int64_t bytes = p_.n * p_.k * static_cast<int64_t>(sizeof(T));
    const int64_t block = rows_of_a_block(p_, kRows, bytes, parallel.threads);
    const int64_t blocks = (p_.m + block - 1) / block;
    auto tasks = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / blocks, first = task % blocks * block;
        const int64_t last = first + block < p_.m ? first + block : p_.m;
        widen_rows(b, first, last);
        for (int64_t j = 0; j < p_.n; j += kPanel<T>) {
          compute(b, first, last, j, packed() + j * p_.k);
        }
      }
    };
    parallel(p_.batch * blocks, block * (p_.n + p_.k), tasks);
  }

  // Every run of tasks packs its panels one over the other, so that they stay in the nearest cache.
  void by_panels(const ParallelFor& parallel) const {
    if constexpr (!std::is_same_v<T, In>) {
      auto rows = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) widen_rows(i / p_.m, i % p_.m, i % p_.m + 1);
      };
      parallel(p_.batch * p_.m, p_.k, rows);
    }
    auto panels = [&](int64_t begin, int64_t end) {
      T* const here = static_cast<T*>(p_.weight->packed) + begin * kPanel<T> * p_.k;
      for (int64_t j = begin * kPanel<T>; j < end * kPanel<T> && j < p_.n; j += kPanel<T>) {
        pack_panel(*p_.weight, j, here);
        for (int64_t b = 0; b < p_.batch; ++b) compute(b, 0, p_.m, j, here);
      }
    };
    parallel((p_.n + kPanel<T> - 1) / kPanel<T>, p_.batch * p_.m * kPanel<T>, panels);
  }

  // Rows first..last-1 of a 16-bit `a` in the type of the sums.
  void widen_rows(int64_t b, int64_t first, int64_t last) const {
    if constexpr (!std::is_same_v<T, In>) {
      const In* from = static_cast<const In*>(p_.a) + b * p_.a_stride_batch;
      for (int64_t i = first; i < last; ++i) {
        widen(from + i * p_.a_stride_row, p_.k, widened_ + (b * p_.m + i) * widened_stride());
      }
    }
  }
  int64_t widened_stride() const { return spaced_row(p_.k, sizeof(T)); }

  // Rows first..last-1 of one element of the batch, columns of the panel that begins at j.
  void compute(int64_t b, int64_t first, int64_t last, int64_t j, const T* packed) const {
    const T* a;
    int64_t stride;
    if constexpr (std::is_same_v<T, In>) {
      stride = p_.a_stride_row;
      a = static_cast<const T*>(p_.a) + b * p_.a_stride_batch + first * stride;
    } else {
      stride = widened_stride();
      a = widened_ + (b * p_.m + first) * stride;
    }
    Out* out = static_cast<Out*>(p_.out) + b * p_.out_stride_batch + first * p_.out_stride_row + j;
    switch (panel_width<T>(p_.n, j) / V::width) {
      case 1:
        return panel<1>(a, stride, last - first, j, packed, out);
      case 2:
        return panel<2>(a, stride, last - first, j, packed, out);
      case 3:
        return panel < kVectors<3 ? 1 : 3>(a, stride, last - first, j, packed, out);
      default:
        return panel<kVectors>(a, stride, last - first, j, packed, out);
    }
  }

  template <int N>
  void panel(const T* a, int64_t stride, int64_t rows, int64_t j, const T* packed, Out* out) const {
    for (int64_t i = 0; i < rows; i += kRows) {
      const int here = static_cast<int>(rows - i < kRows ? rows - i : kRows);
      tile<N>(a + i * stride, stride, here, j, packed, out + i * p_.out_stride_row);
    }
  }

  // Rows behind the last are computed like the last, and not stored.
  template <int N>
  void tile(const T* a, int64_t stride, int rows, int64_t j, const T* packed, Out* out) const {
    const T* row[kRows];
    DWATTN_UNROLL
    for (int r = 0; r < kRows; ++r) row[r] = a + (r < rows ? r : rows - 1) * stride;
    V sum[kRows][N];
    alignas(64) T before[kRows][N * V::width];  // what runs of kSummed products have summed
    for (int64_t d = 0;;) {
      const int64_t end = p_.k - d < kSummed ? p_.k : d + kSummed;
      multiply<N>(row, d, end, packed + d * N * V::width, sum);
      if (d > 0) {
        DWATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
          DWATTN_UNROLL
          for (int v = 0; v < N; ++v) sum[r][v] = V::load(before[r] + v * V::width) + sum[r][v];
        }
      }
      d = end;
      if (d == p_.k) break;
      DWATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        DWATTN_UNROLL
        for (int v = 0; v < N; ++v) sum[r][v].store(before[r] + v * V::width);
      }
    }
    // Last, so that the partial sums are not rounded at the magnitude of the bias.
    V last[N];
    DWATTN_UNROLL
    for (int v = 0; v < N; ++v) last[v] = bias(j + v * V::width);
    const int64_t columns = p_.n - j;
    DWATTN_UNROLL
    for (int r = 0; r < kRows; ++r, out += p_.out_stride_row) {
      if (r == rows) return;
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) {
        const int64_t rest = columns - v * V::width;
        if (rest >= V::width) {
          (sum[r][v] + last[v]).store(out + v * V::width);
        } else if (rest > 0) {
          (sum[r][v] + last[v]).store_n(out + v * V::width, static_cast<int>(rest));
        }
      }
    }
  }

  // The products of depth d..end-1, summed in registers, which a call would not leave them in.
  template <int N>
  __attribute__((always_inline)) static void multiply(const T* const (&row)[kRows], int64_t d,
                                                      int64_t end, const T* packed,
                                                      V (&sum)[kRows][N]) {
    DWATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) sum[r][v] = V::zero();
    }
    for (; d < end; ++d, packed += N * V::width) {
      V right[N];
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) right[v] = V::load(packed + v * V::width);
      DWATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const V left = V::all(row[r][d]);
        DWATTN_UNROLL
        for (int v = 0; v < N; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
  }

  V bias(int64_t j) const {
    if (p_.bias == nullptr) return V::zero();
    const T* at = static_cast<const T*>(p_.bias) + j;
    const int64_t rest = p_.n - j;
    if (rest <= 0) return V::zero();
    return rest >= V::width ? V::load(at) : V::load_n(at, static_cast<int>(rest));
  }

  const GemmParams& p_;
  T* const widened_;  // rows of a 16-bit `a`
};

template <class T, class In, class Out>
Status run_gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel) {
  Gemm<T, In, Out>(p, workspace).run(parallel);
  return Status::kOk;
}

template <class In>
Status run_gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel) {
  switch (p.out_dtype) {
    case DType::kFloat32:
      return run_gemm<float, In, float>(p, workspace, parallel);
    case DType::kFloat16:
      return run_gemm<float, In, Float16>(p, workspace, parallel);
    case DType::kBFloat16:
      return run_gemm<float, In, BFloat16>(p, workspace, parallel);
    default:
      return Status::kUnsupportedDType;
  }
}

}  // namespace

Status pack_weight(const WeightParams& p, const ParallelFor& parallel) {
  if (p.dtype == DType::kFloat64) {
    pack_panels<double>(p, parallel);
  } else {
    pack_panels<float>(p, parallel);
  }
  return Status::kOk;
}

Status gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel) {
  switch (p.a_dtype) {
    case DType::kFloat32:
      return run_gemm<float>(p, workspace, parallel);
    case DType::kFloat16:
      return run_gemm<Float16>(p, workspace, parallel);
    case DType::kBFloat16:
      return run_gemm<BFloat16>(p, workspace, parallel);
    case DType::kFloat64:
      if (p.out_dtype != DType::kFloat64) return Status::kUnsupportedDType;
      return run_gemm<double, double, double>(p, workspace, parallel);
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cpu::DWATTN_ISA
