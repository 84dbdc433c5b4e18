// What lowrank_dw_attention does with a vector of output features before it is written.
#pragma once

#include "kernels/cuda/band_product.cuh"
#include "kernels/cuda/lowrank_dw_attention.h"

namespace dwattn::cuda {

// Whether rows of `length` elements can be moved by 16-byte vectors.
template <class T>
DWATTN_DEVICE bool vectors_aligned(const void* base, int64_t stride, int64_t stride2,
                                   int64_t length) {
  constexpr int64_t kVector = BandChunk<T>::kVector;
  return reinterpret_cast<uintptr_t>(base) % kBandVectorBytes == 0 && stride % kVector == 0 &&
         stride2 % kVector == 0 && length % kVector == 0;
}

// residual + gamma * (value + b_bias) for kVector features of one token.
template <class T>
class Epilogue {
 public:
  static constexpr int kVector = BandChunk<T>::kVector;

  DWATTN_DEVICE Epilogue(const LowrankDwParams& p, int64_t image)
      : p_(p),
        out_(static_cast<T*>(p.out) + image * p.out_stride_batch),
        residual_(static_cast<const T*>(p.residual)),
        vectors_(
            vectors_aligned<T>(p.out, p.out_stride_batch, p.out_stride_token, p.dim_out) &&
            (p.residual == nullptr || vectors_aligned<T>(p.residual, p.residual_stride_batch,
                                                         p.residual_stride_token, p.dim_out))) {
    if (residual_ != nullptr) residual_ += image * p.residual_stride_batch;
  }

  // Takes the coefficients of features d ... d + kVector.
  DWATTN_DEVICE void choose(int64_t d) {
    d_ = d;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const bool exists = d + e < p_.dim_out;
      bias_[e] = p_.b_bias != nullptr && exists ? p_.b_bias[d + e] : 0.0f;
      gamma_[e] = p_.gamma != nullptr && exists ? p_.gamma[d + e] : 1.0f;
    }
  }

  DWATTN_DEVICE void write(int64_t token, float (&v)[kVector]) const {
    T* const out = out_ + token * p_.out_stride_token + d_;
    const T* const residual =
        residual_ == nullptr ? nullptr : residual_ + token * p_.residual_stride_token + d_;
    const int left = min(static_cast<int>(p_.dim_out - d_), kVector);
    float base[kVector];
    read(residual, left, base);
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = fmaf(gamma_[e], v[e] + bias_[e], base[e]);
    if (vectors_) {
      if (left > 0) store_vector(out, v);
      return;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < left) out[e] = from_float<T>(v[e]);
    }
  }

 private:
  DWATTN_DEVICE void read(const T* residual, int left, float (&base)[kVector]) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) base[e] = 0.0f;
    if (residual == nullptr || left <= 0) return;
    if (vectors_) {
      load_vector(residual, base);
      return;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < left) base[e] = to_float(residual[e]);
    }
  }

  const LowrankDwParams& p_;
  T* const out_;
  const T* residual_;
  const bool vectors_;
  int64_t d_ = 0;
  float bias_[kVector], gamma_[kVector];
};

}  // namespace dwattn::cuda
