#include "plugin.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "fields.h"
#include "kernels/failure.h"
#include "log.h"

static_assert(NV_TENSORRT_MAJOR >= 10, "IPluginV3 exists from TensorRT 10.0 on");

namespace dwattn::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kSuccess = 0, kFailure = -1;

// The answer of a plugin that cannot tell its workspace: there is no other way to say so, and with
// 0 bytes an engine would be built whose kernels write into memory that is not theirs. This much no
// builder has, and it can still be rounded up.
constexpr size_t kImpossible = size_t{1} << 60;

bool is_supported(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

std::string type_text(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "FLOAT";
    case DataType::kHALF:
      return "HALF";
    case DataType::kBF16:
      return "BF16";
    case DataType::kINT8:
      return "INT8";
    case DataType::kINT32:
      return "INT32";
    case DataType::kINT64:
      return "INT64";
    default:
      return "DataType(" + std::to_string(static_cast<int>(type)) + ")";
  }
}

DType kernel_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return DType::kFloat32;
    case DataType::kHALF:
      return DType::kFloat16;
    case DataType::kBF16:
      return DType::kBFloat16;
    default:
      throw std::invalid_argument("input 'x' is " + type_text(type) +
                                  ", supported are FLOAT, HALF and BF16");
  }
}

// Whether an input may have a type, given that of x.
bool type_fits(Role role, DataType type, DataType of_x) {
  switch (contents(role)) {
    case Contents::kTensor:
      return is_supported(type) && type == of_x;
    case Contents::kCoefficients:
      return type == DataType::kFLOAT;
    case Contents::kNothing:
      return true;
  }
  return false;
}

Dims known_dims(const DimsExprs& expressions) {
  Dims dims{};
  dims.nbDims = expressions.nbDims;
  for (int i = 0; i < dims.nbDims; ++i) {
    dims.d[i] = expressions.d[i]->isConstant() ? expressions.d[i]->getConstantValue() : -1;
  }
  return dims;
}

template <class DimsOf>
Shapes gather(const Layer& layer, const DimsOf& dims_of) {
  Shapes shapes{};
  for (int i = 0; i < layer.input_count(); ++i) shapes[i] = dims_of(i);
  return shapes;
}

std::string summary_of(const Layer& layer) {
  const Fields& f = layer.fields();
  std::ostringstream text;
  text << plugin_name(layer.narrow()) << " version=" << kPluginVersion << " height=" << f.height
       << " width=" << f.width << " num_prefix=" << f.num_prefix << " prefix=" << f.prefix
       << " num_heads=" << f.num_heads << " inputs=";
  for (int i = 0; i < layer.input_count(); ++i) text << (i ? "," : "") << role_name(layer.role(i));
  return text.str();
}

// The launcher's arguments; `inputs` in the order of the node.
cuda::DwLayerParams launch_params(const Layer& layer, const Sizes& s, DType dtype,
                                  const void* const* inputs, void* output) {
  const auto tensor = [&](Role role) -> const void* {
    return layer.has(role) ? inputs[layer.index(role)] : nullptr;
  };
  const auto floats = [&](Role role) { return static_cast<const float*>(tensor(role)); };
  const int64_t output_tokens = layer.output_prefix() + s.height * s.width;

  cuda::DwLayerParams p{};
  p.dtype = dtype;
  p.x = tensor(Role::kX);
  p.x_stride_batch = s.tokens * s.dim;
  p.x_stride_token = s.dim;
  p.residual = tensor(Role::kResidual);
  p.residual_stride_batch = p.out_stride_batch = output_tokens * s.dim_out;
  p.residual_stride_token = p.out_stride_token = s.dim_out;
  p.out = output;
  p.wv = tensor(Role::kWv);
  p.bv = floats(Role::kBv);
  p.kernel = floats(Role::kKernel);
  p.kappa = floats(Role::kKappa);
  p.mu = floats(Role::kMu);
  p.beta = floats(Role::kBeta);
  p.wo = tensor(Role::kWo);
  p.bo = floats(Role::kBo);
  p.gamma = floats(Role::kGamma);
  p.prefix = layer.prefix();
  p.query = tensor(Role::kQuery);
  p.query_bias = floats(Role::kQueryBias);
  p.key = tensor(Role::kKey);
  p.prefix_value = tensor(Role::kPrefixValue);
  p.prefix_value_bias = floats(Role::kPrefixValueBias);
  p.prefix_out = tensor(Role::kPrefixOut);
  p.prefix_out_bias = floats(Role::kPrefixOutBias);
  p.static_a = floats(Role::kStaticA);
  p.static_b = floats(Role::kStaticB);
  p.batch = s.batch;
  p.height = s.height;
  p.width = s.width;
  p.num_prefix = layer.fields().num_prefix;
  p.dim = s.dim;
  p.channels = s.channels;
  p.dim_out = s.dim_out;
  p.num_heads = layer.fields().num_heads;
  p.prefix_channels = s.prefix_channels;
  p.narrow = layer.narrow();
  return p;
}

}  // namespace

DwPlugin::DwPlugin(Layer layer, std::string node_name)
    : layer_(std::move(layer)),
      node_name_(std::move(node_name)),
      label_(std::string(plugin_name(layer_.narrow())) + " '" + node_name_ + "'"),
      summary_(summary_of(layer_)) {}

template <class Result, class Body>
Result DwPlugin::guard(Result on_error, const Body& body) const noexcept {
  return guarded(label_.c_str(), on_error, body);
}

nvinfer1::IPluginCapability* DwPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* DwPlugin::clone() noexcept {
  return guard<nvinfer1::IPluginV3*>(nullptr, [&] { return new DwPlugin(layer_, node_name_); });
}

// ---- Core

const nvinfer1::AsciiChar* DwPlugin::getPluginName() const noexcept {
  return plugin_name(layer_.narrow());
}
const nvinfer1::AsciiChar* DwPlugin::getPluginVersion() const noexcept { return kPluginVersion; }
const nvinfer1::AsciiChar* DwPlugin::getPluginNamespace() const noexcept {
  return kPluginNamespace;
}

// ---- Build

int32_t DwPlugin::getOutputDataTypes(DataType* output_types, int32_t output_count,
                                     const DataType* input_types,
                                     int32_t input_count) const noexcept {
  return guard(kFailure, [&] {
    layer_.check_input_count(input_count);
    kernel_type(input_types[0]);
    for (int i = 1; i < input_count; ++i) {
      const Role role = layer_.role(i);
      if (type_fits(role, input_types[i], input_types[0])) continue;
      const bool like_x = contents(role) == Contents::kTensor;
      throw std::invalid_argument(std::string("input '") + role_name(role) + "' is " +
                                  type_text(input_types[i]) + ", expected " +
                                  (like_x ? type_text(input_types[0]) + ", like x" : "FLOAT"));
    }
    std::fill(output_types, output_types + output_count, input_types[0]);
    return kSuccess;
  });
}

int32_t DwPlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*,
                                  int32_t, DimsExprs* outputs, int32_t,
                                  nvinfer1::IExprBuilder& builder) noexcept {
  return guard(kFailure, [&] {
    layer_.check_input_count(input_count);
    const Sizes s = layer_.sizes(gather(layer_, [&](int i) { return known_dims(inputs[i]); }));
    const DimsExprs& x = inputs[0];
    const int64_t dropped = layer_.fields().num_prefix - layer_.output_prefix();
    DimsExprs& out = outputs[0];
    out.nbDims = 3;
    out.d[0] = x.d[0];
    if (s.tokens >= 0) {
      out.d[1] = builder.constant(s.tokens - dropped);
    } else if (dropped > 0) {
      out.d[1] = builder.operation(nvinfer1::DimensionOperation::kSUB, *x.d[1],
                                   *builder.constant(dropped));
    } else {
      out.d[1] = x.d[1];
    }
    out.d[2] = inputs[layer_.index(Role::kWo)].d[0];
    return kSuccess;
  });
}

bool DwPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* in_out,
                                         int32_t input_count, int32_t) noexcept {
  return guard(false, [&] {
    layer_.check_input_count(input_count);
    const PluginTensorDesc& desc = in_out[position].desc;
    const Role role = position < input_count ? layer_.role(position) : Role::kX;
    return desc.format == nvinfer1::TensorFormat::kLINEAR &&
           type_fits(role, desc.type, in_out[0].desc.type);
  });
}

// Ranges of dynamic dimensions are bounds that need not fit together; the optimum has to.
int32_t DwPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                  const DynamicPluginTensorDesc*, int32_t) noexcept {
  return guard(kFailure, [&] {
    layer_.check_input_count(input_count);
    layer_.sizes(gather(layer_, [&](int i) { return inputs[i].opt; }));
    return kSuccess;
  });
}

size_t DwPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                  const DynamicPluginTensorDesc*, int32_t) const noexcept {
  return guard(kImpossible, [&] {
    layer_.check_input_count(input_count);
    // Upper bounds need not fit together either: take the grid's word for the number of tokens, and
    // that of x for the number of images.
    Shapes largest = gather(layer_, [&](int i) { return inputs[i].max; });
    largest[0].d[1] = -1;
    if (layer_.has(Role::kResidual)) {
      nvinfer1::Dims& residual = largest[layer_.index(Role::kResidual)];
      residual.d[0] = residual.d[1] = -1;
    }
    const Sizes s = layer_.sizes(largest);
    int anything = 0;  // only whether pointers are null matters
    std::array<const void*, kRoleCount> pointers;
    pointers.fill(&anything);
    return static_cast<size_t>(cuda::dw_layer_workspace(
        launch_params(layer_, s, kernel_type(inputs[0].desc.type), pointers.data(), &anything)));
  });
}

const char* DwPlugin::getTimingCacheID() noexcept { return summary_.c_str(); }
const char* DwPlugin::getMetadataString() noexcept { return summary_.c_str(); }

// ---- Runtime

int32_t DwPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count,
                                const PluginTensorDesc*, int32_t) noexcept {
  return guard(kFailure, [&] {
    layer_.check_input_count(input_count);
    layer_.sizes(gather(layer_, [&](int i) { return inputs[i].dims; }));
    return kSuccess;
  });
}

int32_t DwPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                          const void* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept {
  return guard(kFailure, [&] {
    const Sizes s = layer_.sizes(gather(layer_, [&](int i) { return input_descs[i].dims; }));
    const DType dtype = kernel_type(input_descs[0].type);
    const Status status =
        cuda::dw_layer(launch_params(layer_, s, dtype, inputs, outputs[0]), workspace, stream);
    if (status == Status::kOk) return kSuccess;
    throw std::runtime_error("the kernels report: " + failure_text(status));
  });
}

nvinfer1::IPluginV3* DwPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* DwPlugin::getFieldsToSerialize() noexcept {
  return guard<const nvinfer1::PluginFieldCollection*>(nullptr, [&] {
    serialized_ = plugin_fields(layer_.fields());
    collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
  });
}

}  // namespace dwattn::trt
