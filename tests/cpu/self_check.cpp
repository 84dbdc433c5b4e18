// The CPU kernels against loops in fp64, for machines where the Python tests do not run: built by a
// cross compiler and run in an emulator (tests/test_aarch64.py).
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/dw_aggregate.h"
#include "kernels/cpu/features.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/half.h"

namespace {

using namespace dwattn;
using cpu::BFloat16;
using cpu::Float16;

int failures = 0;
std::mt19937 generator(7);

template <class T>
constexpr DType kType = DType::kFloat32;
template <>
constexpr DType kType<double> = DType::kFloat64;
template <>
constexpr DType kType<Float16> = DType::kFloat16;
template <>
constexpr DType kType<BFloat16> = DType::kBFloat16;

// Half a unit in the last place of numbers near one.
template <class T>
constexpr double kRounding = 0x1p-24;
template <>
constexpr double kRounding<double> = 0x1p-53;
template <>
constexpr double kRounding<Float16> = 0x1p-11;
template <>
constexpr double kRounding<BFloat16> = 0x1p-8;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
std::vector<T> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) {
    const Acc<T> drawn = distribution(generator);
    cpu::from_float(drawn, &value);
  }
  return values;
}

void judge(const std::string& what, double worst) {
  if (worst <= 1) return;  // also false for NaN
  ++failures;
  std::printf("FAIL %s: %.3g times the allowed error\n", what.c_str(), worst);
}

// `in_place`: Y is written over V, kRowsInFront rows in front of what it is computed from.
template <class T>
void check_aggregate(int64_t height, int64_t width, int64_t prefix, int64_t channels,
                     bool in_place) {
  constexpr int64_t kBatch = 2;
  const int64_t patches = height * width, tokens = prefix + patches;
  const auto v = normal<T>(kBatch * tokens * channels);
  const int64_t in_front = cpu::kRowsInFront * width * channels;
  std::vector<T> both(static_cast<size_t>(in_front));
  both.insert(both.end(), v.begin(), v.end());
  const auto kernel = normal<Acc<T>>(channels * 9), kappa = normal<Acc<T>>(prefix * channels),
             mu = normal<Acc<T>>(channels), beta = normal<Acc<T>>(channels),
             bias = normal<Acc<T>>(channels);
  std::vector<T> apart(static_cast<size_t>(kBatch * patches * channels));
  T* const y = in_place ? both.data() : apart.data();
  DwAggregateParams p{};
  p.v = both.data() + in_front;
  p.v_stride_batch = tokens * channels;
  p.v_stride_token = p.y_stride_token = channels;
  p.y = y;
  p.y_stride_batch = patches * channels;
  p.v_dtype = p.y_dtype = kType<T>;
  p.kernel = kernel.data();
  p.kappa = prefix > 0 ? kappa.data() : nullptr;
  p.mu = mu.data();
  p.beta = beta.data();
  p.v_bias = bias.data();
  p.batch = kBatch;
  p.height = height;
  p.width = width;
  p.num_prefix = prefix;
  p.channels = channels;
  std::vector<char> workspace(static_cast<size_t>(cpu::dw_aggregate_workspace(p)));
  const std::string what = "dw_aggregate, dtype " + std::to_string(static_cast<int>(kType<T>)) +
                           " " + std::to_string(height) + "x" + std::to_string(width) +
                           " C=" + std::to_string(channels) + (in_place ? ", in place" : "");
  const Status status = cpu::dw_aggregate(p, workspace.data(), cpu::serial_for());
  if (status != Status::kOk) {
    ++failures;
    std::printf("FAIL %s: %s\n", what.c_str(), status_text(status));
    return;
  }

  double worst = 0;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto value = [&](int64_t token) {
        return static_cast<double>(cpu::to_float(v[(b * tokens + token) * channels + c])) + bias[c];
      };
      double mean = 0, ctx = beta[c];
      for (int64_t n = 0; n < patches; ++n) mean += value(prefix + n) / patches;
      ctx += mu[c] * mean;
      for (int64_t t = 0; t < prefix; ++t) ctx += kappa[t * channels + c] * value(t);
      for (int64_t n = 0; n < patches; ++n) {
        double sum = ctx, magnitude = std::fabs(ctx) + 1;
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t i = n / width + tap / 3 - 1, j = n % width + tap % 3 - 1;
          if (i < 0 || i >= height || j < 0 || j >= width) continue;
          const double term = kernel[c * 9 + tap] * value(prefix + i * width + j);
          sum += term;
          magnitude += std::fabs(term);
        }
        const double got = cpu::to_float(y[(b * patches + n) * channels + c]);
        const double allowed =
            1.01 * kRounding<T> * std::fabs(sum) + 16 * kRounding<Acc<T>> * magnitude;
        const double error = std::fabs(got - sum) / allowed;
        worst = error >= 0 ? std::max(worst, error) : INFINITY;
      }
    }
  }
  judge(what, worst);
}

// Tasks one after another, as if by so many threads.
cpu::ParallelFor threads_for(int64_t threads) {
  cpu::ParallelFor loop = cpu::serial_for();
  loop.threads = threads;
  return loop;
}

// Numbers in front of a page that may not be touched: a tile that is read too far fails, which the
// sanitizers do not see.
template <class T>
class Guarded {
 public:
  explicit Guarded(const std::vector<T>& values) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)),
                 bytes = values.size() * sizeof(T);
    length_ = (bytes + page - 1) / page * page + page;
    memory_ = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* const end = static_cast<char*>(memory_) + length_ - page;
    data_ = reinterpret_cast<T*>(end - bytes);
    std::copy(values.begin(), values.end(), data_);
    mprotect(end, page, PROT_NONE);
  }
  ~Guarded() { munmap(memory_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  const T* data() const { return data_; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void* memory_;
  size_t length_;
  T* data_;
};

// Two blocks of rows that lie `gap` rows apart, with a bias and padded rows everywhere.
template <class T>
void check_product(int64_t m, int64_t n, int64_t k, cpu::Isa isa = cpu::Isa::kAuto, int64_t gap = 1,
                   int64_t threads = 1, bool in_passing = false) {
  constexpr int64_t kBatch = 2;
  const int64_t a_row = k + 3, out_row = n + 5;
  const Guarded<T> a(normal<T>((kBatch * (m + gap) - gap - 1) * a_row + k));
  const Guarded<T> weight(normal<T>((n - 1) * (k + 1) + k));
  const auto bias = normal<Acc<T>>(n);
  constexpr float kUntouched = -7;
  T untouched;
  cpu::from_float(kUntouched, &untouched);
  std::vector<T> out(static_cast<size_t>(kBatch * (m + gap) * out_row), untouched);
  const std::string what = std::string("gemm, ") + cpu::isa_name(isa) + ", dtype " +
                           std::to_string(static_cast<int>(kType<T>)) + " " + std::to_string(m) +
                           "x" + std::to_string(n) + "x" + std::to_string(k) + ", gap " +
                           std::to_string(gap) + ", threads " + std::to_string(threads) +
                           (in_passing ? ", packed in passing" : "");
  cpu::WeightParams w{weight.data(), kType<T>, k + 1, n, k, nullptr, in_passing};
  std::vector<char> packed(static_cast<size_t>(cpu::packed_weight_bytes(w, isa)));
  w.packed = packed.data();
  const cpu::GemmParams p{a.data(),   kType<T>, (m + gap) * a_row,   a_row,   &w,     bias.data(),
                          out.data(), kType<T>, (m + gap) * out_row, out_row, kBatch, m,
                          n,          k};
  const cpu::ParallelFor loop = threads_for(threads);
  // Full of NaN, which must not reach the output.
  std::vector<char> workspace(static_cast<size_t>(cpu::gemm_workspace(p, threads, isa) + 1),
                              '\xff');
  if (cpu::pack_weight(w, loop, isa) != Status::kOk ||
      cpu::gemm(p, workspace.data(), loop, isa) != Status::kOk) {
    ++failures;
    std::printf("FAIL %s: refused\n", what.c_str());
    return;
  }
  double worst = 0;
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t i = 0; i < m + gap; ++i) {
      for (int64_t j = 0; j < out_row; ++j) {
        double sum = kUntouched, magnitude = 0;
        if (i < m && j < n) {
          sum = bias[j];
          magnitude = std::fabs(sum);
          for (int64_t l = 0; l < k; ++l) {
            const double term =
                static_cast<double>(cpu::to_float(a[(b * (m + gap) + i) * a_row + l])) *
                cpu::to_float(weight[j * (k + 1) + l]);
            sum += term;
            magnitude += std::fabs(term);
          }
        }
        const double got = cpu::to_float(out[(b * (m + gap) + i) * out_row + j]);
        const double allowed = magnitude == 0 ? 1e-300  // nothing may have been written
                                              : 1.01 * kRounding<T> * std::fabs(sum) +
                                                    (k + 1) * kRounding<Acc<T>> * magnitude;
        const double error = std::fabs(got - sum) / allowed;
        worst = error >= 0 ? std::max(worst, error) : INFINITY;
      }
    }
  }
  judge(what, worst);
}

template <class T>
void check_products() {
  // What is multiplied as it is, is packed by other rules.
  const bool generic =
      !cpu::by_tiles(kType<T>, cpu::Isa::kAuto) && !cpu::by_pairs(kType<T>, cpu::Isa::kAuto);
  for (bool in_passing : {false, true}) {
    if (in_passing && !generic) break;
    const auto check = [&](int64_t m, int64_t n, int64_t k) {
      check_product<T>(m, n, k, cpu::Isa::kAuto, 1, 1, in_passing);
    };
    for (int64_t n : {1, 29, 64, 83, 130}) check(37, n, 65);
    check(3, 96, 7);
    check(1, 16, 300);
  }
}

// Products of bf16 as it is: rows that are read in place and copies of them, last rows and columns
// of every kind, groups of columns, and every way to share the work.
void check_bf16_products(cpu::Isa isa) {
  for (int64_t threads : {1, 2, 3, 8}) {
    for (int64_t gap : {0, 1}) {
      for (int64_t m : {1, 5, 6, 7, 15, 16, 17, 31, 32, 33, 64, 75}) {
        check_product<BFloat16>(m, 83, 64, isa, gap, threads);
        check_product<BFloat16>(m, 32, 97, isa, gap, threads);
      }
      for (int64_t n : {1, 15, 16, 17, 31, 33, 63, 65, 96}) {
        check_product<BFloat16>(40, n, 32, isa, gap, threads);
      }
      check_product<BFloat16>(9, 40, 46, isa, gap, threads);
      check_product<BFloat16>(5, 40, 1, isa, gap, threads);
      check_product<BFloat16>(5, 40, 0, isa, gap, threads);
    }
  }
  check_product<BFloat16>(70, 161, 4096, isa);
}

// The first of `threads` threads, where a loop deals out consecutive tasks, computes its share of
// the rows: 577 of them against a weight too large for the cache.
void check_share(int64_t threads) {
  constexpr int64_t kRows = 577, kColumns = 1040, kDepth = 300;
  const auto a = normal<float>(kRows * kDepth), weight = normal<float>(kColumns * kDepth);
  std::vector<float> out(static_cast<size_t>(kRows * kColumns), NAN);
  cpu::WeightParams w{weight.data(), DType::kFloat32, kDepth, kColumns, kDepth, nullptr};
  std::vector<char> packed(static_cast<size_t>(cpu::packed_weight_bytes(w)));
  w.packed = packed.data();
  const cpu::GemmParams p{a.data(),   DType::kFloat32, 0, kDepth,   &w, nullptr,
                          out.data(), DType::kFloat32, 0, kColumns, 1,  kRows,
                          kColumns,   kDepth};
  const cpu::ParallelFor first{
      [](void* context, int64_t tasks, int64_t, cpu::LoopBody body, void* body_context) {
        const int64_t all = *static_cast<int64_t*>(context);
        body(body_context, 0, (tasks + all - 1) / all);
      },
      &threads, threads};
  cpu::pack_weight(w, cpu::serial_for());
  cpu::gemm(p, nullptr, first);
  int64_t rows = 0;
  for (int64_t i = 0; i < kRows; ++i) rows += !std::isnan(out[i * kColumns]);
  const double share = static_cast<double>(rows) * threads / kRows;
  if (share > 0.8 && share < 1.25) return;
  ++failures;
  std::printf("FAIL the first of %d threads computes %.2f times its share of the rows\n",
              static_cast<int>(threads), share);
}

template <class T>
void check_aggregates() {
  for (bool in_place : {false, true}) {
    check_aggregate<T>(5, 7, 1, 24, in_place);
    check_aggregate<T>(1, 9, 0, 19, in_place);
    check_aggregate<T>(6, 1, 5, 3, in_place);
    check_aggregate<T>(12, 16, 0, 64, in_place);
    for (int64_t height = 2; height < 12; ++height) check_aggregate<T>(height, 3, 1, 8, in_place);
  }
}

}  // namespace

int main() {
  check_aggregates<float>();
  check_aggregates<double>();
  check_aggregates<Float16>();
  check_aggregates<BFloat16>();
  check_products<float>();
  check_products<double>();
  check_products<Float16>();
  check_products<BFloat16>();
  for (int64_t threads : {2, 3}) check_share(threads);
  for (cpu::Isa isa : {cpu::Isa::kAvx512Bf16, cpu::Isa::kAmx}) {
    if (cpu::isa_usable(isa)) check_bf16_products(isa);
  }
  std::printf("%d failure(s), instruction set %s\n", failures, cpu::isa_name(cpu::default_isa()));
  return failures == 0 ? 0 : 1;
}
