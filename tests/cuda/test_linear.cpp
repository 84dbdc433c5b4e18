// The output projection on strided rows, by tiles and by few rows, against an fp64 loop.
#include "drawn.h"
#include "kernels/cuda/linear.h"

namespace {

using namespace harness;
using dwattn::Status;
using dwattn::cuda::LinearParams;

struct Case {
  int64_t batch, rows, dim, dim_out;
  bool bias, residual, gamma;
  Layout layout;  // of every tensor
  int multiprocessors = 4;
};

const Layout kPacked{}, kGaps{16, 64, 8}, kOdd{3, 5, 1};

const Case kCases[] = {
    {1, 1, 64, 64, true, false, false, kPacked},       // few rows
    {1, 5, 40, 72, true, true, true, kGaps},           // a group of four and one more
    {3, 5, 24, 19, false, true, false, kGaps},         // groups across images
    {2, 3, 33, 35, true, true, true, kOdd},            // element by element
    {1, 16, 520, 8, true, false, true, kPacked},       // the most rows that are few
    {1, 17, 64, 40, true, false, false, kPacked},      // the fewest that fill a tile
    {2, 9, 48, 136, false, true, true, kGaps},         // a tile across images
    {3, 70, 72, 65, true, true, true, kGaps},          // two tiles, three of features
    {1, 130, 40, 136, true, true, false, kPacked, 1},  // 128 features at a time
    {2, 65, 33, 131, true, true, true, kOdd, 1},      {1, 20, 1, 1, true, false, false, kPacked},
};

template <class T>
void check(const Case& c) {
  simt::machine.multiprocessors = c.multiprocessors;
  const float scale = 1 / std::sqrt(static_cast<float>(c.dim));
  const auto y = Tensor<T>::random(c.batch, c.rows, c.dim, c.layout);
  const auto weight = Tensor<T>::random(1, c.dim_out, c.dim, c.layout, scale);
  const auto residual = Tensor<T>::random(c.batch, c.rows, c.dim_out, c.layout);
  const Tensor<T> out(c.batch, c.rows, c.dim_out, c.layout);
  const auto bias = normal(c.dim_out), gamma = normal(c.dim_out);

  LinearParams p{};
  p.dtype = kType<T>;
  p.tf32 = kTf32<T>;
  p.y = y.data();
  p.y_stride_batch = y.stride_batch;
  p.y_stride_token = y.stride_token;
  p.weight = weight.data();
  p.weight_stride = weight.stride_token;
  p.bias = c.bias ? bias.data() : nullptr;
  p.residual = c.residual ? residual.data() : nullptr;
  p.residual_stride_batch = residual.stride_batch;
  p.residual_stride_token = residual.stride_token;
  p.gamma = c.gamma ? gamma.data() : nullptr;
  p.out = out.data();
  p.out_stride_batch = out.stride_batch;
  p.out_stride_token = out.stride_token;
  p.batch = c.batch;
  p.rows = c.rows;
  p.dim = c.dim;
  p.dim_out = c.dim_out;

  char what[160];
  std::snprintf(what, sizeof what,
                "%s B=%" PRId64 " rows=%" PRId64 " K=%" PRId64 " D_out=%" PRId64 " order=%d",
                kTypeName<T>, c.batch, c.rows, c.dim, c.dim_out,
                static_cast<int>(simt::machine.order));
  const Status status = dwattn::cuda::linear(p, nullptr);
  expect(status == Status::kOk, std::string(what) + ": " + dwattn::status_text(status));
  Deviation of_kernel, of_plain;
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t d = 0; d < c.dim_out; ++d) {
        double sum = c.bias ? bias[d] : 0.0;
        float single = static_cast<float>(sum);
        for (int64_t k = 0; k < c.dim; ++k) {
          sum += y(b, t, k) * weight(0, d, k);
          single += multiplied<T>(y(b, t, k)) * multiplied<T>(weight(0, d, k));
        }
        const double factor = c.gamma ? gamma[d] : 1.0;
        const double base = c.residual ? residual(b, t, d) : 0.0;
        of_kernel.add(out(b, t, d), base + factor * sum);
        of_plain.add(rounded<T>(static_cast<float>(base + factor * single)), base + factor * sum);
      }
    }
  }
  expect_accurate<T>(of_kernel, of_plain, what);
  expect_tf32<T>(of_kernel, of_plain, what);
  expect(out.gaps_untouched(), std::string(what) + ": wrote between the rows of out");
}

void check_refusals() {
  LinearParams p{};
  p.batch = p.rows = p.dim = p.dim_out = 1;
  expect(dwattn::cuda::linear(p, nullptr) == Status::kInvalidArgument, "null is refused");
  float one = 1;
  p.y = p.weight = p.out = &one;
  p.dtype = dwattn::DType::kFloat64;
  expect(dwattn::cuda::linear(p, nullptr) == Status::kUnsupportedDType, "fp64 is refused");
  p.dtype = dwattn::DType::kFloat32;
  p.dim = 0;
  expect(dwattn::cuda::linear(p, nullptr) == Status::kInvalidArgument, "K = 0 is refused");
  p.rows = 0;
  expect(dwattn::cuda::linear(p, nullptr) == Status::kOk, "no rows are fine");
}

Case drawn_case() {
  return {between(1, 3),
          pick({1, 5, 6, 16, 17, 43, 129}),
          drawn_size(260),
          drawn_size(260),
          coin(),
          coin(),
          coin(),
          drawn_layout(),
          drawn_multiprocessors()};
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return run_drawn(arguments, [](uint32_t which) {
      Case c = drawn_case();
      if (which % 4 == 3) c.rows += 16;  // a few rows are no products in TF32
      check_typed(which, [&c](auto element) { check<decltype(element)>(c); });
    });
  }
  check_refusals();
  return run_schedules([] {
    for (const Case& c : kCases) {
      check<float>(c);
      check<__half>(c);
      // The same code as for fp16 but for the conversions: one schedule is enough.
      if (simt::machine.order != simt::Order::kForward) continue;
      check<__nv_bfloat16>(c);
      // A few rows are no products in TF32.
      if (c.batch * c.rows > 16) check<dwattn::cuda::Tf32>(c);
    }
  });
}
