#include "python/numpy_ops.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/dw_aggregate.h"
#include "kernels/cpu/dw_layer.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/scratch.h"
#include "python/numpy_arrays.h"

namespace py = pybind11;

namespace dwattn::python {
namespace {

constexpr int kDense = py::array::c_style | py::array::forcecast;

// Real numbers of any dtype as they are; bits of bfloat16, a type numpy does not have, as float32.
py::array numbers(const char* name, const py::array& given) {
  const char kind = given.dtype().kind();
  if (kind == 'u' && given.itemsize() == 2) {
    const py::array_t<uint16_t, kDense> bits(given);
    py::array_t<float> values(shape_of(given));
    std::transform(bits.data(), bits.data() + bits.size(), values.mutable_data(),
                   [](uint16_t one) { return cpu::to_float(cpu::BFloat16{one}); });
    return values;
  }
  if (std::strchr("fiub", kind) == nullptr) {
    fail(name, " must be real numbers, or uint16 holding the bits of bfloat16, got ",
         py::str(given.dtype()).cast<std::string>(), ".");
  }
  return given;
}

// A dense array in the accumulation dtype, or null.
struct Coefficient {
  Coefficient(const char* name, const OptionalArray& given, bool wide, const Shape& shape) {
    if (!given.has_value()) return;
    check_shape(name, shape_of(*given), shape);
    const py::array read = numbers(name, *given);
    values = wide ? py::array(py::array_t<double, kDense>(read))
                  : py::array(py::array_t<float, kDense>(read));
  }
  const void* data() const { return values.has_value() ? values->data() : nullptr; }

  OptionalArray values;
};

struct Coefficients {
  Coefficients(const py::array& kernel_, const OptionalArray& kappa_, const OptionalArray& mu_,
               const OptionalArray& beta_, bool wide, int64_t channels, int64_t num_prefix)
      : kernel("kernel", kernel_, wide, {channels, 3, 3}),
        kappa("kappa", kappa_, wide, {num_prefix, channels}),
        mu("mu", mu_, wide, {channels}),
        beta("beta", beta_, wide, {channels}) {}

  Coefficient kernel, kappa, mu, beta;
};

DwAggregateParams params_of(const Coefficients& k, const Sizes& s, int64_t batch,
                            int64_t channels) {
  DwAggregateParams p{};
  p.kernel = k.kernel.data();
  p.kappa = k.kappa.data();
  p.mu = k.mu.data();
  p.beta = k.beta.data();
  p.batch = batch;
  p.height = s.height;
  p.width = s.width;
  p.num_prefix = s.num_prefix;
  p.channels = channels;
  return p;
}

py::array dw_aggregate(const py::array& v_given, const py::array& kernel, int64_t height,
                       int64_t width, int64_t num_prefix, const OptionalArray& kappa,
                       const OptionalArray& mu, const OptionalArray& beta, int num_threads,
                       const std::string& isa) {
  const Sizes sizes{height, width, num_prefix};
  check_tokens("v", shape_of(v_given), sizes);
  const DType dtype = dtype_of("v", v_given);
  const py::array v = dense(v_given);
  const int64_t batch = v.shape(0), channels = v.shape(2);
  const Coefficients k(kernel, kappa, mu, beta, dtype == DType::kFloat64, channels, num_prefix);
  py::array y(v.dtype(), std::vector<py::ssize_t>{batch, height * width, channels});
  DwAggregateParams p = params_of(k, sizes, batch, channels);
  p.v = v.data();
  p.v_dtype = p.y_dtype = dtype;
  p.v_stride_token = p.y_stride_token = channels;
  p.v_stride_batch = v.shape(1) * channels;
  p.y = y.mutable_data();
  p.y_stride_batch = height * width * channels;
  const cpu::Isa chosen = isa_of(isa);
  Status status;
  {
    py::gil_scoped_release unlocked;
    std::vector<char> workspace(static_cast<size_t>(cpu::dw_aggregate_workspace(p)));
    status = cpu::dw_aggregate(p, workspace.data(), thread_for(num_threads), chosen);
  }
  check(status);
  return y;
}

void check_dtype(const char* name, const py::array& array, DType dtype) {
  if (dtype_of(name, array) != dtype) fail(name, " and x must have the same dtype.");
}

// The checked arguments of value projection and aggregation.
struct Values {
  Values(const py::array& x_given, const py::array& wv_given, const OptionalArray& bv,
         const py::array& kernel, const Sizes& sizes_, const OptionalArray& kappa,
         const OptionalArray& mu, const OptionalArray& beta)
      : sizes((check_tokens("x", shape_of(x_given), sizes_), sizes_)),
        dtype(dtype_of("x", x_given)),
        x(dense(x_given)),
        wv(weight("wv", wv_given, "C", x.shape(2), dtype)),
        batch(x.shape(0)),
        tokens(x.shape(1)),
        dim(x.shape(2)),
        channels(wv.shape(0)),
        coefficients(kernel, kappa, mu, beta, wide(), channels, sizes.num_prefix),
        bias("bv", bv, wide(), {channels}) {}

  static py::array weight(const char* name, const py::array& given, const char* rows,
                          int64_t columns, DType dtype) {
    check_weight(name, shape_of(given), rows, columns);
    check_dtype(name, given, dtype);
    return dense(given);
  }

  bool wide() const { return dtype == DType::kFloat64; }

  // A layer without an output projection; the output is still to be set.
  cpu::DwLayerParams params() const {
    cpu::DwLayerParams p{};
    p.dtype = dtype;
    p.x = x.data();
    p.x_stride_token = p.wv_stride = p.dim = dim;
    p.x_stride_batch = tokens * dim;
    p.wv = wv.data();
    p.bv = bias.data();
    p.kernel = coefficients.kernel.data();
    p.kappa = coefficients.kappa.data();
    p.mu = coefficients.mu.data();
    p.beta = coefficients.beta.data();
    p.batch = batch;
    p.height = sizes.height;
    p.width = sizes.width;
    p.num_prefix = sizes.num_prefix;
    p.channels = channels;
    return p;
  }

  const Sizes sizes;
  const DType dtype;
  const py::array x, wv;
  const int64_t batch, tokens, dim, channels;
  const Coefficients coefficients;
  const Coefficient bias;
};

// Without Python's lock.
void run(const cpu::DwLayerParams& p, int num_threads, cpu::Isa isa) {
  Status status;
  {
    py::gil_scoped_release unlocked;
    const cpu::ParallelFor parallel = thread_for(num_threads);
    const int64_t bytes = cpu::dw_layer_workspace(p, parallel.threads, isa);
    cpu::Scratch scratch(cpu::Scratch::padded(bytes));
    status = cpu::dw_layer(p, scratch.take(bytes), parallel, isa);
  }
  check(status);
}

py::array dw_attention(const py::array& x, const py::array& wv, const OptionalArray& bv,
                       const py::array& kernel, int64_t height, int64_t width, int64_t num_prefix,
                       const OptionalArray& kappa, const OptionalArray& mu,
                       const OptionalArray& beta, int num_threads, const std::string& isa) {
  const Values values(x, wv, bv, kernel, {height, width, num_prefix}, kappa, mu, beta);
  py::array y(values.x.dtype(), Shape{values.batch, values.sizes.patches(), values.channels});
  cpu::DwLayerParams p = values.params();
  p.out = y.mutable_data();
  p.out_stride_token = values.channels;
  p.out_stride_batch = values.sizes.patches() * values.channels;
  run(p, num_threads, isa_of(isa));
  return y;
}

py::array dw_layer(const py::array& x, const py::array& wv, const OptionalArray& bv,
                   const py::array& kernel, const py::array& wo_given, const OptionalArray& bo,
                   int64_t height, int64_t width, int64_t num_prefix, const OptionalArray& kappa,
                   const OptionalArray& mu, const OptionalArray& beta,
                   const OptionalArray& prefix_out, int num_threads, const std::string& isa) {
  const Values values(x, wv, bv, kernel, {height, width, num_prefix}, kappa, mu, beta);
  const int64_t batch = values.batch, channels = values.channels;
  const py::array wo = Values::weight("wo", wo_given, "D_out", channels, values.dtype);
  const int64_t dim = wo.shape(0), patches = values.sizes.patches();
  const Coefficient bias("bo", bo, values.wide(), {dim});
  const int64_t prefix = prefix_out.has_value() ? num_prefix : 0;
  OptionalArray finished;
  if (prefix > 0) {
    check_shape("prefix_out", shape_of(*prefix_out), {batch, prefix, dim});
    check_dtype("prefix_out", *prefix_out, values.dtype);
    finished = dense(*prefix_out);
  }
  py::array out(values.x.dtype(), Shape{batch, prefix + patches, dim});
  const int64_t row = dim * dtype_size(values.dtype), image = (prefix + patches) * row;
  char* const memory = static_cast<char*>(out.mutable_data());
  for (int64_t b = 0; prefix > 0 && b < batch; ++b) {
    std::memcpy(memory + b * image, static_cast<const char*>(finished->data()) + b * prefix * row,
                static_cast<size_t>(prefix * row));
  }
  cpu::DwLayerParams p = values.params();
  p.wo = wo.data();
  p.wo_stride = channels;
  p.bo = bias.data();
  p.dim_out = dim;
  p.out = memory + prefix * row;
  p.out_stride_token = dim;
  p.out_stride_batch = (prefix + patches) * dim;
  run(p, num_threads, isa_of(isa));
  return out;
}

}  // namespace

void bind_numpy_ops(py::module_& module) {
  using py::arg;
  module.def("dw_aggregate", &dw_aggregate, arg("v"), arg("kernel"), arg("height"), arg("width"),
             arg("num_prefix") = 0, arg("kappa") = py::none(), arg("mu") = py::none(),
             arg("beta") = py::none(), py::kw_only(), arg("num_threads") = 1, arg("isa") = "auto",
             "3x3 depthwise aggregation plus context: v (B, N, C) -> (B, H*W, C).\n\n"
             "kernel (C, 3, 3), kappa (P, C), mu (C,), beta (C,) of any real dtype. v is\n"
             "float32, float64 or float16. In all of them uint16 holds the bits of bfloat16.\n"
             "isa is auto, amx, avx512_bf16, avx512, avx2 or generic.");
  module.def("dw_attention", &dw_attention, arg("x"), arg("wv"), arg("bv"), arg("kernel"),
             arg("height"), arg("width"), arg("num_prefix") = 0, arg("kappa") = py::none(),
             arg("mu") = py::none(), arg("beta") = py::none(), py::kw_only(),
             arg("num_threads") = 1, arg("isa") = "auto",
             "Value projection x wv^T + bv, then dw_aggregate: x (B, N, D) -> (B, H*W, C).\n\n"
             "wv (C, D) in the dtype of x; bv (C,) and the rest as in dw_aggregate.");
  module.def(
      "dw_layer", &dw_layer, arg("x"), arg("wv"), arg("bv"), arg("kernel"), arg("wo"), arg("bo"),
      arg("height"), arg("width"), arg("num_prefix") = 0, arg("kappa") = py::none(),
      arg("mu") = py::none(), arg("beta") = py::none(), arg("prefix_out") = py::none(),
      py::kw_only(), arg("num_threads") = 1, arg("isa") = "auto",
      "A whole dw, lowrank_dw or ens_dw layer: dw_attention, then wo (D_out, C) and bo (D_out,):\n"
      "x (B, N, D) -> (B, H*W, D_out), behind prefix_out (B, P, D_out) where it is given.\n\n"
      "wo and prefix_out have the dtype of x; only the result is rounded to it.");
}

}  // namespace dwattn::python
