// The attention statistics over objects with __cuda_array_interface__.
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>

#include "kernels/cuda/attention_variance.h"
#include "python/cuda_launch.h"
#include "python/cuda_ops.h"

namespace py = pybind11;

namespace dwattn::python {
namespace {

constexpr int64_t kMostWidth = 128;

// Queries, keys, values or the output, (B, n_h, N, d_h), contiguous in d_h only.
CudaArray heads(const char* name, const py::object& object, const CudaArray* like) {
  CudaArray array = cuda_array(name, object, false);
  if (array.shape.size() != 4) {
    fail(name, " must have the four dimensions (batch, heads, tokens, width), got ",
         shape_text(array.shape), ".");
  }
  if (like == nullptr) return array;
  check_shape(name, array.shape, like->shape);
  if (array.dtype != like->dtype) {
    fail(name, " is ", dtype_name(array.dtype), " but q is ", dtype_name(like->dtype),
         "; they must have the same dtype.");
  }
  return array;
}

// A part of the state, which is updated where it lies.
CudaArray state(const char* name, const py::object& object, const Shape& shape) {
  CudaArray array = cuda_array(name, object, true, true);
  check_shape(name, array.shape, shape);
  if (array.dtype != DType::kFloat32 && array.dtype != DType::kFloat64) {
    fail(name, " is ", dtype_name(array.dtype), "; the state is float64 or float32.");
  }
  return array;
}

void check_written(const std::vector<CudaArray>& arrays, size_t read) {
  for (size_t i = read; i < arrays.size(); ++i) {
    if (arrays[i].read_only) fail(arrays[i].name, " is read-only, but it is written.");
    for (size_t j = 0; j < i; ++j) {
      if (overlap(arrays[i], arrays[j])) {
        fail(arrays[i].name, " and ", arrays[j].name, " share memory.");
      }
    }
  }
}

void run(const std::vector<CudaArray>& arrays, size_t written, AttentionVarianceParams p,
         const OptionalStream& stream) {
#ifdef DWATTN_WITH_CUDA
  if (arrays.front().numel() == 0) return;
  const py::gil_scoped_release unlocked;
  const int64_t lse_bytes = p.batch * p.heads * p.tokens * static_cast<int64_t>(sizeof(float));
  launch({arrays, written, stream, {}, lse_bytes, [&p](void* memory, cuda::Stream s) {
            p.lse = static_cast<float*>(memory);
            return cuda::attention_variance(p, s);
          }});
#else
  static_cast<void>(arrays), static_cast<void>(written), static_cast<void>(p);
  static_cast<void>(stream);
  throw std::runtime_error("This build of dwattn has no CUDA kernels: " DWATTN_CUDA_STATE ".");
#endif
}

void attention_variance(const py::object& q_given, const py::object& k_given,
                        const py::object& mean_given, const py::object& m2_given, int64_t seen,
                        const OptionalObject& v_given, const OptionalObject& prefix_given,
                        int64_t num_prefix, std::optional<double> scale,
                        const OptionalObject& out_given, const OptionalStream& stream) {
  const CudaArray q = heads("q", q_given, nullptr), k = heads("k", k_given, &q);
  AttentionVarianceParams p{};
  p.dtype = q.dtype;
  p.batch = q.shape[0];
  p.heads = q.shape[1];
  p.tokens = q.shape[2];
  p.head_dim = q.shape[3];
  const int64_t patches = p.tokens - num_prefix;
  if (num_prefix < 0 || patches < 1 || seen < 0) {
    fail("num_prefix=", num_prefix, " of N=", p.tokens, " tokens and seen=", seen,
         " images are not possible.");
  }
  if (p.head_dim < 1 || p.head_dim > kMostWidth) {
    fail("d_h=", p.head_dim, " is not in 1..", kMostWidth, ", which the CUDA kernel takes.");
  }
  if (v_given.has_value() != out_given.has_value()) {
    fail("v and out go together: out is where E v is written.");
  }
  p.q = q.data;
  p.q_stride_batch = q.strides[0];
  p.q_stride_head = q.strides[1];
  p.q_stride_token = q.strides[2];
  p.k = k.data;
  p.k_stride_batch = k.strides[0];
  p.k_stride_head = k.strides[1];
  p.k_stride_token = k.strides[2];
  std::vector<CudaArray> arrays{q, k};
  if (v_given.has_value()) {
    arrays.push_back(heads("v", *v_given, &q));
    const CudaArray& v = arrays.back();
    p.v = v.data;
    p.v_stride_batch = v.strides[0];
    p.v_stride_head = v.strides[1];
    p.v_stride_token = v.strides[2];
  }
  const size_t read = arrays.size();
  arrays.push_back(state("mean", mean_given, {p.heads, patches, patches}));
  p.state_dtype = arrays.back().dtype;
  p.mean = arrays.back().data;
  arrays.push_back(state("m2", m2_given, {p.heads, patches, patches}));
  p.m2 = arrays.back().data;
  if (prefix_given.has_value()) {
    arrays.push_back(state("prefix_mean", *prefix_given, {p.heads, patches, num_prefix}));
    p.prefix_mean = arrays.back().data;
  }
  for (size_t i = read; i < arrays.size(); ++i) {
    if (arrays[i].dtype == p.state_dtype) continue;
    fail(arrays[i].name, " is ", dtype_name(arrays[i].dtype), " but mean is ",
         dtype_name(p.state_dtype), "; the state has one dtype.");
  }
  if (out_given.has_value()) {
    arrays.push_back(heads("out", *out_given, &q));
    const CudaArray& out = arrays.back();
    p.out = out.data;
    p.out_stride_batch = out.strides[0];
    p.out_stride_head = out.strides[1];
    p.out_stride_token = out.strides[2];
  }
  check_written(arrays, read);
  p.count = seen;
  p.skip = num_prefix;
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(p.head_dim))));
  run(arrays, arrays.size() - read, p, stream);
}

}  // namespace

void bind_cuda_variance(py::module_& module) {
  using py::arg;
  module.def(
      "attention_variance", &attention_variance, arg("q"), arg("k"), arg("mean"), arg("m2"),
      arg("seen"), arg("v") = py::none(), arg("prefix_mean") = py::none(), arg("num_prefix") = 0,
      arg("scale") = py::none(), py::kw_only(), arg("out") = py::none(), arg("stream") = py::none(),
      "Adds the maps E = softmax(scale q k^T) of a batch to a running state, in place;\n"
      "with v, E v goes to out. q, k, v, out (B, n_h, N, d_h), contiguous in d_h, which is\n"
      "at most 128. The state is that of attention_variance over numpy, float64 or float32.");
}

}  // namespace dwattn::python
