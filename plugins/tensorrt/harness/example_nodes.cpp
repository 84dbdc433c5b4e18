#include "example_nodes.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

namespace harness {

using nvinfer1::DataType;
using Shape = std::vector<int64_t>;

Node full_node(Prefix prefix, Grid grid, DataType type, const char* plugin) {
  constexpr const char* kNames[] = {"drop", "exact", "static"};
  const bool rows = prefix != Prefix::kDrop;
  Node node;
  node.plugin = plugin;
  node.set("height", grid == Grid::kFields ? kHeight : 0);
  node.set("width", grid == Grid::kFields ? kWidth : 0);
  node.set("num_prefix", kPrefix);
  node.set("num_heads", prefix == Prefix::kExact ? kHeads : 0);
  node.set("prefix", std::string(kNames[static_cast<int>(prefix)]));
  const auto tensor = [&](const char* name, const Shape& shape) {
    node.inputs.push_back({name, type, shape, {}});
  };
  const auto coefficients = [&](const char* name, const Shape& shape) {
    node.inputs.push_back({name, DataType::kFLOAT, shape, {}});
  };
  tensor("x", {kBatch, kTokens, kDim});
  tensor("residual", {kBatch, rows ? kTokens : kTokens - kPrefix, kDimOut});
  if (grid == Grid::kInput) tensor("grid", {kBatch, 5, kHeight, kWidth});
  tensor("wv", {kChannels, kDim});
  coefficients("bv", {kChannels});
  coefficients("kernel", {kChannels, 3, 3});
  coefficients("kappa", {kPrefix, kChannels});
  coefficients("mu", {kChannels});
  coefficients("beta", {kChannels});
  tensor("wo", {kDimOut, kChannels});
  coefficients("bo", {kDimOut});
  coefficients("gamma", {kDimOut});
  if (prefix == Prefix::kExact) {
    tensor("query", {kPrefixChannels, kDim});
    coefficients("query_bias", {kPrefixChannels});
    tensor("key", {kPrefixChannels, kDim});
  }
  if (rows) {
    tensor("prefix_value", {kPrefixChannels, kDim});
    coefficients("prefix_value_bias", {kPrefixChannels});
    tensor("prefix_out", {kDimOut, kPrefixChannels});
    coefficients("prefix_out_bias", {kDimOut});
  }
  if (prefix == Prefix::kStatic) {
    coefficients("static_a", {kPrefix, kPrefixChannels});
    coefficients("static_b", {kPrefix, kPrefixChannels});
  }
  node.name_inputs();
  return node;
}

Node least_node(Prefix prefix) {
  Node node = full_node(prefix, Grid::kFields);
  const auto optional = [](const Tensor& tensor) {
    constexpr const char* kNeeded[] = {"x",     "wv",  "kernel",   "wo",
                                       "query", "key", "static_a", "static_b"};
    return std::none_of(std::begin(kNeeded), std::end(kNeeded),
                        [&](const char* name) { return tensor.name == name; });
  };
  node.inputs.erase(std::remove_if(node.inputs.begin(), node.inputs.end(), optional),
                    node.inputs.end());
  if (prefix == Prefix::kExact) {
    node.input("query").shape = node.input("key").shape = {kChannels, kDim};
    node.set("num_heads", 4);
  } else if (prefix == Prefix::kStatic) {
    node.input("static_a").shape = node.input("static_b").shape = {kPrefix, kChannels};
  }
  node.name_inputs();
  return node;
}

}  // namespace harness
