// A vector of accumulators for the instruction set this translation unit is compiled for.
//
// Each unit defines DWATTN_ISA (avx512, avx2, generic) and everything here lives in the namespace
// of that name, so that units with different compiler flags never share a symbol.
//
//   Vec<T>::width        lanes; T is the accumulation type, float or double
//   load(p), load_n(p,n) `width` elements, or the first n of them and zeros; converts to T
//   store, store_n       converts back to the stored type, rounding to nearest even
//   low_half, high_half  the lanes of a Vec<float> as two Vec<double>
//   times_power(p, n, limit)  p * 2^n for a whole number n of at least limit, else 0
//   total                sum of the lanes
//   stream(v, p)         stores past the cache, to an address that is aligned to the stored vector;
//                        finish_streams() before another thread may read it
//   transpose            a square block, kTransposed<T> on a side
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dwattn::cpu::DWATTN_ISA {

template <class T>
struct Vec;

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  static constexpr int width = 16;
  __m512 r;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(as256(p))); }
  static Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(as256(p)))}; }
  static Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load_n(const BFloat16* p, int n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(mask(n), p));
  }
  static Vec load_n(const Float16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, r); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), fp16()); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), r); }
  void store_n(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), bf16()); }
  void store_n(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), fp16()); }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static const __m256i* as256(const void* p) { return static_cast<const __m256i*>(p); }
  static Vec widen_bf16(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  __m256i fp16() const { return _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT); }
  __m256i bf16() const {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
};

template <>
struct Vec<double> {
  static constexpr int width = 8;
  __m512d r;

  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec all(double a) { return {_mm512_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static Vec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(mask(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, r); }
  void store_n(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), r); }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
};

static inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.r, b.r)}; }
static inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.r, b.r)}; }
static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.r, b.r, c.r)};
}
static inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm512_add_pd(a.r, b.r)};
}
static inline Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return {_mm512_mul_pd(a.r, b.r)};
}
static inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.r, b.r, c.r)};
}
static inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.r, b.r)}; }
static inline Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return {_mm512_sub_pd(a.r, b.r)};
}
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.r, b.r)}; }
static inline Vec<float> nearest(Vec<float> a) {
  return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec<float> times_power(Vec<float> p, Vec<float> n, float limit) {
  const __mmask16 kept = _mm512_cmp_ps_mask(n.r, _mm512_set1_ps(limit), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(kept, p.r, n.r)};
}
static inline Vec<double> low_half(Vec<float> a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.r))};
}
static inline Vec<double> high_half(Vec<float> a) {
  return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.r, 1))};
}
static inline void stream(Vec<float> a, float* p) { _mm512_stream_ps(p, a.r); }
template <class Half>
static inline void stream(Vec<float> a, Half* p) {
  alignas(32) Half lanes[16];
  a.store(lanes);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
}
static inline void finish_streams() { _mm_sfence(); }
static inline float total(Vec<float> a) { return _mm512_reduce_add_ps(a.r); }
static inline double total(Vec<double> a) { return _mm512_reduce_add_pd(a.r); }

#elif defined(__AVX2__)

template <>
struct Vec<float> {
  static constexpr int width = 8;
  __m256 r;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) { return widen_bf16(load128(p)); }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(load128(p))}; }
  static Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  template <class Half>
  static Vec load_n(const Half* p, int n) {
    Half lanes[width] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(float* p) const { _mm256_storeu_ps(p, r); }
  void store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16()); }
  void store(Float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), fp16()); }
  void store_n(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), r); }
  template <class Half>
  void store_n(Half* p, int n) const {
    Half lanes[width];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

 private:
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static Vec widen_bf16(__m128i half) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  __m128i fp16() const { return _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT); }
  __m128i bf16() const {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

template <>
struct Vec<double> {
  static constexpr int width = 4;
  __m256d r;

  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec all(double a) { return {_mm256_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static Vec load_n(const double* p, int n) { return {_mm256_maskload_pd(p, mask(n))}; }
  void store(double* p) const { _mm256_storeu_pd(p, r); }
  void store_n(double* p, int n) const { _mm256_maskstore_pd(p, mask(n), r); }

 private:
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
};

static inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.r, b.r)}; }
static inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.r, b.r)}; }
static inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.r, b.r, c.r)};
}
static inline Vec<double> operator+(Vec<double> a, Vec<double> b) {
  return {_mm256_add_pd(a.r, b.r)};
}
static inline Vec<double> operator*(Vec<double> a, Vec<double> b) {
  return {_mm256_mul_pd(a.r, b.r)};
}
static inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.r, b.r, c.r)};
}
static inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.r, b.r)}; }
static inline Vec<double> operator-(Vec<double> a, Vec<double> b) {
  return {_mm256_sub_pd(a.r, b.r)};
}
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.r, b.r)}; }
static inline Vec<float> nearest(Vec<float> a) {
  return {_mm256_round_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline Vec<float> times_power(Vec<float> p, Vec<float> n, float limit) {
  const __m256 kept = _mm256_cmp_ps(n.r, _mm256_set1_ps(limit), _CMP_NLT_UQ);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.r), 23);
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p.r), exponent);
  return {_mm256_and_ps(kept, _mm256_castsi256_ps(scaled))};
}
static inline Vec<double> low_half(Vec<float> a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.r))};
}
static inline Vec<double> high_half(Vec<float> a) {
  return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.r, 1))};
}
static inline void stream(Vec<float> a, float* p) { _mm256_stream_ps(p, a.r); }
template <class Half>
static inline void stream(Vec<float> a, Half* p) {
  alignas(16) Half lanes[8];
  a.store(lanes);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                   _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
}
static inline void finish_streams() { _mm_sfence(); }
static inline float total(Vec<float> a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline double total(Vec<double> a) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.r), _mm256_extractf128_pd(a.r, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

#else  // any other target: vectors of 16 bytes of GCC and Clang, which become NEON or SSE2

template <class T>
struct Vec {
  static constexpr int width = 16 / sizeof(T);
  using Lanes __attribute__((vector_size(16))) = T;
  using Stored __attribute__((vector_size(16), aligned(alignof(T)), may_alias)) = T;
  Lanes r;

  static Vec zero() { return {Lanes{}}; }
  static Vec all(T a) { return {a - Lanes{}}; }
  template <class In>
  static Vec load(const In* p) {
    if constexpr (std::is_same_v<In, T>) return {*reinterpret_cast<const Stored*>(p)};
    Vec v = zero();
    for (int i = 0; i < width; ++i) v.r[i] = to_float(p[i]);
    return v;
  }
  template <class In>
  static Vec load_n(const In* p, int n) {
    Vec v = zero();
    for (int i = 0; i < n; ++i) v.r[i] = to_float(p[i]);
    return v;
  }
  template <class Out>
  void store(Out* p) const {
    if constexpr (std::is_same_v<Out, T>) {
      *reinterpret_cast<Stored*>(p) = r;
    } else {
      for (int i = 0; i < width; ++i) from_float(r[i], p + i);
    }
  }
  template <class Out>
  void store_n(Out* p, int n) const {
    for (int i = 0; i < n; ++i) from_float(r[i], p + i);
  }
};

template <class T>
static inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.r + b.r};
}
template <class T>
static inline Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.r * b.r};
}
template <class T>
static inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.r * b.r + c.r};
}
template <class T>
static inline Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.r - b.r};
}
static inline Vec<float> max(Vec<float> a, Vec<float> b) { return {a.r > b.r ? a.r : b.r}; }
static inline Vec<float> nearest(Vec<float> a) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction left
  return {(a.r + kShift) - kShift};
}
static inline Vec<float> times_power(Vec<float> p, Vec<float> n, float limit) {
  using Bits __attribute__((vector_size(16))) = int32_t;
  const Bits kept = ~(n.r < limit);  // all ones or zero
  const Bits whole = __builtin_convertvector(Vec<float>::Lanes(Bits(n.r) & kept), Bits);
  const Bits scaled = Bits(p.r) + whole * (1 << 23);
  return {Vec<float>::Lanes(scaled & kept)};
}
static inline Vec<double> low_half(Vec<float> a) { return {Vec<double>::Lanes{a.r[0], a.r[1]}}; }
static inline Vec<double> high_half(Vec<float> a) { return {Vec<double>::Lanes{a.r[2], a.r[3]}}; }
template <class Out>
static inline void stream(Vec<float> a, Out* p) {
  a.store(p);
}
static inline void finish_streams() {}
template <class T>
static inline T total(Vec<T> a) {
  T sum = a.r[0];
  for (int i = 1; i < Vec<T>::width; ++i) sum += a.r[i];
  return sum;
}

#endif

// The side of the blocks that `transpose` takes.
#if defined(__AVX512F__)
template <class T>
constexpr int kTransposed = std::is_same_v<T, float> ? 16 : 4;
#else
template <class T>
constexpr int kTransposed = 4;
#endif

// out[i * stride + c] = row[c][i] for i, c in 0..kTransposed<T> - 1
template <class T>
static inline void transpose(const T* const* row, T* out, int64_t stride) {
  for (int i = 0; i < kTransposed<T>; ++i, out += stride) {
    for (int c = 0; c < kTransposed<T>; ++c) out[c] = row[c][i];
  }
}

#if defined(__AVX512F__)
template <>
inline void transpose(const float* const* row, float* out, int64_t stride) {
  for (int group = 0; group < 4; ++group) {
    // Lane l of r[i] is a quarter of row 4 l + i.
    __m512 r[4];
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int c) { return _mm_loadu_ps(row[c] + 4 * group); };
      r[i] = _mm512_castps128_ps512(quarter(i));
      r[i] = _mm512_insertf32x4(r[i], quarter(4 + i), 1);
      r[i] = _mm512_insertf32x4(r[i], quarter(8 + i), 2);
      r[i] = _mm512_insertf32x4(r[i], quarter(12 + i), 3);
    }
    const auto pairs = [](__m512 a) { return _mm512_castps_pd(a); };
    const __m512d low01 = pairs(_mm512_unpacklo_ps(r[0], r[1]));
    const __m512d low23 = pairs(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d high01 = pairs(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d high23 = pairs(_mm512_unpackhi_ps(r[2], r[3]));
    const __m512d columns[4] = {_mm512_unpacklo_pd(low01, low23), _mm512_unpackhi_pd(low01, low23),
                                _mm512_unpacklo_pd(high01, high23),
                                _mm512_unpackhi_pd(high01, high23)};
    for (const __m512d& column : columns) {
      _mm512_storeu_ps(out, _mm512_castpd_ps(column));
      out += stride;
    }
  }
}
#elif defined(__AVX2__)
template <>
inline void transpose(const float* const* row, float* out, int64_t stride) {
  __m128 a = _mm_loadu_ps(row[0]), b = _mm_loadu_ps(row[1]), c = _mm_loadu_ps(row[2]),
         d = _mm_loadu_ps(row[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + stride, b);
  _mm_storeu_ps(out + 2 * stride, c);
  _mm_storeu_ps(out + 3 * stride, d);
}
#endif

}  // namespace dwattn::cpu::DWATTN_ISA
