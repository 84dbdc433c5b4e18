// Gradients of the aggregation on awkward shapes, against fp64 loops.
#include "drawn.h"
#include "kernels/cuda/dw_backward.h"

namespace {

using namespace harness;
using dwattn::Status;
using dwattn::cuda::DwBackwardParams;

enum class Wanted { kAll, kValues, kCoefficients };

struct Case {
  int64_t batch, height, width, prefix, channels;
  bool context;
  Wanted wanted;
  int multiprocessors;
  Layout layout;
};

// What the kernel reads and writes.
template <class T>
struct Buffers {
  explicit Buffers(const Case& c)
      : grad(Tensor<T>::random(c.batch, c.height * c.width, c.channels, c.layout)),
        v(Tensor<T>::random(c.batch, c.prefix + c.height * c.width, c.channels, c.layout)),
        dv(c.batch, c.prefix + c.height * c.width, c.channels, c.layout),
        kernel(normal(c.channels * 9, 0.3f)),
        kappa(normal(c.prefix * c.channels)),
        mu(normal(c.channels)),
        dkernel(poisoned(c.channels * 9 * 4)),
        dkappa(poisoned(c.prefix * c.channels * 4)),
        dmu(poisoned(c.channels * 4)),
        dbeta(poisoned(c.channels * 4)) {}

  DwBackwardParams params(const Case& c) {
    DwBackwardParams p{};
    p.dtype = kType<T>;
    p.grad = grad.data();
    p.grad_stride_batch = grad.stride_batch;
    p.grad_stride_token = grad.stride_token;
    if (c.context) {
      p.kappa = kappa.data();
      p.mu = mu.data();
    }
    p.dbeta = dbeta.data();
    if (c.wanted != Wanted::kCoefficients) {
      p.kernel = kernel.data();
      p.dv = dv.data();
      p.dv_stride_batch = dv.stride_batch;
      p.dv_stride_token = dv.stride_token;
    }
    if (c.wanted != Wanted::kValues) {
      p.v = v.data();
      p.v_stride_batch = v.stride_batch;
      p.v_stride_token = v.stride_token;
      p.dkernel = dkernel.data();
      p.dkappa = dkappa.data();
      p.dmu = dmu.data();
    }
    p.batch = c.batch;
    p.height = c.height;
    p.width = c.width;
    p.num_prefix = c.prefix;
    p.channels = c.channels;
    return p;
  }

  const Tensor<T> grad, v, dv;
  const std::vector<float> kernel, kappa, mu;
  std::vector<float> dkernel, dkappa, dmu, dbeta;
};

// A sum in fp64, and as plain fp32 code would form it.
struct Both {
  double exact = 0;
  float plain = 0;

  void add(double a, double b = 1) {
    exact += a * b;
    plain += static_cast<float>(a) * static_cast<float>(b);
  }
  void add(const Both& a, const Both& b) {
    exact += a.exact * b.exact;
    plain += a.plain * b.plain;
  }
};

struct Judged {
  Deviation kernel, plain;

  void compare(double value, double exact, double as_plain) {
    kernel.add(value, exact);
    plain.add(as_plain, exact);
  }
};

// The gradients that belong to one channel.
template <class T>
struct Channel {
  Channel(const Case& given, const Buffers<T>& buffers, int64_t channel)
      : c(given), t(buffers), k(channel) {}

  double grad_at(int64_t b, int64_t i, int64_t j) const {
    const bool inside = i >= 0 && i < c.height && j >= 0 && j < c.width;
    return inside ? t.grad(b, i * c.width + j, k) : 0;
  }

  void image(int64_t b, Judged& values) {
    const int64_t patches = c.height * c.width;
    Both sum, mean;
    for (int64_t n = 0; n < patches; ++n) {
      sum.add(t.grad(b, n, k));
      mean.add(t.v(b, c.prefix + n, k), 1.0 / patches);
    }
    beta.add(sum, {1, 1});
    mu.add(mean, sum);
    const double floor = c.context ? t.mu[k] * sum.exact / patches : 0;
    for (int64_t n = 0; n < patches; ++n) {
      Both value;
      value.add(floor);
      for (int tap = 0; tap < 9; ++tap) {
        const double g = grad_at(b, n / c.width + 1 - tap / 3, n % c.width + 1 - tap % 3);
        taps[tap].add(t.v(b, c.prefix + n, k), g);
        value.add(t.kernel[k * 9 + tap], g);
      }
      values.compare(t.dv(b, c.prefix + n, k), value.exact, rounded<T>(value.plain));
    }
    for (int64_t p = 0; p < c.prefix; ++p) {
      const double exact = c.context ? t.kappa[p * c.channels + k] * sum.exact : 0;
      const float v = static_cast<float>(t.v(b, p, k));
      kappa[p].add({v, v}, sum);
      values.compare(t.dv(b, p, k), exact, rounded<T>(static_cast<float>(exact)));
    }
  }

  const Case& c;
  const Buffers<T>& t;
  int64_t k;
  Both taps[9], mu, beta;
  std::vector<Both> kappa = std::vector<Both>(static_cast<size_t>(c.prefix));
};

template <class T>
std::string description(const Case& c) {
  char what[160];
  std::snprintf(what, sizeof what,
                "%s B=%" PRId64 " H=%" PRId64 " W=%" PRId64 " P=%" PRId64 " C=%" PRId64
                " context=%d wanted=%d order=%d: ",
                kTypeName<T>, c.batch, c.height, c.width, c.prefix, c.channels, c.context,
                static_cast<int>(c.wanted), static_cast<int>(simt::machine.order));
  return what;
}

template <class T>
void check(const Case& c) {
  simt::machine.multiprocessors = c.multiprocessors;
  Buffers<T> t(c);
  const DwBackwardParams p = t.params(c);
  std::vector<float> workspace = poisoned(dwattn::cuda::dw_backward_workspace(p));
  const Status status = dwattn::cuda::dw_backward(p, workspace.data(), nullptr);
  const std::string what = description<T>(c);
  expect(status == Status::kOk, what + dwattn::status_text(status));

  Judged values, taps, kappa, mu, beta;
  for (int64_t k = 0; k < c.channels; ++k) {
    Channel<T> of(c, t, k);
    for (int64_t b = 0; b < c.batch; ++b) of.image(b, values);
    for (int tap = 0; tap < 9; ++tap) {
      taps.compare(t.dkernel[k * 9 + tap], of.taps[tap].exact, of.taps[tap].plain);
    }
    for (int64_t n = 0; n < c.prefix; ++n) {
      kappa.compare(t.dkappa[n * c.channels + k], of.kappa[n].exact, of.kappa[n].plain);
    }
    mu.compare(t.dmu[k], of.mu.exact, of.mu.plain);
    beta.compare(t.dbeta[k], of.beta.exact, of.beta.plain);
  }
  expect_accurate<float>(beta.kernel, beta.plain, what + "dbeta");
  if (p.dv != nullptr) {
    expect_accurate<T>(values.kernel, values.plain, what + "dv");
    expect(t.dv.gaps_untouched(), what + "wrote between the rows of dv");
  }
  if (p.v != nullptr) {
    expect_accurate<float>(taps.kernel, taps.plain, what + "dkernel");
    expect_accurate<float>(kappa.kernel, kappa.plain, what + "dkappa");
    expect_accurate<float>(mu.kernel, mu.plain, what + "dmu");
  }
}

const Layout kPacked{}, kGaps{16, 64, 8}, kOdd{3, 5, 1}, kOddRows{1, 0, 0};

const Case kCases[] = {
    {2, 5, 7, 1, 64, true, Wanted::kAll, 4, kPacked},
    {1, 9, 6, 5, 72, true, Wanted::kAll, 4, kGaps},
    {3, 1, 37, 0, 130, true, Wanted::kAll, 1, kPacked},  // several units a warp
    {1, 37, 1, 2, 24, false, Wanted::kAll, 4, kGaps},
    {1, 13, 23, 0, 66, false, Wanted::kAll, 132, kOddRows},  // short segments, several parts
    {2, 11, 13, 2, 65, true, Wanted::kAll, 2, kOdd},         // element by element
    {9, 4, 3, 1, 3, true, Wanted::kAll, 4, kOdd},            // more images than rows of a block
    {2, 6, 5, 1, 34, true, Wanted::kValues, 4, kPacked},
    {2, 6, 5, 1, 34, true, Wanted::kCoefficients, 4, kPacked},
    {1, 1, 1, 0, 1, true, Wanted::kAll, 4, kPacked},
};

// Without images every gradient of a coefficient is zero.
void check_empty() {
  const Case c{0, 3, 4, 1, 5, true, Wanted::kCoefficients, 4, {}};
  std::vector<float> dkernel = poisoned(45 * 4), dmu = poisoned(5 * 4);
  DwBackwardParams p{};
  p.dtype = dwattn::DType::kFloat32;
  p.dkernel = dkernel.data();
  p.dmu = dmu.data();
  p.height = c.height;
  p.width = c.width;
  p.num_prefix = c.prefix;
  p.channels = c.channels;
  expect(dwattn::cuda::dw_backward(p, nullptr, nullptr) == Status::kOk, "an empty batch");
  for (const std::vector<float>* zeros : {&dkernel, &dmu}) {
    for (float value : *zeros) expect(value == 0.0f, "gradients of an empty batch are zero");
  }
}

// The same bits twice, whatever the threads are up to.
void check_repeatable() {
  const Case c{3, 10, 9, 1, 70, true, Wanted::kAll, 16, {}};
  Buffers<__half> t(c);
  const DwBackwardParams p = t.params(c);
  std::vector<float> first;
  for (simt::Order order : simt::kOrders) {
    simt::machine.order = order;
    std::vector<float> workspace = poisoned(dwattn::cuda::dw_backward_workspace(p));
    dwattn::cuda::dw_backward(p, workspace.data(), nullptr);
    if (first.empty()) first = t.dkernel;
    expect(first == t.dkernel, "dkernel depends on the order of the threads");
  }
}

// Gradients over very many patches, all of one value: what a long sum loses adds up.
void check_long_sums() {
  constexpr int64_t kSide = 256;
  const std::vector<float> values(kSide * kSide, 0.1f);
  float dkernel[9], dbeta;
  DwBackwardParams p{};
  p.grad = p.v = values.data();
  p.grad_stride_token = p.v_stride_token = 1;
  p.dkernel = dkernel;
  p.dbeta = &dbeta;
  p.batch = p.channels = 1;
  p.height = p.width = kSide;
  simt::machine.multiprocessors = 1;
  std::vector<float> workspace = poisoned(dwattn::cuda::dw_backward_workspace(p));
  expect(dwattn::cuda::dw_backward(p, workspace.data(), nullptr) == Status::kOk, "long sums");
  const double count = kSide * kSide, value = values[0];
  const double errors[] = {dbeta / (count * value) - 1, dkernel[4] / (count * value * value) - 1};
  for (const double error : errors) {
    char what[80];
    std::snprintf(what, sizeof what, "a gradient of 65536 patches is off by %.1e", error);
    expect(std::fabs(error) < 3e-6, what);
  }
}

Case drawn_case() {
  const Grid grid = drawn_grid(300);
  constexpr Wanted kWanted[] = {Wanted::kAll, Wanted::kAll, Wanted::kValues, Wanted::kCoefficients};
  return {pick({1, 2, 3, 9}),
          grid.height,
          grid.width,
          pick({0, 1, 5}),
          std::max<int64_t>(drawn_size(140), 8),  // of fewer sums the plain ones may be lucky
          coin(),
          kWanted[between(0, 3)],
          drawn_multiprocessors(),
          drawn_layout()};
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
  DwBackwardParams p{};
  p.batch = p.height = p.width = p.channels = 1;
  expect(dwattn::cuda::dw_backward(p, nullptr, nullptr) == Status::kInvalidArgument,
         "null pointers are refused");
  check_repeatable();
  check_long_sums();
  return run_schedules([] {
    check_empty();
    for (const Case& c : kCases) {
      check<float>(c);
      check<__half>(c);
      // The same code as for fp16 but for the conversions: one schedule is enough.
      if (simt::machine.order == simt::Order::kForward) check<__nv_bfloat16>(c);
    }
  });
}
