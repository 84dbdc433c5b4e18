// Powers of two for a softmax, compiled once per instruction set (DWATTN_ISA names the namespace).
#pragma once

#include "kernels/cpu/simd.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

// 2^x for x <= 0, to 2 units in the last place; 0 below 2^-125, so that no result is subnormal.
static inline Vec<float> exp2_of(Vec<float> x) {
  using V = Vec<float>;
  const V n = nearest(x), r = x - n;
  // Minimax on [-1/2, 1/2] with 2^0 = 1 exactly: relative error 2e-9 before rounding.
  V p = V::all(1.53533616e-4f);
  p = fma(p, r, V::all(1.3398875e-3f));
  p = fma(p, r, V::all(9.61843692e-3f));
  p = fma(p, r, V::all(5.55033237e-2f));
  p = fma(p, r, V::all(2.40226477e-1f));
  p = fma(p, r, V::all(6.93147182e-1f));
  p = fma(p, r, V::all(1.0f));
  return times_power(p, n, -125.0f);
}

}  // namespace
}  // namespace dwattn::cpu::DWATTN_ISA
