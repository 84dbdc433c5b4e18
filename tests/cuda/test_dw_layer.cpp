// Whole layers, wide and narrow, with every kind of prefix rows, against their definition in fp64.
#include "drawn.h"
#include "kernels/cuda/dw_layer.h"
#include "layer_definition.h"

namespace {

using namespace harness;
using dwattn::DType;
using dwattn::Status;
using dwattn::cuda::dw_layer;
using dwattn::cuda::dw_layer_workspace;
using dwattn::cuda::DwLayerParams;
using dwattn::cuda::PrefixRows;

// What a case has besides its sizes.
enum Options {
  kBias = 1,     // on every projection
  kContext = 2,  // kappa and beta
  kMean = 4,     // mu
  kResidual = 8,
  kScale = 16,     // gamma
  kOwnValue = 32,  // for prefix rows
  kOwnOut = 64,
  kOwn = kOwnValue | kOwnOut,
  kBlock = kBias | kContext | kMean | kResidual | kScale,
};

struct Case {
  bool narrow;
  PrefixRows prefix;
  int64_t batch, height, width, num_prefix, dim, channels, dim_out, num_heads, prefix_channels;
  int options;
  Layout layout;  // of x, residual and out
  int multiprocessors = 4;
};

constexpr bool kWide = false, kNarrow = true;
constexpr PrefixRows kNone = PrefixRows::kNone, kExact = PrefixRows::kExact,
                     kStatic = PrefixRows::kStatic;
const Layout kPacked{}, kGaps{16, 64, 8}, kOdd{3, 5, 1};

const Case kCases[] = {
    // Heads of 32, 64 and 80 channels; one row, one column, primes.
    {kWide, kExact, 2, 5, 7, 1, 64, 64, 64, 2, 64, kBlock, kGaps},
    {kWide, kExact, 1, 1, 13, 5, 72, 128, 40, 2, 128, kBias | kContext, kPacked, 1},
    {kWide, kExact, 3, 7, 1, 1, 33, 80, 35, 1, 80, kBlock, kOdd},
    // More tokens and queries than one block of a kernel takes; more features than a slice.
    {kWide, kExact, 1, 11, 13, 5, 136, 48, 8, 6, 48, kBias, kGaps},
    {kWide, kExact, 1, 3, 2, 2, 36, 24, 24, 3, 48, kOwn | kResidual, kPacked},
    {kWide, kStatic, 2, 3, 5, 5, 40, 72, 48, 0, 72, kBlock, kGaps},
    {kWide, kStatic, 1, 5, 3, 1, 41, 19, 33, 0, 19, kMean | kOwnValue | kScale, kOdd},
    {kWide, kStatic, 1, 2, 3, 2, 24, 16, 24, 0, 32, kBias | kOwn | kResidual, kPacked},
    {kWide, kNone, 2, 4, 3, 1, 32, 24, 40, 0, 0, kBlock, kGaps},
    {kWide, kExact, 1, 5, 4, 0, 24, 16, 16, 2, 16, kBias | kMean, kPacked},
    {kNarrow, kExact, 3, 5, 3, 1, 48, 24, 40, 2, 64, kBlock | kOwn, kGaps},
    {kNarrow, kExact, 1, 1, 11, 5, 37, 16, 33, 2, 16, kBlock, kOdd},
    // 18 prefix rows: enough for a tile of their own.
    {kNarrow, kExact, 9, 2, 2, 2, 16, 16, 24, 1, 24, kBlock | kOwn, kGaps},
    {kNarrow, kStatic, 2, 7, 5, 5, 40, 24, 48, 0, 64, kBlock | kOwn, kGaps},
    {kNarrow, kStatic, 1, 13, 1, 1, 41, 10, 19, 0, 10, kBias | kScale, kOdd},
    {kNarrow, kNone, 2, 3, 5, 2, 32, 24, 40, 0, 0, kBlock, kGaps},
    {kNarrow, kStatic, 1, 3, 4, 0, 24, 16, 16, 0, 16, kContext, kPacked},
};

int64_t rows_above(const Case& c) { return c.prefix == kNone ? 0 : c.num_prefix; }

std::string text(const Case& c, const char* type) {
  char line[240];
  std::snprintf(line, sizeof line,
                "%s %s prefix=%d B=%" PRId64 " H=%" PRId64 " W=%" PRId64 " P=%" PRId64 " D=%" PRId64
                " C=%" PRId64 " D_out=%" PRId64 " options=%d order=%d",
                c.narrow ? "narrow" : "wide", type, static_cast<int>(c.prefix), c.batch, c.height,
                c.width, c.num_prefix, c.dim, c.channels, c.dim_out, c.options,
                static_cast<int>(simt::machine.order));
  return line;
}

// The tensors of a case and the parameters that point to them.
template <class T>
struct Layer {
  explicit Layer(const Case& c)
      : tokens(c.num_prefix + c.height * c.width),
        rows(rows_above(c) + c.height * c.width),
        x(Tensor<T>::random(c.batch, tokens, c.dim, c.layout)),
        residual(Tensor<T>::random(c.batch, rows, c.dim_out, c.layout)),
        out(c.batch, rows, c.dim_out, c.layout),
        wv(weight(c.channels, c.dim)),
        wo(weight(c.dim_out, c.channels)),
        query(weight(c.prefix_channels, c.dim, 2 * head_scale(c))),
        key(weight(c.prefix_channels, c.dim)),
        prefix_value(weight(c.prefix_channels, c.dim)),
        prefix_out(weight(c.dim_out, c.prefix_channels)),
        bv(normal(c.channels)),
        kernel(normal(c.channels * 9, 0.3f)),
        kappa(normal(c.num_prefix * c.channels)),
        mu(normal(c.channels)),
        beta(normal(c.channels)),
        bo(normal(c.dim_out)),
        gamma(normal(c.dim_out)),
        query_bias(normal(c.prefix_channels, head_scale(c))),
        prefix_value_bias(normal(c.prefix_channels)),
        prefix_out_bias(normal(c.dim_out)),
        static_a(normal(c.num_prefix * c.prefix_channels)),
        static_b(normal(c.num_prefix * c.prefix_channels)) {
    const auto given = [&c](int option, const auto& values) {
      return c.options & option ? values.data() : nullptr;
    };
    p.dtype = kType<T>;
    p.tf32 = kTf32<T>;
    p.x = x.data();
    p.x_stride_batch = x.stride_batch;
    p.x_stride_token = x.stride_token;
    p.residual = given(kResidual, residual);
    p.residual_stride_batch = residual.stride_batch;
    p.residual_stride_token = residual.stride_token;
    p.out = out.data();
    p.out_stride_batch = out.stride_batch;
    p.out_stride_token = out.stride_token;
    p.wv = wv.data();
    p.bv = given(kBias, bv);
    p.kernel = kernel.data();
    p.kappa = given(kContext, kappa);
    p.mu = given(kMean, mu);
    p.beta = given(kContext, beta);
    p.wo = wo.data();
    p.bo = given(kBias, bo);
    p.gamma = given(kScale, gamma);
    p.prefix = c.prefix;
    if (c.prefix == kExact) {
      p.query = query.data();
      p.query_bias = given(kBias, query_bias);
      p.key = key.data();
    }
    if (c.prefix == kStatic) {
      p.static_a = static_a.data();
      p.static_b = static_b.data();
    }
    p.prefix_value = given(kOwnValue, prefix_value);
    p.prefix_value_bias = given(kBias, prefix_value_bias);
    p.prefix_out = given(kOwnOut, prefix_out);
    p.prefix_out_bias = given(kBias, prefix_out_bias);
    p.batch = c.batch;
    p.height = c.height;
    p.width = c.width;
    p.num_prefix = c.num_prefix;
    p.dim = c.dim;
    p.channels = c.channels;
    p.dim_out = c.dim_out;
    p.num_heads = c.num_heads;
    p.prefix_channels = c.prefix_channels;
    p.narrow = c.narrow;
  }

  static float head_scale(const Case& c) {
    if (c.num_heads == 0) return 1;
    return 1 / std::sqrt(static_cast<float>(c.prefix_channels / c.num_heads));
  }

  static Tensor<T> weight(int64_t out, int64_t in, float factor = 1) {
    return Tensor<T>::random(1, std::max<int64_t>(out, 1), std::max<int64_t>(in, 1), {},
                             factor / std::sqrt(static_cast<float>(std::max<int64_t>(in, 1))));
  }

  const int64_t tokens, rows;
  const Tensor<T> x, residual, out, wv, wo, query, key, prefix_value, prefix_out;
  const std::vector<float> bv, kernel, kappa, mu, beta, bo, gamma, query_bias, prefix_value_bias,
      prefix_out_bias, static_a, static_b;
  DwLayerParams p{};
};

Status run(const DwLayerParams& p) {
  std::vector<float> workspace = poisoned(dw_layer_workspace(p));
  return dw_layer(p, workspace.empty() ? nullptr : workspace.data(), nullptr);
}

template <class T>
void check(const Case& c) {
  simt::machine.multiprocessors = c.multiprocessors;
  const Layer<T> layer(c);
  const std::string what = text(c, kTypeName<T>);
  const Status status = run(layer.p);
  expect(status == Status::kOk, what + ": " + dwattn::status_text(status));

  const LayerDefinition<T, false> exact(layer.p);
  const LayerDefinition<T, true> plain(layer.p);
  // Prefix rows and patches are judged apart: they are of different sizes and made differently.
  Deviation of_kernel[2], of_plain[2];
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t n = 0; n < layer.rows; ++n) {
      const int part = n < rows_above(c) ? 0 : 1;
      for (int64_t d = 0; d < c.dim_out; ++d) {
        of_kernel[part].add(layer.out(b, n, d), exact.at(b, n, d));
        of_plain[part].add(plain.at(b, n, d), exact.at(b, n, d));
      }
    }
  }
  expect_accurate<T>(of_kernel[0], of_plain[0], what + " prefix rows");
  expect_accurate<T>(of_kernel[1], of_plain[1], what + " patches");
  expect_tf32<T>(of_kernel[1], of_plain[1], what + " patches");
  expect(layer.out.gaps_untouched(), what + ": wrote between the rows of out");
}

// Exact prefix rows are rounded once: with an identity for their projection, what comes out is the
// definition to half a unit in the last place, and to what fp32 leaves. `louder` queries and keys
// make absorbed queries of `louder` squared.
template <class T>
void check_one_rounding(float louder) {
  constexpr double kHalfUnit = std::is_same<T, __half>::value ? 0x1p-11 : 0x1p-8;
  constexpr double kInside = kHalfUnit / 64;
  const Case c{kNarrow, kExact, 1, 7, 5, 2, 64, 16, 48, 3, 48, kBias | kOwn, kPacked};
  Layer<T> layer(c);
  for (int64_t d = 0; d < c.dim_out; ++d) {
    for (int64_t k = 0; k < c.prefix_channels; ++k) {
      *layer.prefix_out.at(0, d, k) = from_float<T>(d == k ? 1.0f : 0.0f);
    }
  }
  for (const Tensor<T>* weight : {&layer.query, &layer.key}) {
    for (int64_t k = 0; k < c.prefix_channels * c.dim; ++k) {
      weight->data()[k] = from_float<T>(to_float(weight->data()[k]) * louder);
    }
  }
  layer.p.prefix_out_bias = nullptr;
  expect(run(layer.p) == Status::kOk, "one rounding: status");
  const LayerDefinition<T, false> exact(layer.p);
  double worst = 0;
  for (int64_t t = 0; t < c.num_prefix; ++t) {
    for (int64_t d = 0; d < c.dim_out; ++d) {
      const double row = exact.at(0, t, d);
      const double error = std::fabs(layer.out(0, t, d) - row) - kHalfUnit * std::fabs(row);
      if (!(error <= worst)) worst = error;
    }
  }
  expect(worst <= kInside, std::string(kTypeName<T>) + ": exact prefix rows lose " +
                               std::to_string(worst / kInside) + " allowances inside");
}

// The residual may be the output.
void check_in_place() {
  for (const Case& c : {kCases[0], kCases[10]}) {
    Case packed = c;
    packed.layout = kPacked;
    Layer<float> layer(packed);
    expect(run(layer.p) == Status::kOk, "in place: status");
    const int64_t size = c.batch * layer.rows * c.dim_out;
    std::vector<float> both(layer.residual.data(), layer.residual.data() + size);
    layer.p.residual = layer.p.out = both.data();
    expect(run(layer.p) == Status::kOk, "in place: status");
    expect(std::equal(both.begin(), both.end(), layer.out.data()),
           "in place: not what a separate residual gives");
  }
}

// A planner asks before there is memory: with pointers that point nowhere, once per profile.
void check_workspace() {
  for (const Case& c : kCases) {
    Layer<float> layer(c);
    DwLayerParams p = layer.p;
    const int64_t bytes = dw_layer_workspace(p);
    const auto nowhere = [](auto*& pointer) {
      using Pointer = std::remove_reference_t<decltype(pointer)>;
      if (pointer != nullptr) pointer = reinterpret_cast<Pointer>(16);
    };
    nowhere(p.x), nowhere(p.wv), nowhere(p.wo), nowhere(p.bv), nowhere(p.mu), nowhere(p.kappa);
    nowhere(p.query), nowhere(p.key), nowhere(p.prefix_value), nowhere(p.prefix_out);
    p.x_stride_batch = p.out_stride_batch = p.x_stride_token = p.out_stride_token = -1;
    expect(dw_layer_workspace(p) == bytes, "the workspace depends on what it must not read");
    for (int64_t last = 0; p.batch < 100; last = dw_layer_workspace(p), p.batch += 7) {
      expect(dw_layer_workspace(p) >= last && dw_layer_workspace(p) % 16 == 0,
             "the workspace does not grow with the batch");
    }
  }
}

void expect_refused(DwLayerParams p, const char* what, Status expected = Status::kInvalidArgument) {
  std::vector<float> workspace = poisoned(1 << 20);
  expect(dw_layer(p, workspace.data(), nullptr) == expected, std::string(what) + " is not refused");
}

void check_refusals() {
  const Layer<float> layer(kCases[0]);
  const auto changed = [&layer](const auto& change) {
    DwLayerParams p = layer.p;
    change(p);
    return p;
  };
  using P = DwLayerParams;
  expect_refused(changed([](P& p) { p.dtype = DType::kFloat64; }), "fp64",
                 Status::kUnsupportedDType);
  expect_refused(changed([](P& p) { p.wo = nullptr; }), "a missing weight");
  expect_refused(changed([](P& p) { p.query = nullptr; }), "a missing query");
  expect_refused(changed([](P& p) { p.num_heads = 3; }), "a head of 21.3 channels");
  expect_refused(changed([](P& p) { p.prefix_channels = 32; }), "another width without weights");
  expect_refused(changed([](P& p) { p.prefix = kStatic; }), "a missing static_a");
  expect_refused(changed([](P& p) { p.height = 0; }), "an empty grid");
  expect_refused(changed([](P& p) { p.dim_out = 1 << 20; }), "a million features");
  expect_refused(changed([](P& p) {
                   p.narrow = true;
                   p.channels = p.prefix_channels = 817;
                   p.prefix = kNone;
                 }),
                 "a narrow layer that does not fit");
  expect(dw_layer(layer.p, nullptr, nullptr) == Status::kInvalidArgument,
         "a missing workspace is not refused");
  DwLayerParams none = layer.p;
  none.batch = 0;
  expect(dw_layer(none, nullptr, nullptr) == Status::kOk, "no images are fine");
}

Case drawn_case() {
  const Grid grid = drawn_grid(80);
  Case c{coin(),
         kNone,
         between(1, 3),
         grid.height,
         grid.width,
         pick({0, 1, 2, 5}),
         drawn_size(140),
         drawn_size(140),
         drawn_size(140),
         0,
         0,
         static_cast<int>(between(0, kBlock | kOwn)),
         drawn_layout(),
         drawn_multiprocessors()};
  if (coin()) {
    c.prefix = kExact;
    c.num_heads = between(1, 3);
    const int64_t heads_dim = pick({1, 7, 8, 32, 64, 80, 128});
    c.prefix_channels =
        c.num_heads * (c.num_heads > 1 ? std::min<int64_t>(heads_dim, 80) : heads_dim);
  } else if (coin()) {
    c.prefix = kStatic;
    c.prefix_channels = drawn_size(100);
  }
  // Rows of another width need weights of their own.
  if (c.prefix != kNone && (c.options & kOwn) != kOwn) c.channels = c.prefix_channels;
  return c;
}

// A grid with a side of 2^15 is left to two products.
void check_long_side() {
  using dwattn::cuda::is_narrow;
  constexpr int64_t kSide = 1 << 15;
  expect(is_narrow(512, kSide - 1, kSide - 1) && !is_narrow(513, 2, 2), "512 channels are narrow");
  expect(!is_narrow(8, 1, kSide) && !is_narrow(8, kSide, 1), "a side of 2^15 is not narrow");
  check<__half>({kWide, kNone, 1, 1, kSide, 1, 8, 8, 8, 0, 0, kBias | kContext, kPacked, 1});
  check<__half>({kWide, kStatic, 1, kSide, 1, 1, 8, 8, 8, 0, 8, kBias, kPacked, 1});
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return run_drawn(arguments, [](uint32_t which) {
      check_typed(which, [](auto element) { check<decltype(element)>(drawn_case()); });
    });
  }
  check_workspace();
  check_refusals();
  check_long_side();
  for (const float louder : {1.0f, 512.0f}) {
    check_one_rounding<__half>(louder);
    check_one_rounding<__nv_bfloat16>(louder);
  }
  return run_schedules([] {
    for (const Case& c : kCases) {
      check<__half>(c);
      check<float>(c);
      // The same code as for fp16 but for the conversions: one schedule is enough.
      if (simt::machine.order != simt::Order::kForward) continue;
      check<__nv_bfloat16>(c);
      check<dwattn::cuda::Tf32>(c);
    }
    check_in_place();
  });
}
