// Makes plugins from fields; one creator for each plugin name.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

namespace dwattn::trt {

class DwCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit DwCreator(bool narrow);

  const nvinfer1::AsciiChar* getPluginName() const noexcept override;
  const nvinfer1::AsciiChar* getPluginVersion() const noexcept override;
  const nvinfer1::AsciiChar* getPluginNamespace() const noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;

  // Null, with a logged sentence, where the fields make no layer. Both phases take the same fields.
  nvinfer1::IPluginV3* createPlugin(const nvinfer1::AsciiChar* name,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;

 private:
  const bool narrow_;
  std::vector<nvinfer1::PluginField> names_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace dwattn::trt
