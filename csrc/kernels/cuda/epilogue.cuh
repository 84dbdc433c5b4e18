// What happens to a vector of output features before it is written.
#pragma once

#include "kernels/cuda/band_product.cuh"

namespace dwattn::cuda {

// residual + gamma * (value + bias) for kVector features of one token. Params names out, residual,
// their strides, gamma and dim_out.
template <class T, class Params>
class Epilogue {
 public:
  static constexpr int kVector = BandChunk<T>::kVector;

  DWATTN_DEVICE Epilogue(const Params& p, const float* bias)
      : p_(p),
        bias_of_(bias),
        vectors_(
            vectors_aligned<T>(p.out, p.out_stride_batch, p.out_stride_token, p.dim_out) &&
            (p.residual == nullptr || vectors_aligned<T>(p.residual, p.residual_stride_batch,
                                                         p.residual_stride_token, p.dim_out))) {}

  // Takes the coefficients of features d ... d + kVector.
  DWATTN_DEVICE void choose(int64_t d) {
    d_ = d;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const bool exists = d + e < p_.dim_out;
      bias_[e] = bias_of_ != nullptr && exists ? bias_of_[d + e] : 0.0f;
      gamma_[e] = p_.gamma != nullptr && exists ? p_.gamma[d + e] : 1.0f;
    }
  }

  DWATTN_DEVICE void write(int64_t image, int64_t token, float (&v)[kVector]) const {
    T* const out =
        static_cast<T*>(p_.out) + image * p_.out_stride_batch + token * p_.out_stride_token + d_;
    const T* residual = static_cast<const T*>(p_.residual);
    if (residual != nullptr) {
      residual += image * p_.residual_stride_batch + token * p_.residual_stride_token + d_;
    }
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

  const Params& p_;
  const float* const bias_of_;
  const bool vectors_;
  int64_t d_ = 0;
  float bias_[kVector], gamma_[kVector];
};

}  // namespace dwattn::cuda
