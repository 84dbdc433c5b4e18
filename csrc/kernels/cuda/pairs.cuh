// Two neighbouring channels at a time: a lane of every aggregation kernel owns such a pair.
#pragma once

#include "kernels/cuda/device.cuh"

namespace dwattn::cuda {

// Channels of a slice: a pair per lane of a warp.
constexpr int kSlice = 2 * kWarp;

DWATTN_DEVICE float2 zero2() { return make_float2(0.0f, 0.0f); }
DWATTN_DEVICE float2 add2(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
DWATTN_DEVICE float2 fma2(float2 a, float2 b, float2 c) {
  return make_float2(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y));
}

template <class T>
DWATTN_DEVICE float2 load_whole_pair(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const float2*>(p);
  } else {
    return unpack2<T>(*reinterpret_cast<const uint32_t*>(p));
  }
}

template <class T>
DWATTN_DEVICE void store_whole_pair(T* p, float2 v) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(p) = v;
  } else {
    *reinterpret_cast<uint32_t*>(p) = pack2<T>(v.x, v.y);
  }
}

// The first `valid` elements (of two) at p, zeros for the others; kAligned promises that p is
// aligned to the pair and that valid is never 1.
template <class T, bool kAligned>
DWATTN_DEVICE float2 load_pair(const T* p, int64_t valid) {
  if constexpr (kAligned) {
    return valid > 0 ? load_whole_pair(p) : zero2();
  } else {
    return make_float2(valid > 0 ? to_float(p[0]) : 0.0f, valid > 1 ? to_float(p[1]) : 0.0f);
  }
}

template <class T, bool kAligned>
DWATTN_DEVICE void store_pair(T* p, float2 v, int64_t valid) {
  if constexpr (kAligned) {
    if (valid > 0) store_whole_pair(p, v);
  } else {
    if (valid > 0) p[0] = from_float<T>(v.x);
    if (valid > 1) p[1] = from_float<T>(v.y);
  }
}

inline bool is_aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace dwattn::cuda
