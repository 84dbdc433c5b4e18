// The definition of a whole layer in plain loops over the parameters of dw_layer. With kPlain it is
// computed as layers of T would: sums in fp32, everything that would go to memory rounded to T.
#pragma once

#include <type_traits>

#include "harness.h"
#include "kernels/cuda/dw_layer.h"

namespace harness {

template <class T, bool kPlain>
class LayerDefinition {
 public:
  using DwLayerParams = dwattn::cuda::DwLayerParams;
  using PrefixRows = dwattn::cuda::PrefixRows;
  using Sum = std::conditional_t<kPlain, float, double>;
  using Rows = std::vector<std::vector<Sum>>;

  explicit LayerDefinition(const DwLayerParams& p) : p_(p) {
    above_ = p.prefix == PrefixRows::kNone ? 0 : p.num_prefix;
    patches_ = p.height * p.width;
    for (int64_t b = 0; b < p.batch; ++b) compute(b);
  }

  // Row n of the output of image b.
  Sum at(int64_t b, int64_t n, int64_t d) const { return out_[b * (above_ + patches_) + n][d]; }

 private:
  static Sum stored(Sum v) {
    if constexpr (kPlain) {
      return rounded<T>(v);
    } else {
      return v;
    }
  }

  static Sum factor(Sum v) {
    if constexpr (kPlain) {
      return multiplied<T>(v);
    } else {
      return v;
    }
  }

  static Sum dot(const std::vector<Sum>& row, const T* weight, const float* bias, int64_t channel) {
    Sum sum = bias != nullptr ? bias[channel] : 0;
    const T* const w = weight + channel * static_cast<int64_t>(row.size());
    for (size_t k = 0; k < row.size(); ++k) sum += factor(row[k]) * factor(to_float(w[k]));
    return sum;
  }

  static Rows project(const Rows& rows, const void* weight, const float* bias, int64_t channels) {
    Rows projected;
    for (const auto& row : rows) {
      projected.emplace_back(channels);
      for (int64_t c = 0; c < channels; ++c) {
        projected.back()[c] = stored(dot(row, static_cast<const T*>(weight), bias, c));
      }
    }
    return projected;
  }

  void compute(int64_t b) {
    Rows x(p_.num_prefix + patches_, std::vector<Sum>(p_.dim));
    for (size_t n = 0; n < x.size(); ++n) {
      const T* const row = static_cast<const T*>(p_.x) + b * p_.x_stride_batch +
                           static_cast<int64_t>(n) * p_.x_stride_token;
      for (int64_t k = 0; k < p_.dim; ++k) x[n][k] = to_float(row[k]);
    }
    if (above_ > 0) {
      const bool exact = p_.prefix == PrefixRows::kExact;
      const bool own = p_.prefix_out != nullptr;
      finish(b, 0, exact ? exact_rows(x) : static_rows(x), own ? p_.prefix_out : p_.wo,
             own ? p_.prefix_out_bias : p_.bo);
    }
    finish(b, above_, aggregated(project(x, p_.wv, p_.bv, p_.channels)), p_.wo, p_.bo);
  }

  void finish(int64_t b, int64_t first, const Rows& rows, const void* weight, const float* bias) {
    for (size_t n = 0; n < rows.size(); ++n) {
      out_.emplace_back(p_.dim_out);
      for (int64_t d = 0; d < p_.dim_out; ++d) {
        const Sum value = dot(rows[n], static_cast<const T*>(weight), bias, d);
        const int64_t token = first + static_cast<int64_t>(n);
        const Sum base = p_.residual == nullptr
                             ? 0
                             : to_float(static_cast<const T*>(
                                   p_.residual)[b * p_.residual_stride_batch +
                                                token * p_.residual_stride_token + d]);
        out_.back()[d] = stored(base + (p_.gamma != nullptr ? p_.gamma[d] : 1) * value);
      }
    }
  }

  Rows aggregated(const Rows& v) const {
    Rows y(patches_, std::vector<Sum>(p_.channels));
    for (int64_t c = 0; c < p_.channels; ++c) {
      Sum ctx = p_.beta != nullptr ? p_.beta[c] : 0, mean = 0;
      for (int64_t t = 0; p_.kappa != nullptr && t < p_.num_prefix; ++t) {
        ctx += p_.kappa[t * p_.channels + c] * v[t][c];
      }
      for (int64_t m = 0; m < patches_; ++m) mean += v[p_.num_prefix + m][c];
      if (p_.mu != nullptr) ctx += p_.mu[c] * mean / static_cast<Sum>(patches_);
      for (int64_t m = 0; m < patches_; ++m) y[m][c] = stored(stencil(v, m, c) + ctx);
    }
    return y;
  }

  Sum stencil(const Rows& v, int64_t m, int64_t c) const {
    Sum sum = 0;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t i = m / p_.width + tap / 3 - 1, j = m % p_.width + tap % 3 - 1;
      if (i < 0 || i >= p_.height || j < 0 || j >= p_.width) continue;
      sum += p_.kernel[c * 9 + tap] * v[p_.num_prefix + i * p_.width + j][c];
    }
    return sum;
  }

  const void* value_weight() const { return p_.prefix_value ? p_.prefix_value : p_.wv; }
  const float* value_bias() const { return p_.prefix_value ? p_.prefix_value_bias : p_.bv; }

  Rows static_rows(const Rows& x) const {
    Rows given(x.begin(), x.begin() + p_.num_prefix);
    given.emplace_back(p_.dim);
    for (int64_t k = 0; k < p_.dim; ++k) {
      Sum sum = 0;
      for (int64_t m = 0; m < patches_; ++m) sum += x[p_.num_prefix + m][k];
      given.back()[k] = stored(sum / static_cast<Sum>(patches_));
    }
    Rows rows = project(given, value_weight(), value_bias(), p_.prefix_channels);
    for (int64_t t = 0; t < p_.num_prefix; ++t) {
      for (int64_t c = 0; c < p_.prefix_channels; ++c) {
        const int64_t at = t * p_.prefix_channels + c;
        rows[t][c] = stored(p_.static_a[at] * rows[t][c] + p_.static_b[at] * rows.back()[c]);
      }
    }
    rows.pop_back();
    return rows;
  }

  // Softmax attention with keys formed in full in fp64, and absorbed into the query in T.
  Rows exact_rows(const Rows& x) const {
    const Rows prefix(x.begin(), x.begin() + p_.num_prefix);
    const Rows q = project(prefix, p_.query, p_.query_bias, p_.prefix_channels);
    const int64_t head_dim = p_.prefix_channels / p_.num_heads;
    Rows rows(p_.num_prefix, std::vector<Sum>(p_.prefix_channels));
    for (int64_t t = 0; t < p_.num_prefix; ++t) {
      for (int64_t h = 0; h < p_.num_heads; ++h) {
        const std::vector<Sum> pooled = pool(x, shares(x, q[t], h * head_dim, head_dim));
        for (int64_t c = h * head_dim; c < (h + 1) * head_dim; ++c) {
          rows[t][c] = stored(dot(pooled, static_cast<const T*>(value_weight()), value_bias(), c));
        }
      }
    }
    return rows;
  }

  std::vector<Sum> shares(const Rows& x, const std::vector<Sum>& q, int64_t first,
                          int64_t count) const {
    std::vector<Sum> absorbed(p_.dim), logits(x.size());
    for (int64_t k = 0; k < p_.dim; ++k) {
      Sum sum = 0;
      for (int64_t c = first; c < first + count; ++c) {
        sum += q[c] * static_cast<Sum>(to_float(static_cast<const T*>(p_.key)[c * p_.dim + k]));
      }
      absorbed[k] = stored(sum);
    }
    Sum largest = -1e30f, total = 0;
    for (size_t n = 0; n < x.size(); ++n) {
      for (int64_t k = 0; k < p_.dim; ++k) logits[n] += absorbed[k] * x[n][k];
      logits[n] = stored(logits[n]);
      largest = std::max(largest, logits[n]);
    }
    for (Sum& v : logits) total += v = std::exp(v - largest);
    for (Sum& v : logits) v = stored(v / total);
    return logits;
  }

  std::vector<Sum> pool(const Rows& x, const std::vector<Sum>& share) const {
    std::vector<Sum> pooled(p_.dim);
    for (size_t n = 0; n < x.size(); ++n) {
      for (int64_t k = 0; k < p_.dim; ++k) pooled[k] += share[n] * x[n][k];
    }
    for (Sum& v : pooled) v = stored(v);
    return pooled;
  }

  const DwLayerParams p_;
  int64_t above_, patches_;
  Rows out_;  // image by image
};

}  // namespace harness
