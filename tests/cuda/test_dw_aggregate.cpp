// The aggregation of a V in memory on awkward shapes, against an fp64 loop.
#include "drawn.h"
#include "kernels/cuda/dw_attention.h"

namespace {

using namespace harness;
using dwattn::DwAggregateParams;
using dwattn::Status;

struct Case {
  int64_t batch, height, width, prefix, channels;
  bool context, bias;
  int multiprocessors;
  Layout v, y;
};

template <class T>
void check(const Case& c) {
  simt::machine.multiprocessors = c.multiprocessors;
  const int64_t patches = c.height * c.width, tokens = c.prefix + patches;
  const auto v = Tensor<T>::random(c.batch, tokens, c.channels, c.v);
  const Tensor<T> y(c.batch, patches, c.channels, c.y);
  const auto kernel = normal(c.channels * 9, 0.3f), kappa = normal(c.prefix * c.channels),
             mu = normal(c.channels), beta = normal(c.channels), bias = normal(c.channels);
  DwAggregateParams p{};
  p.v = v.data();
  p.v_dtype = p.y_dtype = kType<T>;
  p.v_stride_batch = v.stride_batch;
  p.v_stride_token = v.stride_token;
  p.y = y.data();
  p.y_stride_batch = y.stride_batch;
  p.y_stride_token = y.stride_token;
  p.kernel = kernel.data();
  if (c.context) {
    p.kappa = kappa.data();
    p.mu = mu.data();
    p.beta = beta.data();
  }
  if (c.bias) p.v_bias = bias.data();
  p.batch = c.batch;
  p.height = c.height;
  p.width = c.width;
  p.num_prefix = c.prefix;
  p.channels = c.channels;

  char what[160];
  std::snprintf(what, sizeof what,
                "%s B=%" PRId64 " H=%" PRId64 " W=%" PRId64 " P=%" PRId64 " C=%" PRId64
                " context=%d bias=%d order=%d",
                kTypeName<T>, c.batch, c.height, c.width, c.prefix, c.channels, c.context, c.bias,
                static_cast<int>(simt::machine.order));
  std::vector<float> workspace = poisoned(dwattn::cuda::dw_aggregate_workspace(p));
  const Status status = dwattn::cuda::dw_aggregate(p, workspace.data(), nullptr);
  expect(status == Status::kOk, std::string(what) + ": " + dwattn::status_text(status));

  Deviation of_kernel, of_plain;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t k = 0; k < c.channels; ++k) {
      const double v_bias = c.bias ? bias[k] : 0;
      double ctx = 0, mean = 0;
      for (int64_t t = c.prefix; t < tokens; ++t) mean += (v(b, t, k) + v_bias) / patches;
      if (c.context) ctx = beta[k] + mu[k] * mean;
      for (int64_t t = 0; c.context && t < c.prefix; ++t) {
        ctx += kappa[t * c.channels + k] * (v(b, t, k) + v_bias);
      }
      for (int64_t n = 0; n < patches; ++n) {
        double exact = ctx;
        float plain = static_cast<float>(ctx);
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t i = n / c.width + tap / 3 - 1, j = n % c.width + tap % 3 - 1;
          if (i < 0 || i >= c.height || j < 0 || j >= c.width) continue;
          const double value = v(b, c.prefix + i * c.width + j, k) + v_bias;
          exact += kernel[k * 9 + tap] * value;
          plain += kernel[k * 9 + tap] * static_cast<float>(value);
        }
        of_kernel.add(y(b, n, k), exact);
        of_plain.add(rounded<T>(plain), exact);
      }
    }
  }
  expect_accurate<T>(of_kernel, of_plain, what);
  expect(y.gaps_untouched(), std::string(what) + ": wrote between the rows of y");
}

const Layout kPacked{}, kGaps{16, 64, 8}, kOdd{3, 5, 1};

const Case kCases[] = {
    {2, 5, 7, 1, 64, true, true, 4, kPacked, kPacked},
    {1, 7, 5, 5, 72, true, false, 4, kGaps, kGaps},
    {3, 1, 37, 0, 130, true, true, 4, kPacked, kPacked},
    {1, 37, 1, 5, 24, false, true, 4, kPacked, kGaps},
    {1, 13, 23, 0, 66, false, false, 132, kPacked, kPacked},  // short segments
    {2, 11, 13, 2, 65, true, true, 1, kOdd, kOdd},            // element by element
    {5, 4, 3, 1, 3, true, false, 4, kGaps, kOdd},
    {1, 1, 1, 0, 1, true, true, 4, kPacked, kPacked},
};

// The mean over very many patches, all of one value: what a long sum loses adds up.
void check_long_mean() {
  constexpr int64_t kPatches = 65536;
  const float value = 0.1f, mu = 1.0f;
  const std::vector<float> v(kPatches, value), kernel(9, 0.0f);
  std::vector<float> y(kPatches), workspace;
  DwAggregateParams p{};
  p.v = v.data();
  p.y = y.data();
  p.v_dtype = p.y_dtype = dwattn::DType::kFloat32;
  p.v_stride_token = p.y_stride_token = 1;
  p.v_stride_batch = p.y_stride_batch = kPatches;
  p.kernel = kernel.data();
  p.mu = &mu;
  p.batch = p.height = p.channels = 1;
  p.width = kPatches;
  workspace = poisoned(dwattn::cuda::dw_aggregate_workspace(p));
  expect(dwattn::cuda::dw_aggregate(p, workspace.data(), nullptr) == Status::kOk, "a long row");
  const double error = std::abs(y[kPatches / 2] / static_cast<double>(value) - 1);
  char what[80];
  std::snprintf(what, sizeof what, "the mean of 65536 patches is off by %.1e", error);
  expect(error < 1e-6, what);
}

Case drawn_case() {
  const Grid grid = drawn_grid(300);
  return {between(1, 3),   grid.height,   grid.width, pick({0, 1, 5}),
          drawn_size(200), coin(),        coin(),     drawn_multiprocessors(),
          drawn_layout(),  drawn_layout()};
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return run_drawn(arguments, [](uint32_t which) {
      which % 3 == 0   ? check<float>(drawn_case())
      : which % 3 == 1 ? check<__half>(drawn_case())
                       : check<__nv_bfloat16>(drawn_case());
    });
  }
  DwAggregateParams p{};
  p.batch = p.height = p.width = p.channels = 1;
  expect(dwattn::cuda::dw_aggregate(p, nullptr, nullptr) == Status::kInvalidArgument,
         "null pointers are refused");
  check_long_mean();
  return run_schedules([] {
    for (const Case& c : kCases) {
      check<float>(c);
      check<__half>(c);
      // The same code as for fp16 but for the conversions: one schedule is enough.
      if (simt::machine.order == simt::Order::kForward) check<__nv_bfloat16>(c);
    }
  });
}
