// What a node computes: its fields, which inputs it has, and the shapes that fit together.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/dw_layer.h"

namespace dwattn::trt {

// In the order in which inputs are given; absent ones are left out.
enum class Role : int32_t {
  kX,
  kResidual,
  kGrid,
  kWv,
  kBv,
  kKernel,
  kKappa,
  kMu,
  kBeta,
  kWo,
  kBo,
  kGamma,
  kQuery,
  kQueryBias,
  kKey,
  kPrefixValue,
  kPrefixValueBias,
  kPrefixOut,
  kPrefixOutBias,
  kStaticA,
  kStaticB,
};
constexpr int kRoleCount = static_cast<int>(Role::kStaticB) + 1;

// What an input holds decides its dtype.
enum class Contents {
  kTensor,        // the dtype of x
  kCoefficients,  // always float
  kNothing,       // only the shape is read
};

const char* role_name(Role role);
Contents contents(Role role);

// The fields of a node, as they are given and serialized.
struct Fields {
  std::string inputs;  // names of the inputs in order, separated by spaces
  int32_t height = 0;  // of the grid of patches; both 0: read from the shape of the input "grid"
  int32_t width = 0;
  int32_t num_prefix = 0;
  std::string prefix = "drop";  // "drop", "exact" or "static": rows of the prefix tokens
  int32_t num_heads = 0;        // of exact prefix rows
};

// Sizes of a call; -1 where a shape is not known yet.
struct Sizes {
  int64_t batch, tokens, height, width, dim, dim_out, channels, prefix_channels;
};

using Shapes = std::array<nvinfer1::Dims, kRoleCount>;  // of the inputs present, in order

class Layer {
 public:
  // Throws std::invalid_argument, which names the field or input, where they contradict each other.
  Layer(bool narrow, Fields fields);

  bool narrow() const { return narrow_; }
  const Fields& fields() const { return fields_; }
  cuda::PrefixRows prefix() const { return prefix_; }
  int input_count() const { return static_cast<int>(roles_.size()); }
  Role role(int input) const { return roles_[input]; }
  bool has(Role role) const { return index(role) >= 0; }
  int index(Role role) const { return index_[static_cast<int>(role)]; }  // or -1
  bool dynamic_grid() const { return has(Role::kGrid); }
  int64_t output_prefix() const;  // rows before the patches in the output

  // The sizes that the shapes agree on; dimensions of -1 are unknown and fit everything. Throws
  // std::invalid_argument with the name of the first input that does not fit, and both shapes.
  Sizes sizes(const Shapes& shapes) const;

  // Throws std::invalid_argument unless a node with this number of inputs is the one described.
  void check_input_count(int count) const;

 private:
  void read_inputs();
  void check_inputs() const;
  void check_grid() const;
  void check_prefix() const;

  bool narrow_;
  Fields fields_;
  cuda::PrefixRows prefix_;
  std::vector<Role> roles_;
  std::array<int, kRoleCount> index_;
};

}  // namespace dwattn::trt
