// 16-bit storage types and their scalar conversions. Arithmetic is always done in float.
#pragma once

#include <cstdint>

namespace dwattn::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// `static`, not `inline`: this header is compiled into translation units with different instruction
// sets, and the linker must never replace one unit's copy by another's.
static inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float to_float(float value) { return value; }
static inline double to_float(double value) { return value; }

static inline float to_float(BFloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (rest << 13));  // inf, nan
  // Exact for normals and subnormals: place the bits in a float and rescale the exponent.
  const float magnitude = float_from_bits(rest << 13) * float_from_bits(0x77800000u);  // 2^112
  return float_from_bits(sign | bits_of_float(magnitude));
}

static inline void from_float(float value, float* out) { *out = value; }
static inline void from_float(double value, double* out) { *out = value; }

// Round to nearest even; NaN becomes a quiet NaN.
static inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of_float(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

static inline void from_float(float value, Float16* out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more: infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal or zero: let the adder do the rounding
    half = bits_of_float(float_from_bits(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace dwattn::cpu
