// The attention statistics over numpy arrays.
#include <pybind11/stl.h>

#include <cmath>

#include "kernels/cpu/attention_variance.h"
#include "kernels/cpu/scratch.h"
#include "python/numpy_arrays.h"
#include "python/numpy_ops.h"

namespace py = pybind11;

namespace dwattn::python {
namespace {

// Queries, keys or values, (B, n_h, N, d_h): a view of a fused projection as it is, anything
// without unit stride along d_h as a copy.
struct Heads {
  Heads(const char* name, const py::array& given, const py::array& like)
      : dtype(dtype_of(name, given)), array(rows(given)) {
    if (like.ndim() != 4) {
      fail(name, " must have the four dimensions (batch, heads, tokens, width), got ",
           shape_text(shape_of(like)), ".");
    }
    check_shape(name, shape_of(given), shape_of(like));
    if (dtype != dtype_of("q", like)) fail(name, " and q must have the same dtype.");
    if (dtype == DType::kFloat64) {
      fail(name,
           " is float64; the statistics are computed in float32, from float32, float16 or "
           "uint16 holding the bits of bfloat16.");
    }
  }

  int64_t stride(int d) const { return array.strides(d) / array.itemsize(); }

  const DType dtype;
  const py::array array;

 private:
  static py::array rows(const py::array& given) {
    bool usable = given.ndim() == 4 && given.strides(3) == given.itemsize();
    for (int d = 0; usable && d < 3; ++d) {
      usable = given.strides(d) >= 0 && given.strides(d) % given.itemsize() == 0;
    }
    return usable ? given : dense(given);
  }
};

// A part of the state, which is updated where it lies.
double* state(const char* name, py::array& array, const Shape& shape) {
  check_shape(name, shape_of(array), shape);
  if (dtype_of(name, array) != DType::kFloat64) {
    fail(name, " is ", py::str(array.dtype()).cast<std::string>(), "; the state is float64.");
  }
  if ((array.flags() & py::array::c_style) == 0 || !array.writeable()) {
    fail(name, " is updated in place, so it must be C-contiguous and writable.");
  }
  return static_cast<double*>(array.mutable_data());
}

OptionalArray attention_variance(const py::array& q_given, const py::array& k_given, py::array mean,
                                 py::array m2, int64_t seen, const OptionalArray& v_given,
                                 OptionalArray prefix_mean, int64_t num_prefix,
                                 std::optional<double> scale, int num_threads,
                                 const std::string& isa) {
  const Heads q("q", q_given, q_given), k("k", k_given, q_given);
  std::optional<Heads> v;
  if (v_given.has_value()) v.emplace("v", *v_given, q_given);
  const int64_t batch = q.array.shape(0), heads = q.array.shape(1), tokens = q.array.shape(2),
                width = q.array.shape(3), patches = tokens - num_prefix;
  if (num_prefix < 0 || patches < 1 || seen < 0) {
    fail("num_prefix=", num_prefix, " of N=", tokens, " tokens and seen=", seen,
         " images are not possible.");
  }
  AttentionVarianceParams p{};
  p.dtype = q.dtype;
  p.q = q.array.data();
  p.q_stride_batch = q.stride(0);
  p.q_stride_head = q.stride(1);
  p.q_stride_token = q.stride(2);
  p.k = k.array.data();
  p.k_stride_batch = k.stride(0);
  p.k_stride_head = k.stride(1);
  p.k_stride_token = k.stride(2);
  p.state_dtype = DType::kFloat64;
  p.mean = state("mean", mean, {heads, patches, patches});
  p.m2 = state("m2", m2, {heads, patches, patches});
  if (prefix_mean.has_value()) {
    p.prefix_mean = state("prefix_mean", *prefix_mean, {heads, patches, num_prefix});
  }
  OptionalArray out;
  if (v.has_value()) {
    p.v = v->array.data();
    p.v_stride_batch = v->stride(0);
    p.v_stride_head = v->stride(1);
    p.v_stride_token = v->stride(2);
    // Laid out as (B, N, n_h, d_h), so that joining the heads is a view.
    py::array joined(q.array.dtype(), Shape{batch, tokens, heads, width});
    p.out = joined.mutable_data();
    p.out_stride_batch = tokens * heads * width;
    p.out_stride_head = width;
    p.out_stride_token = heads * width;
    out = joined.attr("transpose")(0, 2, 1, 3);
  }
  p.count = seen;
  p.skip = num_prefix;
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(width))));
  p.batch = batch;
  p.heads = heads;
  p.tokens = tokens;
  p.head_dim = width;
  const cpu::Isa chosen = isa_of(isa);
  const cpu::ParallelFor parallel = thread_for(num_threads);
  if (q.array.size() == 0) return out;
  Status status;
  {
    py::gil_scoped_release unlocked;
    const int64_t bytes = cpu::attention_variance_workspace(p, parallel.threads);
    cpu::Scratch scratch(cpu::Scratch::padded(bytes));
    status = cpu::attention_variance(p, scratch.take(bytes), parallel.threads, parallel, chosen);
  }
  check(status);
  return out;
}

}  // namespace

void bind_numpy_variance(py::module_& module) {
  using py::arg;
  module.def(
      "attention_variance", &attention_variance, arg("q"), arg("k"), arg("mean").noconvert(),
      arg("m2").noconvert(), arg("seen"), arg("v") = py::none(),
      arg("prefix_mean").noconvert() = py::none(), arg("num_prefix") = 0, arg("scale") = py::none(),
      py::kw_only(), arg("num_threads") = 1, arg("isa") = "auto",
      "Adds the maps E = softmax(scale q k^T) of a batch to a running state, in place; returns\n"
      "E v (B, n_h, N, d_h), or None without v.\n\n"
      "q, k, v (B, n_h, N, d_h) of float32, float16, or uint16 holding the bits of bfloat16.\n"
      "mean, m2 (n_h, N - P, N - P) and prefix_mean (n_h, N - P, P), P = num_prefix, of float64:\n"
      "mean and sum of squared deviations of E over `seen` images, of any content for seen=0.\n"
      "Afterwards the state holds seen + B images. scale defaults to 1 / sqrt(d_h).");
}

}  // namespace dwattn::python
