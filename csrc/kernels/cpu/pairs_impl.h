// Pairs of bf16 in the order of the instructions that multiply pairs: a pair of numbers of a row of
// the weight becomes one lane. Compiled into each unit that has such instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dwattn::cpu {
namespace {

// The transpose of 16 x 16 numbers of 32 bits, here pairs of bf16, whose rows lie `stride` bytes
// apart.
void transpose_pairs(const char* from, int64_t stride, char* to) {
  for (int64_t group = 0; group < 4; ++group, from += 16) {
    // Lane l of r[i] is a quarter of row 4 l + i.
    __m512i r[4];
    for (int64_t i = 0; i < 4; ++i) {
      const auto quarter = [&](int64_t row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * stride));
      };
      r[i] = _mm512_castsi128_si512(quarter(i));
      r[i] = _mm512_inserti32x4(r[i], quarter(4 + i), 1);
      r[i] = _mm512_inserti32x4(r[i], quarter(8 + i), 2);
      r[i] = _mm512_inserti32x4(r[i], quarter(12 + i), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi64(high01, high23));
    to += 256;
  }
}

}  // namespace
}  // namespace dwattn::cpu
