// What the operators on CPU tensors share.
#pragma once

#include <vector>

#include "kernels/cpu/half.h"
#include "torch/tensors.h"

namespace dwattn::torch_ops {

inline void check_status(Status status) {
  DWATTN_CHECK(status == Status::kOk, "The CPU kernel failed: ", status_text(status), ".");
}

// Unit stride along the last dimension.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// Coefficients in the accumulation dtype, one after another. Narrower ones are converted here: a
// call of the dispatcher for each of them is what a small layer spends much of its time on.
class Widened {
 public:
  Widened(const OptionalTensor& t, ScalarType type) {
    if (!t.has_value()) return;
    const ScalarType given = t->scalar_type();
    if (type == ScalarType::Float && given == ScalarType::BFloat16 && t->is_contiguous()) {
      convert<cpu::BFloat16>(*t);
    } else if (type == ScalarType::Float && given == ScalarType::Half && t->is_contiguous()) {
      convert<cpu::Float16>(*t);
    } else {
      tensor_ = dense(*t, type);
      data_ = tensor_->const_data_ptr();
    }
  }
  const void* data() const { return data_; }

 private:
  template <class Half>
  void convert(const Tensor& t) {
    const Half* const from = static_cast<const Half*>(t.const_data_ptr());
    values_.resize(static_cast<size_t>(t.numel()));
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = cpu::to_float(from[i]);
    data_ = values_.data();
  }

  OptionalTensor tensor_;
  std::vector<float> values_;
  const void* data_ = nullptr;
};

}  // namespace dwattn::torch_ops
