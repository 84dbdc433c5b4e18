#include "torch/checks.h"

#include <initializer_list>

namespace dwattn::torch_ops {
namespace {

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && t.size(d++) == size;
  if (same) return;
  std::ostringstream expected;
  d = 0;
  for (int64_t size : shape) expected << (d++ ? ", " : "") << size;
  DWATTN_CHECK(false, name, " must have shape (", expected.str(), shape.size() == 1 ? ",)" : ")",
               ", got ", shape_text(t), ".");
}

void check_device(const char* name, const Tensor& t, const Tensor& tokens) {
  DWATTN_CHECK(
      t.device() == tokens.device(), name,
      " is on another device than the tokens; move the layer and its input to one device.");
}

void check_coefficient(const char* name, const Tensor& t, const Tensor& tokens,
                       std::initializer_list<int64_t> shape) {
  check_shape(name, t, shape);
  check_device(name, t, tokens);
  DWATTN_CHECK(is_supported(t.scalar_type()), name, " has ", dtype_name(t.scalar_type()),
               "; convert it with .float().");
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  check_device(name, t, x);
  DWATTN_CHECK(t.scalar_type() == x.scalar_type(), name, " is ", dtype_name(t.scalar_type()),
               " but x is ", dtype_name(x.scalar_type()),
               "; convert the layer to the dtype of x or run it under torch.autocast.");
}

}  // namespace

void check_tokens(const char* name, const Tensor& t, const Geometry& g) {
  DWATTN_CHECK(t.dim() == 3, name,
               " must have the three dimensions (batch, tokens, channels), got ", shape_text(t),
               ".");
  DWATTN_CHECK(is_supported(t.scalar_type()), name, " has ", dtype_name(t.scalar_type()),
               "; convert it with .float().");
  DWATTN_CHECK(g.height >= 1 && g.width >= 1 && g.num_prefix >= 0,
               "A patch grid needs height >= 1, width >= 1 and num_prefix >= 0, got height=",
               g.height, ", width=", g.width, ", num_prefix=", g.num_prefix, ".");
  DWATTN_CHECK(t.size(1) == g.num_prefix + g.height * g.width, "The sequence has N=", t.size(1),
               " tokens, but num_prefix=", g.num_prefix, " and a grid of height=", g.height,
               " x width=", g.width, " make ", g.num_prefix + g.height * g.width,
               ". Pass the grid of this input and the number of CLS and register tokens.");
}

void check_projection(const Tensor& x, const Tensor& wv, const OptionalTensor& bv) {
  DWATTN_CHECK(wv.dim() == 2 && wv.size(1) == x.size(2), "wv must have shape (C, ", x.size(2),
               ") to project the ", x.size(2), " features of x, got ", shape_text(wv), ".");
  check_like("wv", wv, x);
  if (!bv.has_value()) return;
  check_shape("bv", *bv, {wv.size(0)});
  check_like("bv", *bv, x);
}

void check_output(const Tensor& x, const Tensor& wv, const Tensor& wo, const OptionalTensor& bo,
                  const OptionalTensor& prefix_out, const Geometry& g) {
  DWATTN_CHECK(wo.dim() == 2 && wo.size(1) == wv.size(0), "wo must have shape (D, ", wv.size(0),
               ") to project the ", wv.size(0), " aggregated channels, got ", shape_text(wo), ".");
  check_like("wo", wo, x);
  if (bo.has_value()) {
    check_shape("bo", *bo, {wo.size(0)});
    check_like("bo", *bo, x);
  }
  if (prefix_out.has_value()) {
    check_shape("prefix_out", *prefix_out, {x.size(0), g.num_prefix, wo.size(0)});
    check_like("prefix_out", *prefix_out, x);
  }
}

void check_coefficients(const Tensor& tokens, int64_t channels, const Geometry& geometry,
                        const Coefficients& k) {
  check_coefficient("kernel", k.kernel, tokens, {channels, 3, 3});
  if (k.kappa.has_value()) {
    check_coefficient("kappa", *k.kappa, tokens, {geometry.num_prefix, channels});
  }
  if (k.mu.has_value()) check_coefficient("mu", *k.mu, tokens, {channels});
  if (k.beta.has_value()) check_coefficient("beta", *k.beta, tokens, {channels});
}

}  // namespace dwattn::torch_ops
