#include "contract.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "memory.h"
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

constexpr int64_t kBatch = 2, kHeight = 3, kWidth = 4, kPrefix = 2, kDim = 16, kChannels = 8,
                  kPrefixChannels = 12, kDimOut = 24, kHeads = 3;
constexpr int64_t kTokens = kPrefix + kHeight * kWidth;

enum class Prefix { kDrop, kExact, kStatic };
enum class Grid { kFields, kInput };

// A node with every input that it may have.
Node full_node(Prefix prefix, Grid grid, DataType type = DataType::kFLOAT,
               const char* plugin = "DWAttention") {
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

// The inputs that no node can be without.
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

struct WrongFields {
  Prefix prefix;
  std::function<void(Node&)> change;
  const char* message;
};

void check_wrong_fields() {
  const auto with = [](const char* field, auto value) {
    return [=](Node& node) { node.set(field, value); };
  };
  const auto inputs = [](const char* names) {
    return [=](Node& node) { node.set("inputs", std::string(names)); };
  };
  const WrongFields table[] = {
      {Prefix::kDrop, with("hieght", 3), "unknown field 'hieght'; fields are inputs"},
      {Prefix::kDrop, with("height", std::string("3")),
       "field 'height' is CHAR of length 1, expected one INT32"},
      {Prefix::kDrop, with("inputs", 3), "'inputs' is given twice"},
      {Prefix::kDrop, with("height", -3), "height=-3, width=4"},
      {Prefix::kDrop, with("height", 0), "height=0, width=4"},
      {Prefix::kDrop, with("num_prefix", -1), "field 'num_prefix' is -1"},
      {Prefix::kDrop, with("num_heads", 2), "num_heads=2 with prefix='drop'"},
      {Prefix::kExact, with("num_heads", 0), "num_heads=0 with prefix='exact'"},
      {Prefix::kDrop, with("prefix", std::string("dropp")), "field 'prefix' is 'dropp'"},
      {Prefix::kDrop, inputs(""), "'x' is missing"},
      {Prefix::kDrop, inputs("x wv wo"), "'kernel' is missing"},
      {Prefix::kDrop, inputs("x wv kernel wo weights"), "names 'weights', which is no input"},
      {Prefix::kDrop, inputs("x kernel wv wo"), "'wv' must come before 'kernel'"},
      {Prefix::kDrop, inputs("x wv wv kernel wo"), "every input at most once"},
      {Prefix::kDrop, inputs("x grid wv kernel wo"), "and the input 'grid' exclude each other"},
      {Prefix::kDrop, inputs("x wv kernel wo query key"), "'query' has no use with prefix='drop'"},
      {Prefix::kDrop, inputs("x wv kernel wo query_bias"), "needs the input 'query'"},
      {Prefix::kExact, inputs("x wv kernel wo query"), "prefix='exact' needs the input 'key'"},
      {Prefix::kStatic, inputs("x wv kernel wo static_a"), "needs the input 'static_b'"},
      {Prefix::kStatic, inputs("x wv kernel wo prefix_out_bias static_a static_b"),
       "'prefix_out_bias' needs the input 'prefix_out'"},
      {Prefix::kStatic, with("num_prefix", 0), "num_prefix=0"},
      {Prefix::kDrop,
       [](Node& node) {
         node.set("height", 0);
         node.set("width", 0);
       },
       "height=0, width=0 reads the grid from the input 'grid'"},
      {Prefix::kDrop,
       [](Node& node) {
         node.set("inputs", std::string("x wv kernel kappa wo"));
         node.set("num_prefix", 0);
       },
       "num_prefix=0"},
  };
  for (const WrongFields& wrong : table) {
    Node node = least_node(wrong.prefix);
    expect(node.create() != nullptr, "the node before the change");
    expect_silence("the node before the change");
    wrong.change(node);
    expect(node.create() == nullptr, std::string("created in spite of: ") + wrong.message);
    expect_said(wrong.message, "wrong fields");
  }
}

void check_field_types() {
  const float real = 3;
  const int64_t wide = 3, too_wide = int64_t{1} << 40;
  const std::string names = "x wv kernel wo";
  const auto create = [&](nvinfer1::PluginField height) {
    const int32_t width = 4;
    // A string may come with its terminating zero.
    const nvinfer1::PluginField fields[] = {
        {"inputs", names.c_str(), nvinfer1::PluginFieldType::kCHAR,
         static_cast<int32_t>(names.size()) + 1},
        {"width", &width, nvinfer1::PluginFieldType::kINT32, 1},
        height};
    const nvinfer1::PluginFieldCollection collection{3, fields};
    return Plugin(find_creator("DWAttention")
                      ->createPlugin("node", &collection, nvinfer1::TensorRTPhase::kBUILD));
  };
  using Type = nvinfer1::PluginFieldType;
  expect(create({"height", &wide, Type::kINT64, 1}) != nullptr, "INT64 is accepted");
  expect_silence("INT64");
  expect(create({"height", &real, Type::kFLOAT32, 1}) == nullptr, "FLOAT32 is refused");
  expect_said("field 'height' is FLOAT32 of length 1, expected one INT32", "FLOAT32");
  expect(create({"height", &wide, Type::kINT32, 2}) == nullptr, "two numbers are refused");
  expect_said("field 'height' is INT32 of length 2", "two numbers");
  expect(create({"height", nullptr, Type::kINT32, 1}) == nullptr, "no data is refused");
  expect_said("without data", "no data");
  expect(create({"height", &too_wide, Type::kINT64, 1}) == nullptr, "a large number is refused");
  expect_said("1099511627776, which is no 32-bit integer", "a large number");
  expect(create({"prefix", &wide, Type::kINT64, 1}) == nullptr, "a number is no string");
  expect_said("field 'prefix' is INT64 of length 1, expected a string", "a number for a string");
}

struct WrongShape {
  Prefix prefix;
  Grid grid;
  const char* input;
  Shape shape;
  const char* message;
};

// Each is refused when shapes are inferred, when a profile is configured, and at run time.
void check_wrong_shapes() {
  const WrongShape table[] = {
      {Prefix::kExact,
       Grid::kFields,
       "x",
       {kBatch, kTokens + 1, kDim},
       "x has 15 tokens, but num_prefix + height * width = 2 + 3 * 4 = 14"},
      {Prefix::kDrop, Grid::kFields, "x", {kBatch, kTokens - kPrefix, kDim}, "x has 12 tokens"},
      {Prefix::kStatic,
       Grid::kInput,
       "grid",
       {kBatch, 5, kWidth, kWidth},
       "num_prefix + height * width = 2 + 4 * 4 = 18"},
      {Prefix::kStatic, Grid::kInput, "grid", {kWidth}, "input 'grid' has the shape (4)"},
      {Prefix::kDrop,
       Grid::kFields,
       "x",
       {kTokens, kDim},
       "input 'x' has the shape (14, 16), expected (B, N, D)"},
      {Prefix::kDrop,
       Grid::kFields,
       "residual",
       {kBatch, kTokens, kDimOut},
       "input 'residual' has the shape (2, 14, 24), expected (B, N_out, D_out) = (2, 12, ?)"},
      {Prefix::kExact, Grid::kFields, "residual", {1, kTokens, kDimOut}, "input 'residual'"},
      {Prefix::kDrop,
       Grid::kFields,
       "wv",
       {kDim, kChannels},
       "input 'wv' has the shape (16, 8), expected (C, D) = (?, 16)"},
      {Prefix::kDrop, Grid::kFields, "bv", {kChannels + 1}, "input 'bv'"},
      {Prefix::kDrop,
       Grid::kFields,
       "kernel",
       {kChannels, 3, 5},
       "input 'kernel' has the shape (8, 3, 5), expected (C, 3, 3) = (8, 3, 3)"},
      {Prefix::kDrop, Grid::kFields, "kernel", {kChannels, 1, 3, 3}, "input 'kernel'"},
      {Prefix::kDrop, Grid::kFields, "kappa", {1, kChannels}, "input 'kappa'"},
      {Prefix::kDrop, Grid::kFields, "mu", {1, kChannels}, "input 'mu'"},
      {Prefix::kDrop, Grid::kFields, "beta", {kDim}, "input 'beta'"},
      {Prefix::kDrop,
       Grid::kFields,
       "wo",
       {kDimOut, kDim},
       "input 'wo' has the shape (24, 16), expected (D_out, C) = (24, 8)"},
      {Prefix::kDrop, Grid::kFields, "bo", {kDim}, "input 'bo'"},
      {Prefix::kDrop, Grid::kFields, "gamma", {kDim}, "input 'gamma'"},
      {Prefix::kExact, Grid::kFields, "query", {kPrefixChannels, kDimOut}, "input 'query'"},
      {Prefix::kExact, Grid::kFields, "query_bias", {kChannels}, "input 'query_bias'"},
      {Prefix::kExact, Grid::kFields, "key", {kChannels, kDim}, "input 'key'"},
      {Prefix::kExact, Grid::kFields, "prefix_value", {kChannels, kDim}, "input 'prefix_value'"},
      {Prefix::kStatic, Grid::kFields, "prefix_value_bias", {1}, "input 'prefix_value_bias'"},
      {Prefix::kStatic, Grid::kFields, "prefix_out", {kDimOut, kChannels}, "input 'prefix_out'"},
      {Prefix::kStatic, Grid::kFields, "prefix_out_bias", {kDim}, "input 'prefix_out_bias'"},
      {Prefix::kStatic, Grid::kFields, "static_a", {kPrefixChannels}, "input 'static_a'"},
      {Prefix::kStatic, Grid::kFields, "static_b", {1, kPrefixChannels}, "input 'static_b'"},
  };
  for (const WrongShape& wrong : table) {
    Node node = full_node(wrong.prefix, wrong.grid);
    const Plugin plugin = node.create();
    node.input(wrong.input).shape = wrong.shape;
    const std::string what = std::string("wrong ") + wrong.input;
    expect(output_shape(plugin, node).values.empty(), what + " at inference of shapes");
    expect_said(wrong.message, what + " at inference of shapes");

    const std::vector<DynamicPluginTensorDesc> profile = node.profile();
    expect(build(plugin).configurePlugin(profile.data(), node.input_count(), nullptr, 1) != 0,
           what + " in a profile");
    expect_said(wrong.message, what + " in a profile");

    const std::vector<PluginTensorDesc> descs = node.descs();
    expect(runtime(plugin).onShapeChange(descs.data(), node.input_count(), nullptr, 1) != 0,
           what + " at run time");
    expect_said(wrong.message, what + " at run time");
    expect(runtime(plugin).enqueue(descs.data(), nullptr, nullptr, nullptr, nullptr, nullptr) != 0,
           what + " when enqueued");
    expect_said(wrong.message, what + " when enqueued");
  }

  Node heads = full_node(Prefix::kExact, Grid::kFields);
  heads.set("num_heads", 5);
  expect(output_shape(heads.create(), heads).values.empty(), "heads that do not divide");
  expect_said("num_heads=5 does not divide the Cp = 12 channels", "heads that do not divide");

  Node fewer = least_node(Prefix::kDrop);
  const Plugin plugin = fewer.create();
  fewer.inputs.pop_back();
  expect(output_shape(plugin, fewer).values.empty(), "an input too few");
  expect_said("the node has 3 inputs, but field 'inputs' names 4: 'x wv kernel wo'",
              "an input too few");
}

void check_narrow_prefix_needs_its_output() {
  Node node = full_node(Prefix::kExact, Grid::kFields);
  const auto removed = [](const Tensor& t) { return t.name.rfind("prefix_out", 0) == 0; };
  node.inputs.erase(std::remove_if(node.inputs.begin(), node.inputs.end(), removed),
                    node.inputs.end());
  node.name_inputs();
  expect(output_shape(node.create(), node).values.empty(), "prefix_value without prefix_out");
  expect_said("Cp = 12 channels, which 'wo' with C = 8 cannot take", "prefix_value");
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
  expect(build(loose.create()).getWorkspaceSize(profile.data(), loose.input_count(), nullptr, 1) ==
             size(node, kBatch, kHeight),
         "loose bounds");
  expect_silence("workspace");
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
  check_wrong_fields();
  check_field_types();
  check_wrong_shapes();
  check_narrow_prefix_needs_its_output();
  check_workspace();
  check_run_time();
  check_without_logger();
}

}  // namespace harness
