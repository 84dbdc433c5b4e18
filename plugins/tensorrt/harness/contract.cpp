#include "contract.h"

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "example_nodes.h"
#include "node.h"

namespace {
long allocations = 0;
}

// Counts what the plugin allocates. Not inlined: GCC would take free for a mismatch.
__attribute__((noinline)) void* operator new(size_t bytes) {
  ++allocations;
  if (void* const memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }

namespace harness {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using Shape = std::vector<int64_t>;

void check_creators() {
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
  expect(count == 2, "the library has two creators");
  for (int i = 0; i < count; ++i) {
    const nvinfer1::InterfaceInfo info = creators[i]->getInterfaceInfo();
    expect(std::string(info.kind) == "PLUGIN CREATOR_V3ONE", "kind of creator");
    auto& creator = *static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
    const std::string name = creator.getPluginName();
    expect(name == (i == 0 ? "DWAttention" : "LowRankDWAttention"), "name of plugin " + name);
    expect(creator.getPluginVersion() == std::string("1"), "version of " + name);
    expect(creator.getPluginNamespace() == std::string("dwattn"), "namespace of " + name);
    const nvinfer1::PluginFieldCollection& fields = *creator.getFieldNames();
    std::string names;
    for (int f = 0; f < fields.nbFields; ++f) names += std::string(fields.fields[f].name) + ' ';
    expect(names == "inputs prefix height width num_prefix num_heads ", "fields: " + names);
    expect(creator.createPlugin("none", nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr,
           name + " without fields");
    expect_said("no fields", name + " without fields");
  }
}

void check_identity() {
  for (const char* name : {"DWAttention", "LowRankDWAttention"}) {
    const Plugin plugin = full_node(Prefix::kExact, Grid::kFields, DataType::kHALF, name).create();
    expect(core(plugin).getPluginName() == std::string(name), "name of the plugin");
    expect(core(plugin).getPluginVersion() == std::string("1"), "version of the plugin");
    expect(core(plugin).getPluginNamespace() == std::string("dwattn"), "namespace of the plugin");
    expect(build(plugin).getNbOutputs() == 1, "one output");
  }
}

void check_output_shapes() {
  for (Prefix prefix : {Prefix::kDrop, Prefix::kExact, Prefix::kStatic}) {
    const int64_t rows = kHeight * kWidth + (prefix == Prefix::kDrop ? 0 : kPrefix);
    const std::string what = "output shape, prefix " + std::to_string(static_cast<int>(prefix));
    const Shape expected{kBatch, rows, kDimOut};

    const Node fixed = full_node(prefix, Grid::kFields);
    const OutputShape shape = output_shape(fixed.create(), fixed, {{0, 0}, {1, 0}});
    expect(shape.values == expected, what);
    expect(shape.constant == std::vector<bool>({false, true, true}), what + ": dynamic batch");

    // The fields know the number of tokens that x does not.
    const OutputShape known = output_shape(fixed.create(), fixed, {{0, 1}, {1, 1}});
    expect(known.values == expected && known.constant[1], what + ": rows of a fixed grid");

    const Node dynamic = full_node(prefix, Grid::kInput);
    const OutputShape free = output_shape(dynamic.create(), dynamic,
                                          {{0, 0}, {0, 1}, {1, 0}, {1, 1}, {2, 0}, {2, 2}, {2, 3}});
    expect(free.values == expected, what + ": dynamic grid");
    expect(free.constant == std::vector<bool>({false, false, true}), what + ": dynamic grid");
    expect(output_shape(dynamic.create(), dynamic).values == expected, what + ": constant grid");

    const Node least = least_node(prefix);
    expect(output_shape(least.create(), least).values == expected, what + ": least node");
  }
  expect_silence("output shapes");
}

void check_formats() {
  for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    const Node node = full_node(Prefix::kExact, Grid::kInput, type);
    const Plugin plugin = node.create();
    std::vector<DynamicPluginTensorDesc> in_out = node.profile();
    in_out.push_back(in_out[0]);
    const auto supports = [&](int i) {
      return build(plugin).supportsFormatCombination(i, in_out.data(), node.input_count(), 1);
    };
    for (int i = 0; i <= node.input_count(); ++i) {
      const std::string name = i < node.input_count() ? node.inputs[i].name : "output";
      expect(supports(i), "format of " + name);
      const PluginTensorDesc right = in_out[i].desc;
      in_out[i].desc.format = TensorFormat::kHWC8;
      expect(!supports(i), name + " must be LINEAR");
      in_out[i].desc = right;
      in_out[i].desc.type = DataType::kINT8;
      expect(supports(i) == (name == "grid"), name + " as INT8");
      // Another type than x, or for coefficients than FLOAT.
      in_out[i].desc.type = right.type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
      expect(supports(i) == (name == "grid" || name == "x"), name + " of another type");
      in_out[i].desc = right;
    }
  }
}

void check_types() {
  const Node node = full_node(Prefix::kDrop, Grid::kInput, DataType::kHALF);
  const Plugin plugin = node.create();
  const auto ask = [&](const std::string& name, DataType type) {
    std::vector<DataType> types;
    for (const Tensor& t : node.inputs) types.push_back(t.name == name ? type : t.type);
    DataType output = DataType::kINT8;
    const bool accepted =
        build(plugin).getOutputDataTypes(&output, 1, types.data(), node.input_count()) == 0;
    return accepted && output == types[0];
  };
  expect(ask("x", DataType::kHALF), "HALF is supported");
  expect(ask("grid", DataType::kINT64), "the grid may have any type");
  expect_silence("supported types");
  expect(!ask("x", DataType::kINT8), "INT8 is refused");
  expect_said("input 'x' is INT8, supported are FLOAT, HALF and BF16", "INT8");
  expect(!ask("wo", DataType::kFLOAT), "weights have the dtype of x");
  expect_said("input 'wo' is FLOAT, expected HALF, like x", "weights");
  expect(!ask("kernel", DataType::kHALF), "coefficients are FLOAT");
  expect_said("input 'kernel' is HALF, expected FLOAT", "coefficients");
}

void check_serialization() {
  for (Grid grid : {Grid::kFields, Grid::kInput}) {
    for (Prefix prefix : {Prefix::kDrop, Prefix::kExact, Prefix::kStatic}) {
      for (const char* name : {"DWAttention", "LowRankDWAttention"}) {
        const Node node = full_node(prefix, grid, DataType::kHALF, name);
        Plugin original = node.create();
        const std::string summary = build(original).getMetadataString();
        for (const auto& [field, value] : node.integers) {
          const std::string text = field + "=" + std::to_string(value);
          expect(summary.find(text) != std::string::npos, "metadata lacks " + text);
        }
        expect(build(original).getTimingCacheID() == summary, "timing cache id");

        const Plugin loaded = reloaded(original, "loaded");
        original.reset();
        expect(loaded != nullptr, "serialize, create");
        if (!loaded) continue;
        const Plugin copy(loaded->clone());
        const Plugin attached(runtime(copy).attachToContext(nullptr));
        for (const Plugin* plugin : {&loaded, &copy, &attached}) {
          expect(build(*plugin).getMetadataString() == summary, "a copy has other fields");
          expect(!output_shape(*plugin, node).values.empty(), "a copy refuses the shapes");
        }
      }
    }
  }
  const Node a = full_node(Prefix::kDrop, Grid::kFields),
             b = full_node(Prefix::kDrop, Grid::kInput);
  expect(build(a.create()).getTimingCacheID() != std::string(build(b.create()).getTimingCacheID()),
         "different nodes share a timing cache id");
  expect_silence("serialization");
}

void check_workspace() {
  const auto size = [](Node node, int64_t batch, int64_t height) {
    for (const char* name : {"x", "residual", "grid"}) node.input(name).shape[0] = batch;
    node.input("grid").shape[2] = height;
    node.input("x").shape[1] = kPrefix + height * kWidth;
    node.input("residual").shape[1] = height * kWidth;
    const std::vector<DynamicPluginTensorDesc> profile = node.profile();
    return build(node.create()).getWorkspaceSize(profile.data(), node.input_count(), nullptr, 1);
  };
  const Node node = full_node(Prefix::kDrop, Grid::kInput, DataType::kHALF);
  const size_t one = size(node, 1, kHeight);
  expect(one >= kHeight * kWidth * kChannels * 2, "the aggregation lies in the workspace");
  expect(size(node, 8, kHeight) > one, "the workspace grows with the batch");
  expect(size(node, 1, 16) > one, "the workspace grows with the grid");

  // A profile counts with its largest shapes.
  Node eight = node;
  for (const char* name : {"x", "residual", "grid"}) eight.input(name).shape[0] = 8;
  std::vector<DynamicPluginTensorDesc> range = eight.profile();
  for (int i : {0, 1, 2}) range[i].min.d[0] = range[i].opt.d[0] = 1;
  expect(build(eight.create()).getWorkspaceSize(range.data(), eight.input_count(), nullptr, 1) ==
             size(node, 8, kHeight),
         "the workspace of a range");

  // Bounds of the number of tokens that are looser than the grid's.
  Node loose = node;
  std::vector<DynamicPluginTensorDesc> profile = loose.profile();
  profile[0].max.d[1] = profile[1].max.d[1] = 1000;
  profile[1].max.d[0] = 1000;  // and of the images of the residual
  expect(build(loose.create()).getWorkspaceSize(profile.data(), loose.input_count(), nullptr, 1) ==
             size(node, kBatch, kHeight),
         "loose bounds");
  expect_silence("workspace");

  // Where it cannot be told, no builder has that much: 0 would be an engine that writes anywhere.
  profile[0].max.d[2] += 1;
  expect(build(loose.create()).getWorkspaceSize(profile.data(), loose.input_count(), nullptr, 1) >=
             size_t{1} << 50,
         "an unknown workspace");
  expect_said("input 'wv' has the shape", "an unknown workspace");
}

void check_run_time() {
  const Node node = full_node(Prefix::kExact, Grid::kFields);
  const Plugin plugin = node.create();
  const std::vector<PluginTensorDesc> descs = node.descs();
  const long before = allocations;
  runtime(plugin).onShapeChange(descs.data(), node.input_count(), nullptr, 1);
  const long allocated = allocations - before;
  expect(allocated == 0, "a change of shapes allocates");
  expect_silence("right shapes");

  // What the kernels refuse is reported: here, no pointers at all.
  const std::vector<const void*> inputs(node.inputs.size(), nullptr);
  void* const outputs[] = {nullptr};
  expect(
      runtime(plugin).enqueue(descs.data(), nullptr, inputs.data(), outputs, nullptr, nullptr) != 0,
      "null pointers");
  expect_said("DWAttention 'block.3': the kernels report: invalid argument", "null pointers");
}

class ThrowingFinder final : public nvinfer1::ILoggerFinder {
 public:
  nvinfer1::ILogger* findLogger() override { throw std::runtime_error("no logger"); }
};

// Messages then go to stderr; what counts is that the caller survives.
void check_without_logger() {
  ThrowingFinder throwing;
  for (nvinfer1::ILoggerFinder* finder : {static_cast<nvinfer1::ILoggerFinder*>(&throwing),
                                          static_cast<nvinfer1::ILoggerFinder*>(nullptr)}) {
    setLoggerFinder(finder);
    Node node = least_node(Prefix::kDrop);
    node.set("height", -1);
    expect(node.create() == nullptr, "a refusal without a logger");
  }
  setLoggerFinder(&logger);
  expect_silence("messages without a logger");
}

}  // namespace

void check_contract() {
  check_creators();
  check_identity();
  check_output_shapes();
  check_formats();
  check_types();
  check_serialization();
  check_workspace();
  check_run_time();
  check_without_logger();
}

}  // namespace harness
