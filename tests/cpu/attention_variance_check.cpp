// attention_variance of one instruction set, DWATTN_ISA, against loops in fp64: under sanitizers
// (tests/test_cpu_sanitized.py), and for AArch64 in an emulator.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu/attention_variance.h"
#include "kernels/cpu/attention_variance_impl.h"

#ifdef DWATTN_WITHOUT_GENERIC  // the choice of an instruction set is linked too, and names this one
namespace dwattn::cpu::generic {
Status attention_variance(const AttentionVarianceParams&, const AttentionTiles&, void*, int64_t,
                          const ParallelFor&) {
  return Status::kUnsupportedIsa;
}
}  // namespace dwattn::cpu::generic
#endif

namespace {

using namespace dwattn;
using cpu::BFloat16;
using cpu::Float16;

struct Case {
  int64_t batch, heads, tokens, head_dim, skip;
  bool values;
  int calls, threads;
};

constexpr Case kCases[] = {
    {3, 2, 37, 32, 1, true, 2, 1},   {1, 1, 1, 64, 0, true, 1, 1},
    {3, 2, 101, 80, 5, true, 3, 2},  {5, 1, 130, 64, 1, true, 1, 3},
    {2, 1, 16, 7, 0, true, 2, 1},    {2, 2, 6, 5, 5, true, 1, 1},
    {3, 1, 97, 24, 0, false, 2, 2},  {4, 1, 65, 128, 2, true, 1, 1},
    {2, 500, 17, 64, 1, true, 1, 2},  // written past the cache
};

template <class T>
constexpr DType kType = DType::kFloat32;
template <>
constexpr DType kType<Float16> = DType::kFloat16;
template <>
constexpr DType kType<BFloat16> = DType::kBFloat16;
template <class T>
constexpr double kRounding = 0x1p-24;
template <>
constexpr double kRounding<Float16> = 0x1p-11;
template <>
constexpr double kRounding<BFloat16> = 0x1p-8;

int failures = 0;

void expect(bool condition, const Case& c, const char* what) {
  if (condition) return;
  ++failures;
  std::printf("FAIL %s: B=%d heads=%d N=%d d_h=%d skip=%d\n", what, static_cast<int>(c.batch),
              static_cast<int>(c.heads), static_cast<int>(c.tokens), static_cast<int>(c.head_dim),
              static_cast<int>(c.skip));
}

cpu::ParallelFor threads_for(int& count) {
  return {[](void* context, int64_t tasks, int64_t, cpu::LoopBody body, void* body_context) {
            const int64_t threads = *static_cast<int*>(context);
            std::vector<std::thread> pool;
            for (int64_t i = 0; i < threads; ++i) {
              pool.emplace_back(body, body_context, i * tasks / threads, (i + 1) * tasks / threads);
            }
            for (std::thread& thread : pool) thread.join();
          },
          &count, count};
}

// Q, K and V packed as (B, N, 3, heads, d_h), exactly as large as that: the sanitizer sees one
// element too many.
template <class T>
struct Check {
  explicit Check(const Case& c_)
      : c(c_),
        row(3 * c.heads * c.head_dim),
        size(c.tokens - c.skip),
        qkv(c.batch * c.tokens * row),
        out(c.batch * c.tokens * c.heads * c.head_dim),
        mean(c.heads * size * size, std::numeric_limits<double>::quiet_NaN()),
        m2(mean),
        prefix(c.heads * size * c.skip, std::numeric_limits<double>::quiet_NaN()) {
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    for (T& value : qkv) cpu::from_float(normal(generator), &value);
    run();
    judge();
  }

  void run() {
    int threads = c.threads;
    for (int call = 0, first = 0; call < c.calls; ++call) {
      const int end = static_cast<int>(c.batch) * (call + 1) / c.calls;
      AttentionVarianceParams p{};
      p.dtype = kType<T>;
      const T* const images = qkv.data() + first * c.tokens * row;
      p.q = images;
      p.k = images + c.heads * c.head_dim;
      p.q_stride_batch = p.k_stride_batch = p.v_stride_batch = c.tokens * row;
      p.q_stride_head = p.k_stride_head = p.v_stride_head = c.head_dim;
      p.q_stride_token = p.k_stride_token = p.v_stride_token = row;
      if (c.values) {
        p.v = images + 2 * c.heads * c.head_dim;
        p.out = out.data() + first * c.tokens * c.heads * c.head_dim;
        p.out_stride_batch = c.tokens * c.heads * c.head_dim;
        p.out_stride_head = c.head_dim;
        p.out_stride_token = c.heads * c.head_dim;
      }
      p.state_dtype = DType::kFloat64;
      p.mean = mean.data();
      p.m2 = m2.data();
      p.prefix_mean = prefix.data();
      p.count = first;
      p.skip = c.skip;
      p.scale = scale();
      p.batch = end - first;
      p.heads = c.heads;
      p.tokens = c.tokens;
      p.head_dim = c.head_dim;
      const int64_t bytes = cpu::attention_variance_workspace(p, threads);
      std::unique_ptr<void, decltype(&std::free)> workspace(
          std::aligned_alloc(64, static_cast<size_t>((bytes + 63) & -64)), &std::free);
      const cpu::AttentionTiles tiles(p);
      const Status status = cpu::DWATTN_ISA::attention_variance(p, tiles, workspace.get(), threads,
                                                                threads_for(threads));
      expect(status == Status::kOk, c, "status");
      first = end;
    }
  }

  float scale() const { return 1.2f / std::sqrt(static_cast<float>(c.head_dim)); }
  double input(int64_t part, int64_t b, int64_t h, int64_t t, int64_t d) const {
    return cpu::to_float(qkv[(b * c.tokens + t) * row + (part * c.heads + h) * c.head_dim + d]);
  }

  void judge() const {
    double worst_out = 0, worst_mean = 0, worst_m2 = 0;
    std::vector<double> e(c.batch * c.tokens);
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t i = 0; i < c.tokens; ++i) {
        for (int64_t b = 0; b < c.batch; ++b) worst_out = std::fmax(worst_out, row_of(b, h, i, e));
        if (i < c.skip) continue;
        for (int64_t j = 0; j < c.tokens; ++j) {
          double sum = 0, squares = 0;
          for (int64_t b = 0; b < c.batch; ++b) sum += e[b * c.tokens + j];
          const double average = sum / static_cast<double>(c.batch);
          for (int64_t b = 0; b < c.batch; ++b) {
            const double deviation = e[b * c.tokens + j] - average;
            squares += deviation * deviation;
          }
          const int64_t query = h * size + i - c.skip;
          const bool kept = j >= c.skip;
          const double got = kept ? mean[query * size + j - c.skip] : prefix[query * c.skip + j];
          worst_mean = worse(worst_mean, std::fabs(got - average) / (1e-5 * average));
          if (kept) {
            const double error = std::fabs(m2[query * size + j - c.skip] - squares);
            worst_m2 = worse(worst_m2, error / (1e-4 * squares + 1e-5 * average * average));
          }
        }
      }
    }
    expect(worst_out <= 1, c, "out");
    expect(worst_mean <= 1, c, "mean");
    expect(worst_m2 <= 1, c, "m2");
  }

  static double worse(double worst, double error) {  // NaN is the worst
    return error <= worst ? worst : std::isnan(error) ? HUGE_VAL : error;
  }

  // E of a query into e[b]; returns the error of its output over what is allowed.
  double row_of(int64_t b, int64_t h, int64_t i, std::vector<double>& e) const {
    double* const weights = e.data() + b * c.tokens;
    double sum = 0;
    for (int64_t j = 0; j < c.tokens; ++j) {
      double logit = 0;
      for (int64_t d = 0; d < c.head_dim; ++d) logit += input(0, b, h, i, d) * input(1, b, h, j, d);
      sum += weights[j] = std::exp(logit * scale());
    }
    for (int64_t j = 0; j < c.tokens; ++j) weights[j] /= sum;
    double worst = 0;
    for (int64_t d = 0; c.values && d < c.head_dim; ++d) {
      double expected = 0;
      for (int64_t j = 0; j < c.tokens; ++j) expected += weights[j] * input(2, b, h, j, d);
      const double got = cpu::to_float(out[((b * c.tokens + i) * c.heads + h) * c.head_dim + d]);
      const double allowed = 1.01 * kRounding<T> * std::fabs(expected) + 1e-5;
      worst = worse(worst, std::fabs(got - expected) / allowed);
    }
    return worst;
  }

  const Case& c;
  const int64_t row, size;
  std::vector<T> qkv, out;
  std::vector<double> mean, m2, prefix;
};

}  // namespace

int main() {
  for (const Case& c : kCases) {
    Check<float>{c};
    Check<Float16>{c};
    Check<BFloat16>{c};
  }
  std::printf("%d failure(s)\n", failures);
  return failures == 0 ? 0 : 1;
}
