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

void check_prefix_rows(const Tensor& x, const PrefixWeights& w, int64_t num_heads,
                       int64_t num_prefix) {
  DWATTN_CHECK(x.dim() == 3, "x must have the three dimensions (batch, tokens, channels), got ",
               shape_text(x), ".");
  DWATTN_CHECK(is_supported(x.scalar_type()), "x has ", dtype_name(x.scalar_type()),
               "; convert it with .float().");
  DWATTN_CHECK(num_prefix >= 1 && num_prefix <= x.size(1), "num_prefix=", num_prefix,
               " must lie between 1 and the ", x.size(1), " tokens of x.");
  DWATTN_CHECK(w.wq.dim() == 2 && w.wq.size(1) == x.size(2), "wq must have shape (C, ", x.size(2),
               ") to project the ", x.size(2), " features of x, got ", shape_text(w.wq), ".");
  const int64_t channels = w.wq.size(0);
  DWATTN_CHECK(num_heads >= 1 && channels >= num_heads && channels % num_heads == 0,
               "wq projects to C=", channels, " channels, which num_heads=", num_heads,
               " do not divide.");
  check_shape("wk", w.wk, {channels, x.size(2)});
  check_shape("wv", w.wv, {channels, x.size(2)});
  DWATTN_CHECK(w.wo.dim() == 2 && w.wo.size(1) == channels, "wo must have shape (D, ", channels,
               ") to project the ", channels, " channels of the heads, got ", shape_text(w.wo),
               ".");
  if (w.bq.has_value()) check_shape("bq", *w.bq, {channels});
  if (w.bv.has_value()) check_shape("bv", *w.bv, {channels});
  if (w.bo.has_value()) check_shape("bo", *w.bo, {w.wo.size(0)});
  check_like("wq", w.wq, x);
  check_like("wk", w.wk, x);
  check_like("wv", w.wv, x);
  check_like("wo", w.wo, x);
  if (w.bq.has_value()) check_like("bq", *w.bq, x);
  if (w.bv.has_value()) check_like("bv", *w.bv, x);
  if (w.bo.has_value()) check_like("bo", *w.bo, x);
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
