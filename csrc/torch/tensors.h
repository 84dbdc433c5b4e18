// Small helpers over the LibTorch stable ABI: error text with values in it, dtypes, aten calls.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/params.h"

namespace dwattn::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Like STD_TORCH_CHECK, without the source location in front of the sentence.
#define DWATTN_CHECK(condition, ...)                                      \
  if (!(condition)) {                                                     \
    throw std::runtime_error(::dwattn::torch_ops::sentence(__VA_ARGS__)); \
  }

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "a dtype other than float32, float64, float16 and bfloat16";
  }
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline DType kernel_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Converted and contiguous; the tensor itself where it is both already (the usual case, no
// dispatch).
inline Tensor dense(const Tensor& t, ScalarType type) {
  Tensor out = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return out.is_contiguous() ? out : torch::stable::contiguous(out);
}

inline OptionalTensor dense(const OptionalTensor& t, ScalarType type) {
  return t.has_value() ? OptionalTensor(dense(*t, type)) : std::nullopt;
}

inline const void* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// A contiguous CPU tensor, without the dispatcher, whose microseconds a small layer would feel.
inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, 3> strides{};
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes.begin()[d];
  }
  const auto shim_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                  strides.data(), shim_type,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// aten::linear.out: out = a weight^T + bias; rows of `out` and `a` may lie apart.
inline void linear_out(const Tensor& out, const Tensor& a, const Tensor& weight,
                       const OptionalTensor& bias) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(weight),
      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the returned handle
}

// aten::linear.
inline Tensor linear(const Tensor& a, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dwattn::torch_ops
