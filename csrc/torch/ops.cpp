// Schemas of the torch operators. Shapes and equations: ../kernels/params.h and
// python/dwattn/library.py, which also registers their fake implementations; gradients.py registers
// autograd. Implementations for a device are registered in the files of that device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dwattn, m) {
  // height and width are SymInt so that a traced graph keeps a dynamic resolution.
  m.def(
      "dw_aggregate(Tensor v, Tensor kernel, Tensor? kappa, Tensor? mu, Tensor? beta, "
      "SymInt height, SymInt width, int num_prefix) -> Tensor");
  // Empty tensors stand for what was not asked for: dv without `values`, dkernel, dkappa and dmu
  // without v. dv has the dtype of grad, the others the accumulation dtype.
  m.def(
      "dw_aggregate_backward(Tensor grad, Tensor? v, Tensor kernel, Tensor? kappa, Tensor? mu, "
      "SymInt height, SymInt width, int num_prefix, bool values) -> (Tensor dv, Tensor dkernel, "
      "Tensor dkappa, Tensor dmu, Tensor dbeta)");
  m.def(
      "dw_attention(Tensor x, Tensor wv, Tensor? bv, Tensor kernel, Tensor? kappa, Tensor? mu, "
      "Tensor? beta, SymInt height, SymInt width, int num_prefix) -> Tensor");
  m.def(
      "dw_layer(Tensor x, Tensor wv, Tensor? bv, Tensor kernel, Tensor? kappa, Tensor? mu, "
      "Tensor? beta, Tensor wo, Tensor? bo, Tensor? prefix_out, SymInt height, SymInt width, "
      "int num_prefix) -> Tensor");
  // Exact attention of the prefix tokens and its output projection, without gradients.
  m.def(
      "prefix_rows(Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor wv, Tensor? bv, Tensor wo, "
      "Tensor? bo, int num_heads, int num_prefix, float scale) -> Tensor");
  // Adds to the state in place; returns E v, or an empty tensor without v.
  m.def(
      "attention_variance_(Tensor q, Tensor k, Tensor(a!) mean, Tensor(b!) m2, "
      "Tensor(c!)? prefix_mean, int seen, Tensor? v, int num_prefix, float scale) -> Tensor");
  // Whether products of fp32 tensors on a GPU may be taken in TF32. The stable ABI cannot read
  // PyTorch's setting, so the kernels ask Python through the dispatcher at each call (library.py);
  // where there is no Python the answer is no.
  m.def("_allow_tf32() -> bool");
}

namespace {
bool allow_tf32_without_python() { return false; }
}  // namespace

// Python's answer is registered as CompositeExplicitAutograd, which comes first.
STABLE_TORCH_LIBRARY_IMPL(dwattn, CompositeImplicitAutograd, m) {
  m.impl("_allow_tf32", TORCH_BOX(&allow_tf32_without_python));
}
