#include "node.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "checks.h"
#include "expressions.h"

namespace harness {

using nvinfer1::PluginCapabilityType;

int64_t Tensor::count() const {
  int64_t product = 1;
  for (int64_t size : shape) product *= size;
  return product;
}

nvinfer1::Dims dims(const std::vector<int64_t>& shape) {
  nvinfer1::Dims d{};
  d.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), d.d);
  return d;
}

size_t type_size(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kINT32 ? 4 : 2;
}

Tensor& Node::input(const std::string& name) {
  const auto found = std::find_if(inputs.begin(), inputs.end(),
                                  [&](const Tensor& tensor) { return tensor.name == name; });
  if (found == inputs.end()) {
    std::fprintf(stderr, "the node has no input '%s'\n", name.c_str());
    std::exit(2);
  }
  return *found;
}

void Node::set(const std::string& field, int32_t value) {
  for (auto& [name, old] : integers) {
    if (name == field) return void(old = value);
  }
  integers.emplace_back(field, value);
}

void Node::set(const std::string& field, const std::string& value) {
  for (auto& [name, old] : strings) {
    if (name == field) return void(old = value);
  }
  strings.emplace_back(field, value);
}

void Node::name_inputs() {
  std::string names;
  for (const Tensor& tensor : inputs) names += (names.empty() ? "" : " ") + tensor.name;
  set("inputs", names);
}

Plugin Node::create() const {
  std::vector<nvinfer1::PluginField> fields;
  for (const auto& [name, text] : strings) {
    fields.emplace_back(name.c_str(), text.data(), nvinfer1::PluginFieldType::kCHAR,
                        static_cast<int32_t>(text.size()));
  }
  for (const auto& [name, value] : integers) {
    fields.emplace_back(name.c_str(), &value, nvinfer1::PluginFieldType::kINT32, 1);
  }
  const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                   fields.data()};
  return Plugin(
      find_creator(plugin)->createPlugin("block.3", &collection, nvinfer1::TensorRTPhase::kBUILD));
}

std::vector<nvinfer1::PluginTensorDesc> Node::descs() const {
  std::vector<nvinfer1::PluginTensorDesc> list;
  for (const Tensor& tensor : inputs) {
    list.push_back({dims(tensor.shape), tensor.type, nvinfer1::TensorFormat::kLINEAR, 0.0f});
  }
  return list;
}

std::vector<nvinfer1::DynamicPluginTensorDesc> Node::profile() const {
  std::vector<nvinfer1::DynamicPluginTensorDesc> list;
  for (const nvinfer1::PluginTensorDesc& desc : descs()) {
    nvinfer1::DynamicPluginTensorDesc range{};
    range.desc = desc;
    range.min = range.opt = range.max = desc.dims;
    list.push_back(range);
  }
  return list;
}

nvinfer1::IPluginCreatorV3One* find_creator(const std::string& name) {
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
  for (int i = 0; i < count; ++i) {
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    if (name == creator->getPluginName()) return creator;
  }
  std::fprintf(stderr, "the library has no creator '%s'\n", name.c_str());
  std::exit(2);
}

nvinfer1::IPluginV3OneCore& core(const Plugin& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneCore*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}
nvinfer1::IPluginV3OneBuild& build(const Plugin& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
nvinfer1::IPluginV3OneRuntime& runtime(const Plugin& plugin) {
  return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

Plugin reloaded(const Plugin& plugin, const std::string& name) {
  // An engine holds copies of the fields: nothing may point into the first plugin.
  const nvinfer1::PluginFieldCollection* const saved = runtime(plugin).getFieldsToSerialize();
  std::vector<std::string> names, data;
  for (int i = 0; i < saved->nbFields; ++i) {
    const nvinfer1::PluginField& field = saved->fields[i];
    const bool text = field.type == nvinfer1::PluginFieldType::kCHAR;
    names.emplace_back(field.name);
    data.emplace_back(static_cast<const char*>(field.data),
                      static_cast<size_t>(field.length) * (text ? 1 : sizeof(int32_t)));
  }
  std::vector<nvinfer1::PluginField> fields;
  for (int i = 0; i < saved->nbFields; ++i) {
    fields.emplace_back(names[i].c_str(), data[i].data(), saved->fields[i].type,
                        saved->fields[i].length);
  }
  const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                   fields.data()};
  return Plugin(find_creator(core(plugin).getPluginName())
                    ->createPlugin(name.c_str(), &collection, nvinfer1::TensorRTPhase::kRUNTIME));
}

OutputShape output_shape(const Plugin& plugin, const Node& node,
                         const std::vector<std::pair<int, int>>& dynamic) {
  Expressions expressions;
  std::vector<nvinfer1::DimsExprs> inputs(node.inputs.size());
  for (int i = 0; i < node.input_count(); ++i) {
    const std::vector<int64_t>& shape = node.inputs[i].shape;
    inputs[i].nbDims = static_cast<int32_t>(shape.size());
    for (int d = 0; d < inputs[i].nbDims; ++d) {
      const bool hidden =
          std::find(dynamic.begin(), dynamic.end(), std::pair(i, d)) != dynamic.end();
      inputs[i].d[d] = expressions.make(shape[d], !hidden);
    }
  }
  nvinfer1::DimsExprs output{};
  OutputShape result;
  if (build(plugin).getOutputShapes(inputs.data(), node.input_count(), nullptr, 0, &output, 1,
                                    expressions) != 0) {
    return result;
  }
  for (int d = 0; d < output.nbDims; ++d) {
    result.values.push_back(Expression::value(*output.d[d]));
    result.constant.push_back(output.d[d]->isConstant());
  }
  return result;
}

}  // namespace harness
