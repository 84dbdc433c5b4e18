#include "refusals.h"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "checks.h"
#include "example_nodes.h"
#include "node.h"

namespace harness {
namespace {

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using Shape = std::vector<int64_t>;

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

const WrongShape kWrongShapes[] = {
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

// It is refused when shapes are inferred, when a profile is configured, and at run time.
void check_wrong_shape(const WrongShape& wrong) {
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

void check_wrong_shapes() {
  for (const WrongShape& wrong : kWrongShapes) check_wrong_shape(wrong);

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

}  // namespace

void check_refusals() {
  check_wrong_fields();
  check_field_types();
  check_wrong_shapes();
  check_narrow_prefix_needs_its_output();
}

}  // namespace harness
