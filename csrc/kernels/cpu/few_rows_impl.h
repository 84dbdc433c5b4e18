// Products of a few rows with a large matrix that is read once, as it is stored, compiled once per
// instruction set (DWATTN_ISA names the namespace).
//
// `dots` multiplies by the matrix's transpose, `mix` by the matrix. Every result is summed in the
// same order whatever tile it falls into.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cpu/unroll.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
constexpr int kFewRows = 8;
#else
constexpr int kFewRows = 4;
#endif

// Vectors of the matrix in a register tile with R rows.
template <int R>
constexpr int kAcross = kFewRows < 8 ? 8 / R
                        : R == 8     ? 3
                        : R == 4     ? 4
                                     : 8;
// A multiple of all of them.
constexpr int64_t kAcrossAll = 24;

template <int kCount>
struct RowCount {
  static constexpr int value = kCount;
};

// f(RowCount, first row) over tiles of rows.
template <class F>
static void each_row_tile(int64_t count, const F& f) {
  int64_t r = 0;
  for (; r + kFewRows <= count; r += kFewRows) f(RowCount<kFewRows>{}, r);
  for (; r + 4 <= count; r += 4) f(RowCount<4>{}, r);
  for (; r + 2 <= count; r += 2) f(RowCount<2>{}, r);
  if (r < count) f(RowCount<1>{}, r);
}

// A matrix in memory; rows are dense.
template <class In>
struct Matrix {
  const In* data;
  int64_t stride;

  const In* row(int64_t i) const { return data + i * stride; }
};

// Vectors that one accumulator takes in before it is emptied: the error does not grow with k.
constexpr int64_t kDotVectors = 64;

template <int O, int R, class T, class In, class Store>
static void dot_tile(const Matrix<In>& m, int64_t o, const T* const* rows, int64_t k, int64_t r,
                     const Store& store) {
  using V = Vec<T>;
  V sum[O][R];
  T dot[O][R] = {};
  const In* const first = m.row(o);
  const auto step = [&](auto load) {
    V right[O];
    DWATTN_UNROLL
    for (int a = 0; a < O; ++a) right[a] = load(first + a * m.stride);
    DWATTN_UNROLL
    for (int b = 0; b < R; ++b) {
      const V left = load(rows[b]);
      DWATTN_UNROLL
      for (int a = 0; a < O; ++a) sum[a][b] = fma(left, right[a], sum[a][b]);
    }
  };
  for (int64_t i = 0; i < k;) {
    DWATTN_UNROLL
    for (int a = 0; a < O; ++a) {
      DWATTN_UNROLL
      for (int b = 0; b < R; ++b) sum[a][b] = V::zero();
    }
    const int64_t end = k - i < kDotVectors * V::width ? k : i + kDotVectors * V::width;
    for (; i + V::width <= end; i += V::width) {
      step([i](const auto* p) { return V::load(p + i); });
    }
    const int rest = static_cast<int>(end - i);
    if (rest > 0) step([i, rest](const auto* p) { return V::load_n(p + i, rest); });
    i = end;
    DWATTN_UNROLL
    for (int a = 0; a < O; ++a) {
      DWATTN_UNROLL
      for (int b = 0; b < R; ++b) dot[a][b] += total(sum[a][b]);
    }
  }
  DWATTN_UNROLL
  for (int a = 0; a < O; ++a) {
    DWATTN_UNROLL
    for (int b = 0; b < R; ++b) store(o + a, r + b, dot[a][b]);
  }
}

// store(o, r, row_r . m_o) for rows o of the matrix from `first` to `last`; row(r) is where row r
// of the others begins.
template <class T, class In, class Row, class Store>
static void dots(const Matrix<In>& m, int64_t first, int64_t last, int64_t count, int64_t k,
                 const Row& row, const Store& store) {
  for (int64_t block = first; block < last; block += kAcrossAll) {
    const int64_t end = last - block < kAcrossAll ? last : block + kAcrossAll;
    each_row_tile(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value, O = kAcross<R>;
      const T* rows[R];
      for (int b = 0; b < R; ++b) rows[b] = row(r + b);
      int64_t o = block;
      for (; o + O <= end; o += O) dot_tile<O, R, T>(m, o, rows, k, r, store);
      for (; o < end; ++o) dot_tile<1, R, T>(m, o, rows, k, r, store);
    });
  }
}

// Rows of the matrix that are mixed at a time: they stay in the cache for all tiles of rows.
constexpr int64_t kMixed = 64;

template <int N, int R, class T, class In, class Load, class Put>
static void mix_tile(const Matrix<In>& m, int64_t j, int64_t count, int64_t column, const T* factor,
                     int64_t factor_stride, T* const* out, const Load& load, const Put& put) {
  using V = Vec<T>;
  V sum[R][N];
  DWATTN_UNROLL
  for (int b = 0; b < R; ++b) {
    DWATTN_UNROLL
    for (int v = 0; v < N; ++v) sum[b][v] = V::zero();
  }
  const In* from = m.row(j) + column;
  for (const T* f = factor + j * factor_stride; count > 0; --count) {
    V right[N];
    DWATTN_UNROLL
    for (int v = 0; v < N; ++v) right[v] = load(from + v * V::width);
    DWATTN_UNROLL
    for (int b = 0; b < R; ++b) {
      const V left = V::all(f[b]);
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) sum[b][v] = fma(left, right[v], sum[b][v]);
    }
    from += m.stride;
    f += factor_stride;
  }
  DWATTN_UNROLL
  for (int b = 0; b < R; ++b) {
    DWATTN_UNROLL
    for (int v = 0; v < N; ++v) {
      T* const at = out[b] + column + v * V::width;
      put(j == 0 ? sum[b][v] : sum[b][v] + load(at), at);
    }
  }
}

// row(r)[c] = sum_j factor[j * factor_stride + r] m[j, c] for columns c from `first` to `last`.
template <class T, class In, class Row>
static void mix(const Matrix<In>& m, int64_t height, int64_t first, int64_t last, const T* factor,
                int64_t factor_stride, int64_t count, const Row& row) {
  using V = Vec<T>;
  const auto load = [](const auto* p) { return V::load(p); };
  const auto put = [](V v, T* p) { v.store(p); };
  for (int64_t j = 0; j < height; j += kMixed) {
    const int64_t part = height - j < kMixed ? height - j : kMixed;
    each_row_tile(count, [&](auto size, int64_t r) {
      constexpr int R = decltype(size)::value, N = kAcross<R>;
      T* out[R];
      for (int b = 0; b < R; ++b) out[b] = row(r + b);
      const T* const f = factor + r;
      int64_t c = first;
      for (; c + N * V::width <= last; c += N * V::width) {
        mix_tile<N, R, T>(m, j, part, c, f, factor_stride, out, load, put);
      }
      for (; N >= 8 && c + N / 2 * V::width <= last; c += N / 2 * V::width) {
        mix_tile<(N > 1 ? N / 2 : 1), R, T>(m, j, part, c, f, factor_stride, out, load, put);
      }
      for (; c + V::width <= last; c += V::width) {
        mix_tile<1, R, T>(m, j, part, c, f, factor_stride, out, load, put);
      }
      const int rest = static_cast<int>(last - c);
      if (rest == 0) return;
      mix_tile<1, R, T>(
          m, j, part, c, f, factor_stride, out,
          [rest](const auto* p) { return V::load_n(p, rest); },
          [rest](V v, T* p) { v.store_n(p, rest); });
    });
  }
}

}  // namespace
}  // namespace dwattn::cpu::DWATTN_ISA
