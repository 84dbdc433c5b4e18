#include "python/cuda_ops.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/dw_layer.h"
#include "python/cuda_launch.h"

namespace py = pybind11;

namespace dwattn::python {
namespace {

// The arrays of one call, checked against each other while they are read.
class Arguments {
 public:
  Arguments(const char* name, const py::object& tokens, const Sizes& sizes)
      : tokens_(cuda_array(name, tokens, false)) {
    check_tokens(name, tokens_.shape, sizes);
    arrays_.push_back(tokens_);
  }

  const CudaArray& tokens() const { return tokens_; }
  int64_t batch() const { return tokens_.shape[0]; }
  int64_t dim() const { return tokens_.shape[2]; }

  // (rows, columns) in the dtype of the tokens.
  CudaArray weight(const char* name, const py::object& object, const char* rows, int64_t columns) {
    CudaArray array = like_tokens(name, object);
    check_weight(name, array.shape, rows, columns);
    return array;
  }

  CudaArray rows(const char* name, const py::object& object, const Shape& shape) {
    CudaArray array = like_tokens(name, object);
    check_shape(name, array.shape, shape);
    return array;
  }

  const float* floats(const char* name, const OptionalObject& object, const Shape& shape) {
    if (!object.has_value()) return nullptr;
    const CudaArray array = cuda_array(name, *object, true);
    check_shape(name, array.shape, shape);
    if (array.dtype != DType::kFloat32) {
      fail(name, " is ", dtype_name(array.dtype),
           "; biases and coefficients of the CUDA kernels are float32.");
    }
    arrays_.push_back(array);
    return static_cast<const float*>(array.data);
  }

  // The array that is written; the last one to be asked for.
  CudaArray output(const py::object& object, const Shape& shape) {
    CudaArray out = rows("out", object, shape);
    if (out.read_only) fail("out is read-only; it is where the result is written.");
    for (size_t i = 0; i + 1 < arrays_.size(); ++i) {
      if (overlap(out, arrays_[i])) fail("out and ", arrays_[i].name, " share memory.");
    }
    return out;
  }

  const std::vector<CudaArray>& all() const { return arrays_; }

 private:
  CudaArray like_tokens(const char* name, const py::object& object) {
    const CudaArray array = cuda_array(name, object, true);
    if (array.dtype != tokens_.dtype) {
      fail(name, " is ", dtype_name(array.dtype), " but ", tokens_.name, " is ",
           dtype_name(tokens_.dtype), "; they must have the same dtype.");
    }
    arrays_.push_back(array);
    return array;
  }

  const CudaArray tokens_;
  std::vector<CudaArray> arrays_;
};

// Kernels are named as template arguments, so that a build without them has nothing to link.
template <auto workspace, auto kernel, class Params>
void run(const Arguments& arguments, const Params& p, const OptionalStream& stream,
         const RowCopy& copy = {}) {
#ifdef DWATTN_WITH_CUDA
  if (arguments.all().back().numel() == 0) return;
  const py::gil_scoped_release unlocked;
  launch({arguments.all(), 1, stream, copy, workspace(p),
          [&p](void* memory, cuda::Stream s) { return kernel(p, memory, s); }});
#else
  static_cast<void>(arguments), static_cast<void>(p), static_cast<void>(stream);
  static_cast<void>(copy);
  throw std::runtime_error("This build of dwattn has no CUDA kernels: " DWATTN_CUDA_STATE ".");
#endif
}

void dw_aggregate(const py::object& v, const py::object& kernel, int64_t height, int64_t width,
                  int64_t num_prefix, const OptionalObject& kappa, const OptionalObject& mu,
                  const OptionalObject& beta, const py::object& out, const OptionalStream& stream) {
  const Sizes sizes{height, width, num_prefix};
  Arguments arguments("v", v, sizes);
  const CudaArray& values = arguments.tokens();
  const int64_t channels = arguments.dim();
  DwAggregateParams p{};
  p.v = values.data;
  p.v_dtype = p.y_dtype = values.dtype;
  p.v_stride_batch = values.strides[0];
  p.v_stride_token = values.strides[1];
  p.kernel = arguments.floats("kernel", kernel, {channels, 3, 3});
  p.kappa = arguments.floats("kappa", kappa, {num_prefix, channels});
  p.mu = arguments.floats("mu", mu, {channels});
  p.beta = arguments.floats("beta", beta, {channels});
  p.batch = arguments.batch();
  p.height = height;
  p.width = width;
  p.num_prefix = num_prefix;
  p.channels = p.y_stride_token = channels;
  p.y_stride_batch = sizes.patches() * channels;
  p.y = arguments.output(out, {p.batch, sizes.patches(), channels}).data;
  run<&cuda::dw_aggregate_workspace, &cuda::dw_aggregate>(arguments, p, stream);
}

// The objects that describe values and their aggregation, beside x and wv.
struct ValueObjects {
  const OptionalObject& bv;
  const py::object& kernel;
  const OptionalObject &kappa, &mu, &beta;
  bool tf32;
};

// What DwAttentionParams and DwLayerParams have in common.
template <class Params>
Params values_params(Arguments& arguments, const CudaArray& wv, const ValueObjects& given,
                     const Sizes& sizes) {
  const CudaArray& tokens = arguments.tokens();
  const int64_t channels = wv.shape[0];
  Params p{};
  p.dtype = tokens.dtype;
  p.tf32 = given.tf32;
  p.x = tokens.data;
  p.x_stride_batch = tokens.strides[0];
  p.x_stride_token = tokens.strides[1];
  p.wv = wv.data;
  p.bv = arguments.floats("bv", given.bv, {channels});
  p.kernel = arguments.floats("kernel", given.kernel, {channels, 3, 3});
  p.kappa = arguments.floats("kappa", given.kappa, {sizes.num_prefix, channels});
  p.mu = arguments.floats("mu", given.mu, {channels});
  p.beta = arguments.floats("beta", given.beta, {channels});
  p.batch = arguments.batch();
  p.height = sizes.height;
  p.width = sizes.width;
  p.num_prefix = sizes.num_prefix;
  p.dim = arguments.dim();
  p.channels = channels;
  return p;
}

void dw_attention(const py::object& x, const py::object& wv, const OptionalObject& bv,
                  const py::object& kernel, int64_t height, int64_t width, int64_t num_prefix,
                  const OptionalObject& kappa, const OptionalObject& mu, const OptionalObject& beta,
                  const py::object& out, const OptionalStream& stream, bool tf32) {
  const Sizes sizes{height, width, num_prefix};
  Arguments arguments("x", x, sizes);
  const CudaArray weight = arguments.weight("wv", wv, "C", arguments.dim());
  auto p = values_params<cuda::DwAttentionParams>(arguments, weight,
                                                  {bv, kernel, kappa, mu, beta, tf32}, sizes);
  p.wv_stride = p.dim;
  p.y_stride_token = p.channels;
  p.y_stride_batch = sizes.patches() * p.channels;
  p.y = arguments.output(out, {p.batch, sizes.patches(), p.channels}).data;
  run<&cuda::dw_attention_workspace, &cuda::dw_attention>(arguments, p, stream);
}

void dw_layer(const py::object& x, const py::object& wv, const OptionalObject& bv,
              const py::object& kernel, const py::object& wo, const OptionalObject& bo,
              int64_t height, int64_t width, int64_t num_prefix, const OptionalObject& kappa,
              const OptionalObject& mu, const OptionalObject& beta,
              const OptionalObject& prefix_out, const py::object& out, const OptionalStream& stream,
              bool tf32) {
  const Sizes sizes{height, width, num_prefix};
  Arguments arguments("x", x, sizes);
  const CudaArray weight = arguments.weight("wv", wv, "C", arguments.dim());
  const CudaArray back = arguments.weight("wo", wo, "D_out", weight.shape[0]);
  auto p = values_params<cuda::DwLayerParams>(arguments, weight,
                                              {bv, kernel, kappa, mu, beta, tf32}, sizes);
  const int64_t dim_out = back.shape[0], prefix = prefix_out.has_value() ? num_prefix : 0;
  const int64_t row_bytes = dim_out * dtype_size(p.dtype), rows = prefix + sizes.patches();
  p.wo = back.data;
  p.bo = arguments.floats("bo", bo, {dim_out});
  p.prefix = cuda::PrefixRows::kNone;
  p.dim_out = p.out_stride_token = dim_out;
  p.out_stride_batch = rows * dim_out;
  p.narrow = cuda::is_narrow(p.channels, height, width);
  RowCopy copy;
  if (prefix > 0) {
    copy.from = arguments.rows("prefix_out", *prefix_out, {p.batch, prefix, dim_out}).data;
    copy.to_pitch = rows * row_bytes;
    copy.from_pitch = copy.bytes = prefix * row_bytes;
    copy.count = p.batch;
  }
  copy.to = arguments.output(out, {p.batch, rows, dim_out}).data;
  p.out = static_cast<char*>(copy.to) + prefix * row_bytes;
  run<&cuda::dw_layer_workspace, &cuda::dw_layer>(arguments, p, stream, copy);
}

}  // namespace

void bind_cuda_ops(py::module_& parent) {
  using py::arg;
  py::module_ module = parent.def_submodule(
      "cuda",
      "The CUDA kernels over objects with __cuda_array_interface__ (CuPy, Numba, PyTorch, ...).\n\n"
      "Tokens, weights and out are float32, float16 or bfloat16 (\"<V2\", or \"<u2\" holding its\n"
      "bits) of one dtype; biases and coefficients are float32. Everything is contiguous, x only "
      "in\n"
      "its last dimension. Work goes to `stream`, a cudaStream_t as a number, else to the stream\n"
      "that out names, else to the legacy default stream, after the streams that the arrays name;\n"
      "the call does not wait for it. Keep the arrays until the work is done.");
  module.def("dw_aggregate", &dw_aggregate, arg("v"), arg("kernel"), arg("height"), arg("width"),
             arg("num_prefix") = 0, arg("kappa") = py::none(), arg("mu") = py::none(),
             arg("beta") = py::none(), py::kw_only(), arg("out"), arg("stream") = py::none(),
             "3x3 depthwise aggregation plus context: v (B, N, C) -> out (B, H*W, C).");
  module.def("dw_attention", &dw_attention, arg("x"), arg("wv"), arg("bv"), arg("kernel"),
             arg("height"), arg("width"), arg("num_prefix") = 0, arg("kappa") = py::none(),
             arg("mu") = py::none(), arg("beta") = py::none(), py::kw_only(), arg("out"),
             arg("stream") = py::none(), arg("tf32") = false,
             "Value projection x wv^T + bv, then dw_aggregate: x (B, N, D) -> out (B, H*W, C).\n\n"
             "With tf32 the products of float32 arrays are taken in TF32.");
  module.def(
      "dw_layer", &dw_layer, arg("x"), arg("wv"), arg("bv"), arg("kernel"), arg("wo"), arg("bo"),
      arg("height"), arg("width"), arg("num_prefix") = 0, arg("kappa") = py::none(),
      arg("mu") = py::none(), arg("beta") = py::none(), arg("prefix_out") = py::none(),
      py::kw_only(), arg("out"), arg("stream") = py::none(), arg("tf32") = false,
      "dw_attention, then wo and bo: x (B, N, D) -> out (B, H*W, D_out), behind prefix_out\n"
      "(B, P, D_out) where it is given. Inner widths C up to 512 take one fused kernel: this\n"
      "is lowrank_dw and ens_dw too.");
  bind_cuda_variance(module);
}

}  // namespace dwattn::python
