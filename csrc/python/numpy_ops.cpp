#include "python/numpy_ops.h"

#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dw_aggregate.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/half.h"

namespace py = pybind11;

namespace dwattn::python {
namespace {

using OptionalArray = std::optional<py::array>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw py::value_error(text.str());
}

// Contiguous chunks of the range on `threads` threads, the caller's among them.
cpu::ParallelFor thread_for(int& threads) {
  return {[](void* context, int64_t tasks, int64_t cost, cpu::LoopBody body, void* body_context) {
            const int64_t most = tasks / cpu::min_tasks_per_thread(cost);
            int64_t count = *static_cast<int*>(context);
            count = count > most ? (most < 1 ? 1 : most) : count;
            std::vector<std::thread> pool;
            for (int64_t i = 1; i < count; ++i) {
              pool.emplace_back(body, body_context, i * tasks / count, (i + 1) * tasks / count);
            }
            if (tasks > 0) body(body_context, 0, tasks / count);
            for (std::thread& thread : pool) thread.join();
          },
          &threads};
}

cpu::Isa isa_of(const std::string& name) {
  for (cpu::Isa isa : {cpu::Isa::kAuto, cpu::Isa::kAvx512, cpu::Isa::kAvx2, cpu::Isa::kGeneric}) {
    if (name == cpu::isa_name(isa)) return isa;
  }
  fail("isa=", name, " is not one of auto, avx512, avx2, generic.");
}

DType dtype_of(const char* name, const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return DType::kFloat32;
  if (dtype.kind() == 'f' && dtype.itemsize() == 8) return DType::kFloat64;
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return DType::kFloat16;
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) return DType::kBFloat16;
  fail(name, " must be float32, float64, float16, or uint16 holding the bits of bfloat16, got ",
       py::str(dtype).cast<std::string>(), ".");
}

std::string shape_text(const py::array& array) {
  return py::str(array.attr("shape")).cast<std::string>();
}

void check_shape(const char* name, const py::array& array, const std::vector<int64_t>& shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  std::ostringstream expected;
  for (size_t d = 0; d < shape.size(); ++d) {
    expected << (d ? ", " : "") << shape[d];
    same = same && array.shape(static_cast<py::ssize_t>(d)) == shape[d];
  }
  if (!same) fail(name, " must have shape (", expected.str(), "), got ", shape_text(array), ".");
}

// A dense array in the accumulation dtype, or null.
struct Coefficient {
  Coefficient(const char* name, const OptionalArray& given, bool wide,
              const std::vector<int64_t>& shape) {
    if (!given.has_value()) return;
    check_shape(name, *given, shape);
    constexpr int flags = py::array::c_style | py::array::forcecast;
    values = wide ? py::array(py::array_t<double, flags>::ensure(*given))
                  : py::array(py::array_t<float, flags>::ensure(*given));
  }
  const void* data() const { return values.has_value() ? values->data() : nullptr; }

  OptionalArray values;
};

struct Sizes {
  int64_t height, width, num_prefix;
};

void check_tokens(const char* name, const py::array& t, const Sizes& s) {
  if (t.ndim() != 3) {
    fail(name, " must have the three dimensions (batch, tokens, channels), got ", shape_text(t),
         ".");
  }
  if (s.height < 1 || s.width < 1 || s.num_prefix < 0) {
    fail("A patch grid needs height >= 1, width >= 1 and num_prefix >= 0, got height=", s.height,
         ", width=", s.width, ", num_prefix=", s.num_prefix, ".");
  }
  if (t.shape(1) != s.num_prefix + s.height * s.width) {
    fail("The sequence has N=", t.shape(1), " tokens, but num_prefix=", s.num_prefix,
         " and a grid of height=", s.height, " x width=", s.width, " make ",
         s.num_prefix + s.height * s.width, ".");
  }
}

py::array dense(const py::array& array) {
  return (array.flags() & py::array::c_style) ? array
                                              : py::array::ensure(array, py::array::c_style);
}

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

void check(Status status) {
  if (status != Status::kOk) throw std::runtime_error(status_text(status));
}

py::array dw_aggregate(const py::array& v_given, const py::array& kernel, int64_t height,
                       int64_t width, int64_t num_prefix, const OptionalArray& kappa,
                       const OptionalArray& mu, const OptionalArray& beta, int num_threads,
                       const std::string& isa) {
  const Sizes sizes{height, width, num_prefix};
  check_tokens("v", v_given, sizes);
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

template <class Half>
std::vector<float> widen(const void* values, int64_t count) {
  const Half* half = static_cast<const Half*>(values);
  std::vector<float> wide(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) wide[static_cast<size_t>(i)] = cpu::to_float(half[i]);
  return wide;
}

// The values of a matrix in fp32 or fp64: itself, or widened from 16 bits into `buffer`.
const void* wide_data(const py::array& array, DType dtype, std::vector<float>& buffer) {
  if (dtype == DType::kFloat16) buffer = widen<cpu::Float16>(array.data(), array.size());
  if (dtype == DType::kBFloat16) buffer = widen<cpu::BFloat16>(array.data(), array.size());
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? buffer.data() : array.data();
}

// Biases come in the dtype of x, which for bfloat16 is not a number type of numpy.
OptionalArray wide_bias(const OptionalArray& bv, DType dtype) {
  if (!bv.has_value() || dtype != DType::kBFloat16) return bv;
  if (dtype_of("bv", *bv) != DType::kBFloat16) return bv;
  const py::array bits = dense(*bv);
  const std::vector<float> values = widen<cpu::BFloat16>(bits.data(), bits.size());
  return py::array_t<float>(bits.size(), values.data());
}

py::array dw_attention(const py::array& x_given, const py::array& wv_given, const OptionalArray& bv,
                       const py::array& kernel, int64_t height, int64_t width, int64_t num_prefix,
                       const OptionalArray& kappa, const OptionalArray& mu,
                       const OptionalArray& beta, int num_threads, const std::string& isa) {
  const Sizes sizes{height, width, num_prefix};
  check_tokens("x", x_given, sizes);
  const DType dtype = dtype_of("x", x_given);
  const py::array x = dense(x_given), wv = dense(wv_given);
  const int64_t batch = x.shape(0), tokens = x.shape(1), dim = x.shape(2);
  if (wv.ndim() != 2 || wv.shape(1) != dim) {
    fail("wv must have shape (C, ", dim, "), got ", shape_text(wv), ".");
  }
  if (dtype_of("wv", wv) != dtype) fail("wv and x must have the same dtype.");
  const int64_t channels = wv.shape(0);
  const bool wide = dtype == DType::kFloat64;
  const Coefficients k(kernel, kappa, mu, beta, wide, channels, num_prefix);
  const Coefficient bias("bv", wide_bias(bv, dtype), wide, {channels});
  py::array y(x.dtype(), std::vector<py::ssize_t>{batch, height * width, channels});

  DwAggregateParams p = params_of(k, sizes, batch, channels);
  p.v_bias = bias.data();
  p.v_dtype = wide ? DType::kFloat64 : DType::kFloat32;
  p.v_stride_token = p.y_stride_token = channels;
  p.v_stride_batch = tokens * channels;
  p.y = y.mutable_data();
  p.y_dtype = dtype;
  p.y_stride_batch = height * width * channels;
  const cpu::Isa chosen = isa_of(isa);
  Status status;
  {
    py::gil_scoped_release unlocked;
    std::vector<float> x_buffer, wv_buffer;
    std::vector<char> values(
        static_cast<size_t>(batch * tokens * channels * dtype_size(p.v_dtype)));
    std::vector<char> workspace(static_cast<size_t>(cpu::dw_aggregate_workspace(p)));
    const cpu::GemmParams gemm{p.v_dtype, wide_data(x, dtype, x_buffer),
                               dim,       wide_data(wv, dtype, wv_buffer),
                               dim,       values.data(),
                               channels,  batch * tokens,
                               channels,  dim};
    const cpu::ParallelFor parallel = thread_for(num_threads);
    status = cpu::gemm_nt(gemm, parallel, chosen);
    p.v = values.data();
    if (status == Status::kOk) status = cpu::dw_aggregate(p, workspace.data(), parallel, chosen);
  }
  check(status);
  return y;
}

}  // namespace

void bind_numpy_ops(py::module_& module) {
  using py::arg;
  module.def(
      "dw_aggregate", &dw_aggregate, arg("v"), arg("kernel"), arg("height"), arg("width"),
      arg("num_prefix") = 0, arg("kappa") = py::none(), arg("mu") = py::none(),
      arg("beta") = py::none(), py::kw_only(), arg("num_threads") = 1, arg("isa") = "auto",
      "3x3 depthwise aggregation plus context: v (B, N, C) -> (B, H*W, C).\n\n"
      "kernel (C, 3, 3), kappa (P, C), mu (C,), beta (C,). v is float32, float64, float16, or\n"
      "uint16 holding the bits of bfloat16. isa is auto, avx512, avx2 or generic.");
  module.def("dw_attention", &dw_attention, arg("x"), arg("wv"), arg("bv"), arg("kernel"),
             arg("height"), arg("width"), arg("num_prefix") = 0, arg("kappa") = py::none(),
             arg("mu") = py::none(), arg("beta") = py::none(), py::kw_only(),
             arg("num_threads") = 1, arg("isa") = "auto",
             "Value projection x wv^T + bv, then dw_aggregate: x (B, N, D) -> (B, H*W, C).\n\n"
             "wv (C, D) and bv (C,) in the dtype of x; the rest as in dw_aggregate.");
}

}  // namespace dwattn::python
