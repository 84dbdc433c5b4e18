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
  // Adds to the state in place; returns E v, or an empty tensor without v.
  m.def(
      "attention_variance_(Tensor q, Tensor k, Tensor(a!) mean, Tensor(b!) m2, "
      "Tensor(c!)? prefix_mean, int seen, Tensor? v, int num_prefix, float scale) -> Tensor");
}
