// lowrank_dw_attention under the emulation, against loops in fp64.
#include "drawn.h"
#include "kernels/cuda/lowrank_dw_plan.cu"

namespace {

using namespace dwattn;
using namespace dwattn::cuda;
using harness::expect;
using harness::Layout;
using harness::Tensor;

struct Case {
  int batch, height, width, prefix, dim, dim_out, rank;
  bool a_bias, ctx, b_bias, residual, gamma;
  Layout layout;                // of every tensor
  int tile_height, tile_width;  // or 0: as planned for a small device
};

constexpr DeviceLimits kSmallDevice{99 << 10, 16};

// Odd widths, one row, one column, sizes that no tile divides; every option on and off; aligned and
// not; one block for an image and many, also with tiles that do not divide the grid.
constexpr Case kCases[] = {
    {1, 5, 7, 0, 64, 64, 32, true, true, true, false, false, {}, 5, 7},
    {1, 1, 13, 0, 40, 72, 40, true, true, false, true, true, {8, 0, 0}, 1, 5},
    {2, 11, 3, 1, 72, 136, 64, false, true, true, true, false, {16, 0, 0}, 4, 3},
    {3, 6, 5, 2, 48, 48, 40, true, false, true, false, true, {}, 1, 1},
    {1, 9, 17, 5, 96, 200, 136, true, true, true, true, true, {24, 8, 0}, 5, 6},
    {1, 7, 1, 0, 33, 35, 37, true, true, true, true, true, {3, 5, 1}, 2, 1},
    {1, 3, 5, 1, 41, 64, 24, true, false, false, false, false, {}, 0, 0},
    {1, 4, 6, 0, 64, 129, 64, false, false, false, true, false, {1, 0, 0}, 2, 2},
    {1, 19, 13, 0, 24, 24, 8, true, true, true, true, true, {8, 0, 0}, 19, 13},
    {2, 8, 9, 1, 56, 40, 128, true, true, true, true, true, {}, 0, 0},
    {1, 2, 2, 1, 16, 16, 300, true, true, true, false, false, {}, 2, 2},
    {1, 1, 3, 0, 16, 16, 1100, true, true, true, false, false, {}, 1, 3},
};

// Random tokens; prefix rows stay NaN, since nothing may read them.
template <class T>
Tensor<T> patches(const Case& c, int channels) {
  Tensor<T> t(c.batch, c.prefix + c.height * c.width, channels, c.layout);
  const std::vector<float> values = harness::normal(c.batch * c.height * c.width * channels);
  for (int64_t b = 0, i = 0; b < c.batch; ++b) {
    for (int64_t n = c.prefix; n < c.prefix + c.height * c.width; ++n) {
      for (int64_t d = 0; d < channels; ++d) *t.at(b, n, d) = from_float<T>(values[i++]);
    }
  }
  return t;
}

template <class T>
Tensor<T> weights(const Case& c, int rows, int columns) {
  return Tensor<T>::random(1, rows, columns, c.layout, 1 / std::sqrt(static_cast<float>(columns)));
}

template <class T>
class Layer {
 public:
  explicit Layer(const Case& c)
      : c_(c),
        x_(patches<T>(c, c.dim)),
        a_(weights<T>(c, c.rank, c.dim)),
        b_(weights<T>(c, c.dim_out, c.rank)),
        residual_(patches<T>(c, c.dim_out)),
        out_(c.batch, c.prefix + c.height * c.width, c.dim_out, c.layout),
        a_bias_(harness::normal(c.rank)),
        kernel_(harness::normal(c.rank * 9, 0.5f)),
        ctx_(harness::normal(c.batch * c.rank)),
        b_bias_(harness::normal(c.dim_out)),
        gamma_(harness::normal(c.dim_out)) {}

  LowrankDwParams params() {
    LowrankDwParams p{};
    p.dtype = harness::kType<T>;
    p.tf32 = harness::kTf32<T>;
    p.x = x_.data();
    p.x_stride_token = x_.stride_token;
    p.x_stride_batch = x_.stride_batch;
    p.a = a_.data();
    p.a_stride = a_.stride_token;
    p.b = b_.data();
    p.b_stride = b_.stride_token;
    p.a_bias = c_.a_bias ? a_bias_.data() : nullptr;
    p.kernel = kernel_.data();
    p.ctx = c_.ctx ? ctx_.data() : nullptr;
    p.b_bias = c_.b_bias ? b_bias_.data() : nullptr;
    p.residual = c_.residual ? residual_.data() : nullptr;
    p.residual_stride_token = residual_.stride_token;
    p.residual_stride_batch = residual_.stride_batch;
    p.gamma = c_.gamma ? gamma_.data() : nullptr;
    p.out = out_.data();
    p.out_stride_token = out_.stride_token;
    p.out_stride_batch = out_.stride_batch;
    p.batch = c_.batch;
    p.height = c_.height;
    p.width = c_.width;
    p.num_prefix = c_.prefix;
    p.dim = c_.dim;
    p.dim_out = c_.dim_out;
    p.rank = c_.rank;
    return p;
  }

  // Compares `out`, and that nothing else was written.
  void judge_output() {
    for (int64_t image = 0; image < c_.batch; ++image) {
      for (int64_t t = 0; t < c_.prefix; ++t) {
        for (int64_t d = 0; d < c_.dim_out; ++d) {
          expect(std::isnan(out_(image, t, d)), name() + ": a prefix row was written");
        }
      }
      judge_image(image);
    }
    expect(out_.gaps_untouched(), name() + ": something around out was written");
  }

  std::string name() const {
    return std::string(harness::kTypeName<T>) + " B=" + std::to_string(c_.batch) + " " +
           std::to_string(c_.height) + "x" + std::to_string(c_.width) +
           " D=" + std::to_string(c_.dim) + "->" + std::to_string(c_.dim_out) +
           " r=" + std::to_string(c_.rank);
  }

 private:
  static double multiplied(double v) { return harness::multiplied<T>(v); }

  std::vector<double> projected(int64_t image) {
    std::vector<double> u(c_.height * c_.width * c_.rank);
    for (int64_t m = 0; m < c_.height * c_.width; ++m) {
      for (int64_t k = 0; k < c_.rank; ++k) {
        double sum = c_.a_bias ? a_bias_[k] : 0.0;
        for (int64_t d = 0; d < c_.dim; ++d) {
          sum += multiplied(x_(image, c_.prefix + m, d)) * multiplied(a_(0, k, d));
        }
        u[m * c_.rank + k] = harness::rounded<T>(static_cast<float>(sum));
      }
    }
    return u;
  }

  std::vector<double> aggregated(int64_t image) {
    const std::vector<double> u = projected(image);
    std::vector<double> y(u.size());
    for (int i = 0; i < c_.height; ++i) {
      for (int j = 0; j < c_.width; ++j) {
        for (int k = 0; k < c_.rank; ++k) {
          double sum = c_.ctx ? ctx_[image * c_.rank + k] : 0.0;
          for (int di = -1; di <= 1; ++di) {
            for (int dj = -1; dj <= 1; ++dj) {
              const int row = i + di, column = j + dj;
              if (row < 0 || row >= c_.height || column < 0 || column >= c_.width) continue;
              sum += kernel_[k * 9 + (di + 1) * 3 + dj + 1] *
                     u[(row * c_.width + column) * c_.rank + k];
            }
          }
          y[(i * c_.width + j) * c_.rank + k] = harness::rounded<T>(static_cast<float>(sum));
        }
      }
    }
    return y;
  }

  void judge_image(int64_t image) {
    // One rounding of the result; some of the r inner channels rounded the other way than in fp64;
    // sums in fp32.
    constexpr double kUnit = sizeof(T) == 4                   ? 0x1p-24
                             : std::is_same<T, __half>::value ? 0x1p-11
                                                              : 0x1p-8;
    constexpr double kInner = harness::kTf32<T> ? 0x1p-11 : kUnit;
    const std::vector<double> y = aggregated(image);
    double worst = 0;
    int64_t worst_patch = 0, worst_feature = 0;
    for (int64_t m = 0; m < c_.height * c_.width; ++m) {
      for (int64_t d = 0; d < c_.dim_out; ++d) {
        double sum = c_.b_bias ? b_bias_[d] : 0.0, largest = 0, magnitude = std::fabs(sum);
        for (int64_t k = 0; k < c_.rank; ++k) {
          const double term = multiplied(y[m * c_.rank + k]) * multiplied(b_(0, d, k));
          sum += term;
          largest = std::max(largest, std::fabs(term));
          magnitude += std::fabs(term);
        }
        const double gamma = c_.gamma ? gamma_[d] : 1.0;
        const double base = c_.residual ? residual_(image, c_.prefix + m, d) : 0.0;
        const double exact = base + gamma * sum;
        const double allowed = 1.01 * kUnit * std::fabs(exact) + 0x1p-20 * std::fabs(base) +
                               std::fabs(gamma) * (8 * kInner * largest + 0x1p-21 * magnitude) +
                               1e-6;
        const double error = std::fabs(out_(image, c_.prefix + m, d) - exact) / allowed;
        if (!(error <= worst)) {
          worst = std::isfinite(error) ? error : 1e9;
          worst_patch = m;
          worst_feature = d;
        }
      }
    }
    expect(worst <= 1.0, name() + ": image " + std::to_string(image) + " patch " +
                             std::to_string(worst_patch) + " feature " +
                             std::to_string(worst_feature) + " is off by " + std::to_string(worst) +
                             " allowances");
  }

  const Case c_;
  const Tensor<T> x_, a_, b_, residual_, out_;
  const std::vector<float> a_bias_, kernel_, ctx_, b_bias_, gamma_;
};

template <class T>
void run(const Case& c) {
  Layer<T> layer(c);
  const LowrankDwParams p = layer.params();
  LowrankDwPlan plan = plan_of_tile(p, std::max(c.tile_height, 1), std::max(c.tile_width, 1));
  Status status = Status::kOk;
  if (c.tile_height == 0) status = plan_lowrank_dw(p, kSmallDevice, &plan);
  if (status == Status::kOk) status = lowrank_dw_attention(p, plan, nullptr);
  expect(status == Status::kOk, layer.name() + ": " + status_text(status));
  layer.judge_output();
}

// The residual may be the output.
void test_in_place() {
  const Case c = {1, 4, 5, 0, 32, 48, 32, true, true, true, true, true, {}, 0, 0};
  Layer<float> layer(c);
  LowrankDwParams p = layer.params();
  LowrankDwPlan plan;
  expect(plan_lowrank_dw(p, kSmallDevice, &plan) == Status::kOk, "in place: no plan");
  expect(lowrank_dw_attention(p, plan, nullptr) == Status::kOk, "in place: status");
  const int64_t size = c.height * c.width * c.dim_out;
  const float* const residual = static_cast<const float*>(p.residual);
  const float* const out = static_cast<const float*>(p.out);
  const std::vector<float> separate(out, out + size);
  std::vector<float> both(residual, residual + size);
  p.residual = p.out = both.data();
  expect(lowrank_dw_attention(p, plan, nullptr) == Status::kOk, "in place: status");
  expect(both == separate, "in place: not what a separate residual gives");
}

LowrankDwParams sizes(DType dtype, int batch, int height, int width, int dim, int rank) {
  LowrankDwParams p{};
  p.dtype = dtype;
  p.batch = batch;
  p.height = height;
  p.width = width;
  p.dim = p.dim_out = dim;
  p.rank = rank;
  return p;
}

void test_plans() {
  for (DType dtype : {DType::kFloat16, DType::kFloat32}) {
    for (int64_t kib : {99, 163, 227}) {
      for (int multiprocessors : {1, 16, 132}) {
        for (int rank : {1, 32, 40, 64, 128, 136, 256, 512}) {
          for (int side : {1, 7, 24, 37, 100}) {
            for (int batch : {1, 64}) {
              const LowrankDwParams p = sizes(dtype, batch, side, 2 * side - 1, 1024, rank);
              const DeviceLimits limits{kib << 10, multiprocessors};
              const std::string about = "for r=" + std::to_string(rank) + ", side " +
                                        std::to_string(side) + ", " + std::to_string(kib) + " KiB";
              LowrankDwPlan plan{};
              expect(plan_lowrank_dw(p, limits, &plan) == Status::kOk, "no plan " + about);
              const int64_t down = (p.height + plan.tile_height - 1) / plan.tile_height;
              const int64_t across = (p.width + plan.tile_width - 1) / plan.tile_width;
              expect(plan.shared_bytes <= limits.shared_bytes && plan.tile_height >= 1 &&
                         plan.tile_width >= 1 && plan.blocks == batch * down * across,
                     "a plan that does not fit " + about);
              expect(plan.channels >= rank && plan.channels % 16 == 0, "too few channels " + about);
            }
          }
        }
      }
    }
  }
}

// What the plans are for: little repeated work where there are many images, many blocks for one.
void test_plan_choices() {
  LowrankDwPlan plan{};
  const LowrankDwParams many = sizes(DType::kBFloat16, 256, 24, 24, 1024, 128);
  expect(plan_lowrank_dw(many, {227 << 10, 132}, &plan) == Status::kOk, "no plan");
  const double repeated = static_cast<double>((plan.tile_height + 2) * (plan.tile_width + 2)) /
                          (plan.tile_height * plan.tile_width);
  expect(repeated <= 1.35, "many images: U is computed " + std::to_string(repeated) + " times");
  const LowrankDwParams one = sizes(DType::kFloat16, 1, 24, 24, 1024, 128);
  expect(plan_lowrank_dw(one, {163 << 10, 16}, &plan) == Status::kOk, "no plan");
  expect(plan.blocks >= 12,
         "one image on 16 multiprocessors makes only " + std::to_string(plan.blocks) + " blocks");

  expect(plan_lowrank_dw(sizes(DType::kFloat16, 1, 9, 9, 64, 1632), {99 << 10, 16}, &plan) ==
             Status::kOk,
         "r=1632 fits into 99 KB");
  expect(plan_lowrank_dw(sizes(DType::kFloat16, 1, 9, 9, 64, 1633), {99 << 10, 16}, &plan) ==
             Status::kInvalidArgument,
         "r=1633 does not fit into 99 KB");
  expect(plan_lowrank_dw(sizes(DType::kFloat16, 1, 0, 9, 64, 64), {99 << 10, 16}, &plan) ==
             Status::kInvalidArgument,
         "an empty grid has no plan");
  expect(plan_lowrank_dw(sizes(DType::kFloat64, 1, 9, 9, 64, 64), {99 << 10, 16}, &plan) ==
             Status::kUnsupportedDType,
         "fp64 has no kernel");
}

Case drawn_case() {
  using harness::coin, harness::between, harness::drawn_size;
  const harness::Grid grid = harness::drawn_grid(150);
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const bool planned = coin();
  return {size(between(1, 3)),
          size(grid.height),
          size(grid.width),
          size(harness::pick({0, 1, 5})),
          size(drawn_size(200)),
          size(drawn_size(200)),
          size(std::max<int64_t>(drawn_size(260), 8)),  // fewer cancel: no measure for the rest
          coin(),
          coin(),
          coin(),
          coin(),
          coin(),
          harness::drawn_layout(),
          planned ? 0 : size(between(1, 5)),
          planned ? 0 : size(between(1, 5))};
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return harness::run_drawn(arguments, [](uint32_t which) {
      harness::check_typed(which, [](auto element) { run<decltype(element)>(drawn_case()); });
    });
  }
  test_plans();
  test_plan_choices();
  return harness::run_schedules([] {
    for (const Case& c : kCases) {
      run<__half>(c);
      run<float>(c);
      // bf16 and TF32 take the path of fp16: one schedule is enough.
      if (simt::machine.order != simt::Order::kForward) continue;
      run<__nv_bfloat16>(c);
      run<Tf32>(c);
    }
    test_in_place();
  });
}
