// A node of a network: fields and inputs, and the calls that TensorRT makes with them.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace harness {

struct Tensor {
  std::string name;
  nvinfer1::DataType type;
  std::vector<int64_t> shape;
  std::vector<char> bytes;  // contiguous; may be empty where only the shape matters

  int64_t count() const;
};

nvinfer1::Dims dims(const std::vector<int64_t>& shape);
size_t type_size(nvinfer1::DataType type);

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

struct Node {
  std::string plugin;
  std::vector<std::pair<std::string, int32_t>> integers;
  std::vector<std::pair<std::string, std::string>> strings;
  std::vector<Tensor> inputs;

  Tensor& input(const std::string& name);
  int input_count() const { return static_cast<int>(inputs.size()); }
  void set(const std::string& field, int32_t value);
  void set(const std::string& field, const std::string& value);
  void name_inputs();  // sets the field "inputs" from the inputs

  Plugin create() const;
  std::vector<nvinfer1::PluginTensorDesc> descs() const;
  // A profile with the same shapes for minimum, optimum and maximum.
  std::vector<nvinfer1::DynamicPluginTensorDesc> profile() const;
};

nvinfer1::IPluginCreatorV3One* find_creator(const std::string& name);

nvinfer1::IPluginV3OneCore& core(const Plugin& plugin);
nvinfer1::IPluginV3OneBuild& build(const Plugin& plugin);
nvinfer1::IPluginV3OneRuntime& runtime(const Plugin& plugin);

// Through the serialized fields, as an engine does it.
Plugin reloaded(const Plugin& plugin, const std::string& name);

// getOutputShapes; `dynamic` lists (input, dimension) that the builder does not know. Values of the
// output's dimensions, empty where the plugin refuses.
struct OutputShape {
  std::vector<int64_t> values;
  std::vector<bool> constant;
};
OutputShape output_shape(const Plugin& plugin, const Node& node,
                         const std::vector<std::pair<int, int>>& dynamic = {});

}  // namespace harness
