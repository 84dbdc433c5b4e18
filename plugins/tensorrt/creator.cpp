#include "creator.h"

#include <stdexcept>
#include <string>

#include "fields.h"
#include "log.h"
#include "plugin.h"

namespace dwattn::trt {

DwCreator::DwCreator(bool narrow) : narrow_(narrow), names_(plugin_fields({})) {
  for (nvinfer1::PluginField& field : names_) field.data = nullptr;  // names and types only
  collection_ = {static_cast<int32_t>(names_.size()), names_.data()};
}

const nvinfer1::AsciiChar* DwCreator::getPluginName() const noexcept {
  return plugin_name(narrow_);
}
const nvinfer1::AsciiChar* DwCreator::getPluginVersion() const noexcept { return kPluginVersion; }
const nvinfer1::AsciiChar* DwCreator::getPluginNamespace() const noexcept {
  return kPluginNamespace;
}
const nvinfer1::PluginFieldCollection* DwCreator::getFieldNames() noexcept { return &collection_; }

nvinfer1::IPluginV3* DwCreator::createPlugin(const nvinfer1::AsciiChar* name,
                                             const nvinfer1::PluginFieldCollection* fields,
                                             nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>(plugin_name(narrow_), nullptr, [&] {
    if (fields == nullptr) throw std::invalid_argument("no fields are given");
    const std::string node = name != nullptr ? name : "";
    try {
      return new DwPlugin(Layer(narrow_, read_fields(*fields)), node);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("'" + node + "': " + error.what());
    }
  });
}

}  // namespace dwattn::trt
