// attention_variance under the emulation, against loops in fp64.
#include "drawn.h"
#include "kernels/cuda/attention_variance.cu"

namespace {

using namespace dwattn;
using namespace dwattn::cuda;
using harness::expect;
using harness::Layout;
using harness::Tensor;

struct Case {
  int batch, heads, tokens, head_dim;
  int skip;       // prefix tokens left out of the statistics
  bool packed;    // (B, N, n_h, d_h), as projections leave it, instead of (B, n_h, N, d_h)
  Layout layout;  // of every tensor
  bool prefix_mean;
  int calls;  // that the batch is split into: at most `batch`
  bool fp64_state;
};

constexpr Case kCases[] = {
    {1, 1, 64, 64, 0, false, {}, false, 1, false},
    {3, 2, 37, 32, 0, true, {8, 16, 0}, false, 2, false},
    {3, 1, 67, 80, 1, true, {}, true, 1, true},
    {4, 2, 70, 64, 5, false, {16, 0, 8}, true, 3, true},
    {3, 1, 131, 128, 5, false, {}, false, 2, false},
    {2, 3, 1, 64, 0, true, {}, false, 1, false},
    {3, 1, 17, 40, 2, true, {1, 3, 1}, true, 2, false},  // nothing is aligned
    {2, 1, 9, 7, 0, false, {}, false, 2, true},          // nor does d_h fill a vector
    {2, 1, 66, 128, 65, true, {}, true, 1, false},
};

template <class T>
std::string name(const Case& c) {
  return std::string(harness::kTypeName<T>) + " B=" + std::to_string(c.batch) +
         " heads=" + std::to_string(c.heads) + " N=" + std::to_string(c.tokens) +
         " d_h=" + std::to_string(c.head_dim) + " skip=" + std::to_string(c.skip);
}

// A (B, n_h, N, d_h) tensor in one of the two layouts.
template <class T>
struct Heads {
  explicit Heads(const Case& c, bool random)
      : length(c.head_dim), packed(c.packed), heads(c.heads), tensor(make(c, random)) {
    stride_head = packed ? length : tensor.stride_batch;
    stride_batch = packed ? tensor.stride_batch : heads * tensor.stride_batch;
  }

  static Tensor<T> make(const Case& c, bool random) {
    const int64_t groups = c.packed ? c.batch : c.batch * c.heads;
    const int64_t channels = c.packed ? c.heads * c.head_dim : c.head_dim;
    return random ? Tensor<T>::random(groups, c.tokens, channels, c.layout)
                  : Tensor<T>(groups, c.tokens, channels, c.layout);
  }

  double operator()(int64_t b, int64_t h, int64_t n, int64_t d) const {
    return packed ? tensor(b, n, h * length + d) : tensor(b * heads + h, n, d);
  }

  int64_t length;
  bool packed;
  int64_t heads;
  Tensor<T> tensor;
  int64_t stride_batch, stride_head;
};

template <class T, class State>
class Batch {
 public:
  explicit Batch(const Case& c)
      : c_(c),
        size_(c.tokens - c.skip),
        scale_(1.5f / std::sqrt(static_cast<float>(c.head_dim))),
        q_(c, true),
        k_(c, true),
        v_(c, true),
        out_(c, false),
        lse_(c.batch * c.heads * c.tokens, NAN),
        mean_(c.heads * size_ * size_, static_cast<State>(NAN)),  // an empty state is not read
        m2_(mean_),
        prefix_(c.heads * size_ * c.skip, static_cast<State>(NAN)) {}

  void run() {
    for (int call = 0, first = 0; call < c_.calls; ++call) {
      const int end = c_.batch * (call + 1) / c_.calls;
      const Status status = attention_variance(params(first, end), nullptr);
      expect(status == Status::kOk, name<T>(c_) + ": status");
      first = end;
    }
  }

  void judge() {
    for (int h = 0; h < c_.heads; ++h) judge_head(h);
    expect(out_.tensor.gaps_untouched(), name<T>(c_) + ": something around out was written");
  }

 private:
  AttentionVarianceParams params(int first, int end) {
    AttentionVarianceParams p{};
    p.dtype = harness::kType<T>;
    p.q = q_.tensor.data() + first * q_.stride_batch;
    p.k = k_.tensor.data() + first * k_.stride_batch;
    p.v = v_.tensor.data() + first * v_.stride_batch;
    p.out = out_.tensor.data() + first * out_.stride_batch;
    p.q_stride_batch = p.k_stride_batch = p.v_stride_batch = q_.stride_batch;
    p.q_stride_head = p.k_stride_head = p.v_stride_head = q_.stride_head;
    p.q_stride_token = p.k_stride_token = p.v_stride_token = q_.tensor.stride_token;
    p.out_stride_batch = out_.stride_batch;
    p.out_stride_head = out_.stride_head;
    p.out_stride_token = out_.tensor.stride_token;
    p.lse = lse_.data() + first * c_.heads * c_.tokens;
    p.state_dtype = sizeof(State) == 8 ? DType::kFloat64 : DType::kFloat32;
    p.mean = mean_.data();
    p.m2 = m2_.data();
    p.prefix_mean = c_.prefix_mean ? prefix_.data() : nullptr;
    p.count = first;
    p.skip = c_.skip;
    p.scale = scale_;
    p.batch = end - first;
    p.heads = c_.heads;
    p.tokens = c_.tokens;
    p.head_dim = c_.head_dim;
    return p;
  }

  // E (N, N) of one head of one image; log-sum-exps as well.
  std::vector<double> map(int b, int h, std::vector<double>& lse) const {
    std::vector<double> e(c_.tokens * c_.tokens);
    lse.assign(c_.tokens, 0.0);
    for (int i = 0; i < c_.tokens; ++i) {
      double sum = 0;
      for (int j = 0; j < c_.tokens; ++j) {
        double logit = 0;
        for (int d = 0; d < c_.head_dim; ++d) logit += q_(b, h, i, d) * k_(b, h, j, d);
        sum += e[i * c_.tokens + j] = std::exp(scale_ * logit);
      }
      for (int j = 0; j < c_.tokens; ++j) e[i * c_.tokens + j] /= sum;
      lse[i] = std::log(sum);
    }
    return e;
  }

  void judge_head(int h) {
    const int n = c_.tokens;
    std::vector<double> sum(n * n), squares(n * n), lse;
    std::vector<std::vector<double>> maps;
    for (int b = 0; b < c_.batch; ++b) {
      maps.push_back(map(b, h, lse));
      judge_output(b, h, maps.back(), lse);
      for (int i = 0; i < n * n; ++i) sum[i] += maps.back()[i];
    }
    for (const std::vector<double>& e : maps) {
      for (int i = 0; i < n * n; ++i) squares[i] += std::pow(e[i] - sum[i] / c_.batch, 2);
    }
    judge_state(h, sum, squares);
  }

  // P is rounded before it meets the values, relative to the largest weight of its row. In fp32
  // plain code is off by up to half of this at d_h = 128: its logits are.
  void judge_output(int b, int h, const std::vector<double>& e, const std::vector<double>& lse) {
    constexpr double kUnit = sizeof(T) == 4                   ? 0x1p-18
                             : std::is_same<T, __half>::value ? 0x1p-11
                                                              : 0x1p-8;
    double worst = 0, worst_lse = 0;
    for (int i = 0; i < c_.tokens; ++i) {
      for (int d = 0; d < c_.head_dim; ++d) {
        double exact = 0, magnitude = 0;
        for (int j = 0; j < c_.tokens; ++j) {
          exact += e[i * c_.tokens + j] * v_(b, h, j, d);
          magnitude += e[i * c_.tokens + j] * std::fabs(v_(b, h, j, d));
        }
        const double error = std::fabs(out_(b, h, i, d) - exact);
        const double share = error / (kUnit * (std::fabs(exact) + 1.05 * magnitude));
        if (!(share <= worst)) worst = std::isfinite(share) ? share : 1e9;
      }
      const double error = std::fabs(lse_[(b * c_.heads + h) * c_.tokens + i] - lse[i]);
      if (!(error <= worst_lse)) worst_lse = std::isfinite(error) ? error : 1e9;
    }
    expect(worst <= 1.0, name<T>(c_) + ": out is off by " + std::to_string(worst) + " allowances");
    expect(worst_lse <= 1e-5, name<T>(c_) + ": lse is off by " + std::to_string(worst_lse));
  }

  void judge_state(int h, const std::vector<double>& sum, const std::vector<double>& squares) {
    constexpr double kMean = 2e-5, kSquares = 1e-4;  // relative: E comes from fp32 logits
    double worst_mean = 0, worst_m2 = 0, worst_prefix = 0;
    const auto take = [](double& worst, double error, double allowed) {
      const double share = std::fabs(error) / allowed;
      if (!(share <= worst)) worst = std::isfinite(share) ? share : 1e9;
    };
    for (int i = c_.skip; i < c_.tokens; ++i) {
      const int64_t row = h * size_ + i - c_.skip;
      for (int j = 0; j < c_.tokens; ++j) {
        const double mean = sum[i * c_.tokens + j] / c_.batch, m2 = squares[i * c_.tokens + j];
        if (j < c_.skip) {
          if (c_.prefix_mean) take(worst_prefix, prefix_[row * c_.skip + j] - mean, kMean * mean);
          continue;
        }
        const int64_t entry = row * size_ + j - c_.skip;
        take(worst_mean, mean_[entry] - mean, kMean * mean);
        const double of_e = kMean * mean;  // what an error of E makes of a sum of squares
        take(worst_m2, m2_[entry] - m2,
             kSquares * m2 + 2 * std::sqrt(m2 * c_.batch) * of_e + c_.batch * of_e * of_e);
      }
    }
    const std::string of = name<T>(c_) + (sizeof(State) == 8 ? " fp64" : " fp32");
    expect(worst_mean <= 1, of + ": mean is off by " + std::to_string(worst_mean) + " allowances");
    expect(worst_m2 <= 1, of + ": M2 is off by " + std::to_string(worst_m2) + " allowances");
    expect(worst_prefix <= 1, of + ": prefix mean is off by " + std::to_string(worst_prefix));
  }

  const Case c_;
  const int64_t size_;
  const float scale_;
  const Heads<T> q_, k_, v_, out_;
  std::vector<float> lse_;
  std::vector<State> mean_, m2_, prefix_;
};

template <class T>
void run(const Case& c) {
  if (c.fp64_state) {
    Batch<T, double> batch(c);
    batch.run();
    batch.judge();
  } else {
    Batch<T, float> batch(c);
    batch.run();
    batch.judge();
  }
}

// Without a state nothing but lse and out is written; without v nothing but lse and the state.
void test_parts() {
  const Tensor<float> q = Tensor<float>::random(2, 20, 16), k = Tensor<float>::random(2, 20, 16);
  const Tensor<float> out(2, 20, 16);
  AttentionVarianceParams p{};
  p.dtype = DType::kFloat32;
  p.q = q.data();
  p.k = k.data();
  p.v = k.data();
  p.q_stride_batch = p.k_stride_batch = p.v_stride_batch = p.out_stride_batch = q.stride_batch;
  p.q_stride_token = p.k_stride_token = p.v_stride_token = p.out_stride_token = q.stride_token;
  p.scale = 0.25f;
  p.batch = 2;
  p.heads = 1;
  p.tokens = 20;
  p.head_dim = 16;
  std::vector<float> lse(40, NAN), other(40, NAN), mean(400, NAN), m2(400, NAN);
  p.out = out.data();
  p.lse = lse.data();
  expect(attention_variance(p, nullptr) == Status::kOk, "without a state: status");
  p.out = nullptr;
  p.v = nullptr;
  p.lse = other.data();
  p.state_dtype = DType::kFloat32;
  p.mean = mean.data();
  p.m2 = m2.data();
  expect(attention_variance(p, nullptr) == Status::kOk, "without values: status");
  expect(lse == other, "lse depends on what else is computed");
  for (float v : mean) expect(v > 0 && v < 1, "a mean is not a share");
  for (float v : m2) expect(v >= 0 && std::isfinite(v), "M2 is not a sum of squares");

  p.head_dim = 129;
  expect(attention_variance(p, nullptr) == Status::kInvalidArgument, "d_h = 129 is refused");
  p.head_dim = 16;
  p.skip = 20;
  expect(attention_variance(p, nullptr) == Status::kInvalidArgument, "no patches is refused");
  p.skip = 0;
  p.dtype = DType::kFloat64;
  expect(attention_variance(p, nullptr) == Status::kUnsupportedDType, "fp64 is refused");
}

Case drawn_case() {
  using harness::coin, harness::between;
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  Case c{};
  c.batch = size(between(1, 3));
  c.heads = size(between(1, 3));
  c.skip = size(harness::pick({0, 1, 5}));
  c.tokens = c.skip + size(harness::pick({1, 7, 23, 58, 59, 63, 64, 65, 97, 131}));
  c.head_dim = size(harness::pick({1, 7, 16, 32, 40, 64, 72, 80, 96, 128}));
  c.packed = coin();
  c.layout = harness::drawn_layout();
  c.prefix_mean = coin();
  c.calls = size(between(1, c.batch));
  c.fp64_state = coin();
  return c;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return harness::run_drawn(arguments, [](uint32_t which) {
      which % 3 == 0   ? run<float>(drawn_case())
      : which % 3 == 1 ? run<__half>(drawn_case())
                       : run<__nv_bfloat16>(drawn_case());
    });
  }
  return harness::run_schedules([] {
    for (const Case& c : kCases) {
      run<__half>(c);
      // bf16 takes the path of fp16: one schedule is enough.
      if (simt::machine.order == simt::Order::kForward) run<__nv_bfloat16>(c);
      run<float>(c);
    }
    test_parts();
  });
}
