// Fields of a node to and from TensorRT's collections.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "layer.h"

namespace dwattn::trt {

// Throws std::invalid_argument for a field that is unknown, given twice or of the wrong type.
// Fields that are absent keep their defaults.
Fields read_fields(const nvinfer1::PluginFieldCollection& collection);

// All fields, pointing into `fields`.
std::vector<nvinfer1::PluginField> plugin_fields(const Fields& fields);

}  // namespace dwattn::trt
