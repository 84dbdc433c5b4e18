#include "golden.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

#include "checks.h"
#include "device_memory.h"
#include "kernels/cpu/half.h"
#include "node.h"

namespace harness {
namespace {

using nvinfer1::DataType;
namespace cpu = dwattn::cpu;

struct Golden {
  Node node;
  Tensor output;
  std::vector<double> expected;
  double tolerance = 0;
};

[[noreturn]] void stop(const std::filesystem::path& file, const std::string& problem) {
  std::fprintf(stderr, "%s: %s\n", file.c_str(), problem.c_str());
  std::exit(2);
}

std::vector<char> read_bytes(const std::filesystem::path& file, size_t size) {
  std::ifstream stream(file, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(stream), {}};
  if (!stream.good() && !stream.eof()) stop(file, "cannot be read");
  if (bytes.size() != size) {
    stop(file, std::to_string(bytes.size()) + " bytes, expected " + std::to_string(size));
  }
  return bytes;
}

DataType read_type(const std::string& name, const std::filesystem::path& file) {
  if (name == "float32") return DataType::kFLOAT;
  if (name == "float16") return DataType::kHALF;
  if (name == "bfloat16") return DataType::kBF16;
  stop(file, "unknown dtype '" + name + "'");
}

void read_tensor(std::istream& line, const std::filesystem::path& file, Tensor& tensor) {
  std::string type;
  line >> type;
  tensor.type = read_type(type, file);
  for (int64_t size; line >> size;) tensor.shape.push_back(size);
}

Golden read_golden(const std::filesystem::path& folder) {
  const std::filesystem::path file = folder / "case.txt";
  std::ifstream stream(file);
  if (!stream) stop(file, "cannot be read");
  Golden golden;
  for (std::string text; std::getline(stream, text);) {
    std::istringstream line(text);
    std::string what, name;
    line >> what;
    if (what == "plugin") {
      line >> golden.node.plugin;
    } else if (what == "field") {
      std::string value;
      line >> name >> value;
      name == "prefix" ? golden.node.set(name, value) : golden.node.set(name, std::stoi(value));
    } else if (what == "input") {
      Tensor tensor{};
      line >> tensor.name;
      read_tensor(line, file, tensor);
      tensor.bytes = read_bytes(folder / (tensor.name + ".bin"),
                                static_cast<size_t>(tensor.count()) * type_size(tensor.type));
      golden.node.inputs.push_back(std::move(tensor));
    } else if (what == "output") {
      read_tensor(line, file, golden.output);
    } else if (what == "tolerance") {
      line >> golden.tolerance;
    } else {
      stop(file, "unknown line '" + text + "'");
    }
  }
  golden.node.name_inputs();
  golden.expected.resize(static_cast<size_t>(golden.output.count()));
  const size_t bytes = golden.expected.size() * sizeof(double);
  std::memcpy(golden.expected.data(), read_bytes(folder / "expected.bin", bytes).data(), bytes);
  return golden;
}

template <class T>
double element(const char* bytes, size_t index) {
  T value;
  std::memcpy(&value, bytes + index * sizeof(T), sizeof(T));
  return cpu::to_float(value);
}

double element(const Tensor& tensor, size_t index) {
  const char* const bytes = tensor.bytes.data();
  switch (tensor.type) {
    case DataType::kHALF:
      return element<cpu::Float16>(bytes, index);
    case DataType::kBF16:
      return element<cpu::BFloat16>(bytes, index);
    default:
      return element<float>(bytes, index);
  }
}

// The builder's part: what it asks before it makes an engine. Returns the workspace's size.
size_t check_build(const Plugin& plugin, const Golden& golden, const std::string& name) {
  const Node& node = golden.node;
  const int count = node.input_count();
  std::vector<DataType> types;
  for (const Tensor& tensor : node.inputs) types.push_back(tensor.type);
  DataType output_type{};
  expect(build(plugin).getOutputDataTypes(&output_type, 1, types.data(), count) == 0 &&
             output_type == golden.output.type,
         name + ": dtype of the output");
  expect(output_shape(plugin, node, {{0, 0}}).values == golden.output.shape,
         name + ": shape of the output");

  std::vector<nvinfer1::DynamicPluginTensorDesc> in_out = node.profile();
  nvinfer1::DynamicPluginTensorDesc out{};
  out.desc = {dims(golden.output.shape), golden.output.type, nvinfer1::TensorFormat::kLINEAR, 0};
  out.min = out.opt = out.max = out.desc.dims;
  in_out.push_back(out);
  for (int i = 0; i <= count; ++i) {
    expect(build(plugin).supportsFormatCombination(i, in_out.data(), count, 1),
           name + ": format of tensor " + std::to_string(i));
  }
  expect(build(plugin).configurePlugin(in_out.data(), count, &in_out[count], 1) == 0,
         name + ": configurePlugin");
  return build(plugin).getWorkspaceSize(in_out.data(), count, &in_out[count], 1);
}

// An execution context's part: the result of one call.
Tensor run(const Plugin& plugin, const Golden& golden, size_t workspace_bytes,
           const std::string& name) {
  const std::vector<nvinfer1::PluginTensorDesc> descs = golden.node.descs();
  const nvinfer1::PluginTensorDesc out{dims(golden.output.shape), golden.output.type,
                                       nvinfer1::TensorFormat::kLINEAR, 0};
  std::vector<Memory> memories;
  std::vector<const void*> inputs;
  for (const Tensor& tensor : golden.node.inputs) {
    inputs.push_back(memories.emplace_back(tensor.bytes).data());
  }
  Tensor result = golden.output;
  result.bytes = poison(static_cast<size_t>(result.count()) * type_size(result.type));
  const Memory output(result.bytes), workspace(poison(workspace_bytes));
  void* const outputs[] = {output.data()};

  expect(runtime(plugin).onShapeChange(descs.data(), golden.node.input_count(), &out, 1) == 0,
         name + ": onShapeChange");
  expect(runtime(plugin).enqueue(descs.data(), &out, inputs.data(), outputs, workspace.data(),
                                 nullptr) == 0,
         name + ": enqueue");
  finish();
  copy(result.bytes.data(), output.data(), result.bytes.size());
  return result;
}

void compare(const Tensor& result, const Golden& golden, const std::string& name) {
  double largest = 0;
  size_t where = 0;
  for (size_t i = 0; i < golden.expected.size(); ++i) {
    const double error = std::fabs(element(result, i) - golden.expected[i]);
    if (error <= largest) continue;
    largest = std::isnan(error) ? INFINITY : error;
    where = i;
  }
  std::printf("%s: largest error %.3g, allowed %.3g\n", name.c_str(), largest, golden.tolerance);
  expect(largest <= golden.tolerance,
         name + ": element " + std::to_string(where) + " is off by " + std::to_string(largest));
}

}  // namespace

void check_golden(const std::filesystem::path& folder) {
  const std::string name = folder.filename().string();
  const Golden golden = read_golden(folder);
  const Plugin built = golden.node.create();
  if (!built) return expect(false, name + ": not created: " + logger.take());
  const size_t workspace = check_build(built, golden, name);
  const Plugin loaded = reloaded(built, name);
  const Plugin attached(runtime(loaded).attachToContext(nullptr));
  compare(run(attached, golden, workspace, name), golden, name);
  expect_silence(name);
}

}  // namespace harness
