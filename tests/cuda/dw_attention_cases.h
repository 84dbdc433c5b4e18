// Values and aggregation by definition, and the comparison of a kernel with it.
#pragma once

#include "drawn.h"
#include "kernels/cuda/dw_attention.h"

namespace dw_cases {

using namespace harness;
using dwattn::Status;
using dwattn::cuda::DwAttentionParams;

enum Terms { kNothing = 0, kBias = 1, kKappa = 2, kMu = 4, kBeta = 8, kEverything = 15 };

struct Case {
  int64_t batch, height, width, prefix, dim, channels;
  int terms = kEverything;
  int multiprocessors = 4;
  Layout x, wv, y;
};

// The definition. With `plain` V is rounded as a layer in T would, and sums are taken in fp32.
template <class T>
class Definition {
 public:
  Definition(const Case& c, const DwAttentionParams& p, const Tensor<T>& x, const Tensor<T>& wv,
             bool plain)
      : c_(c), p_(p), plain_(plain), tokens_(c.prefix + c.height * c.width) {
    v_.resize(c.batch * tokens_ * c.channels);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t t = 0; t < tokens_; ++t) {
        for (int64_t k = 0; k < c.channels; ++k) {
          const double bias = p.bv ? p.bv[k] : 0;
          double sum = 0;
          float single = 0;
          for (int64_t d = 0; d < c.dim; ++d) {
            sum += x(b, t, d) * wv(0, k, d);
            single += multiplied<T>(x(b, t, d)) * multiplied<T>(wv(0, k, d));
          }
          v(b, t, k) = plain ? rounded<T>(single + static_cast<float>(bias)) : sum + bias;
        }
      }
    }
  }

  double context(int64_t b, int64_t k) const {
    double ctx = p_.beta ? p_.beta[k] : 0, mean = 0;
    for (int64_t t = 0; p_.kappa && t < c_.prefix; ++t) {
      ctx += p_.kappa[t * c_.channels + k] * value(b, t, k);
    }
    for (int64_t t = c_.prefix; t < tokens_; ++t) mean += value(b, t, k);
    return ctx + (p_.mu ? p_.mu[k] * mean / static_cast<double>(c_.height * c_.width) : 0);
  }

  double output(int64_t b, int64_t i, int64_t j, int64_t k, double ctx) const {
    double sum = ctx;
    for (int64_t r = -1; r <= 1; ++r) {
      for (int64_t s = -1; s <= 1; ++s) {
        if (i + r < 0 || i + r >= c_.height || j + s < 0 || j + s >= c_.width) continue;
        const int64_t token = c_.prefix + (i + r) * c_.width + j + s;
        sum += p_.kernel[k * 9 + (r + 1) * 3 + s + 1] * value(b, token, k);
        if (plain_) sum = static_cast<float>(sum);
      }
    }
    return plain_ ? rounded<T>(static_cast<float>(sum)) : sum;
  }

 private:
  double& v(int64_t b, int64_t t, int64_t k) { return v_[(b * tokens_ + t) * c_.channels + k]; }
  double value(int64_t b, int64_t t, int64_t k) const {
    return v_[(b * tokens_ + t) * c_.channels + k];
  }

  const Case& c_;
  const DwAttentionParams& p_;
  const bool plain_;
  const int64_t tokens_;
  std::vector<double> v_;
};

inline std::string text(const Case& c, const char* type) {
  char line[200];
  std::snprintf(line, sizeof line,
                "%s B=%" PRId64 " H=%" PRId64 " W=%" PRId64 " P=%" PRId64 " D=%" PRId64
                " C=%" PRId64 " terms=%d sms=%d offsets=%" PRId64 ",%" PRId64 " order=%d",
                type, c.batch, c.height, c.width, c.prefix, c.dim, c.channels, c.terms,
                c.multiprocessors, c.x.offset, c.y.offset, static_cast<int>(simt::machine.order));
  return line;
}

// `run(params, workspace)` launches the kernel.
template <class T, class Run>
void check(const Case& c, const Run& run) {
  simt::machine.multiprocessors = c.multiprocessors;
  const int64_t patches = c.height * c.width;
  const auto x = Tensor<T>::random(c.batch, c.prefix + patches, c.dim, c.x);
  const float scale = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(c.dim, 1)));
  const auto wv = Tensor<T>::random(1, c.channels, c.dim, c.wv, scale);
  const Tensor<T> y(c.batch, patches, c.channels, c.y);
  const auto bv = normal(c.channels), kernel = normal(c.channels * 9, 0.3f),
             kappa = normal(c.prefix * c.channels), mu = normal(c.channels),
             beta = normal(c.channels);

  DwAttentionParams p{};
  p.dtype = kType<T>;
  p.tf32 = kTf32<T>;
  p.x = x.data();
  p.x_stride_batch = x.stride_batch;
  p.x_stride_token = x.stride_token;
  p.wv = wv.data();
  p.wv_stride = wv.stride_token;
  p.y = y.data();
  p.y_stride_batch = y.stride_batch;
  p.y_stride_token = y.stride_token;
  p.bv = c.terms & kBias ? bv.data() : nullptr;
  p.kernel = kernel.data();
  p.kappa = c.terms & kKappa ? kappa.data() : nullptr;
  p.mu = c.terms & kMu ? mu.data() : nullptr;
  p.beta = c.terms & kBeta ? beta.data() : nullptr;
  p.batch = c.batch;
  p.height = c.height;
  p.width = c.width;
  p.num_prefix = c.prefix;
  p.dim = c.dim;
  p.channels = c.channels;

  const std::string what = text(c, kTypeName<T>);
  std::vector<float> workspace = poisoned(dwattn::cuda::dw_attention_workspace(p));
  const Status status = run(p, workspace.data());
  expect(status == Status::kOk, what + ": " + dwattn::status_text(status));

  const Definition<T> exact(c, p, x, wv, false), plain(c, p, x, wv, true);
  Deviation of_kernel, of_plain;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t k = 0; k < c.channels; ++k) {
      const double exact_ctx = exact.context(b, k), plain_ctx = plain.context(b, k);
      for (int64_t i = 0; i < c.height; ++i) {
        for (int64_t j = 0; j < c.width; ++j) {
          const double truth = exact.output(b, i, j, k, exact_ctx);
          of_kernel.add(y(b, i * c.width + j, k), truth);
          of_plain.add(plain.output(b, i, j, k, plain_ctx), truth);
        }
      }
    }
  }
  expect_accurate<T>(of_kernel, of_plain, what);
  expect_tf32<T>(of_kernel, of_plain, what);
  expect(y.gaps_untouched(), what + ": wrote between the rows of y");
}

// Layouts: packed; wide gaps that keep 16-byte copies possible; nothing aligned.
inline const Layout kPacked{}, kGaps{16, 64, 8}, kOdd{3, 5, 1};

inline Case drawn_case() {
  const Grid grid = drawn_grid(260);
  Case c{between(1, 3), grid.height, grid.width, pick({0, 1, 5}), drawn_size(200), drawn_size(140)};
  c.terms = static_cast<int>(between(kNothing, kEverything));
  c.multiprocessors = drawn_multiprocessors();
  c.x = drawn_layout(), c.wv = drawn_layout(), c.y = drawn_layout();
  return c;
}

}  // namespace dw_cases
