#include "layer.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace dwattn::trt {
namespace {

enum Symbol { kB, kN, kNOut, kD, kDOut, kC, kP, kCp, kThree, kSymbolCount };
constexpr const char* kSymbolNames[] = {"B", "N", "N_out", "D", "D_out", "C", "P", "Cp", "3"};

struct InputSpec {
  const char* name;
  Contents contents;
  int rank;
  Symbol dims[3];
};

// By Role. The grid has any rank from 2 on.
constexpr InputSpec kInputs[] = {
    {"x", Contents::kTensor, 3, {kB, kN, kD}},
    {"residual", Contents::kTensor, 3, {kB, kNOut, kDOut}},
    {"grid", Contents::kNothing, 0, {}},
    {"wv", Contents::kTensor, 2, {kC, kD}},
    {"bv", Contents::kCoefficients, 1, {kC}},
    {"kernel", Contents::kCoefficients, 3, {kC, kThree, kThree}},
    {"kappa", Contents::kCoefficients, 2, {kP, kC}},
    {"mu", Contents::kCoefficients, 1, {kC}},
    {"beta", Contents::kCoefficients, 1, {kC}},
    {"wo", Contents::kTensor, 2, {kDOut, kC}},
    {"bo", Contents::kCoefficients, 1, {kDOut}},
    {"gamma", Contents::kCoefficients, 1, {kDOut}},
    {"query", Contents::kTensor, 2, {kCp, kD}},
    {"query_bias", Contents::kCoefficients, 1, {kCp}},
    {"key", Contents::kTensor, 2, {kCp, kD}},
    {"prefix_value", Contents::kTensor, 2, {kCp, kD}},
    {"prefix_value_bias", Contents::kCoefficients, 1, {kCp}},
    {"prefix_out", Contents::kTensor, 2, {kDOut, kCp}},
    {"prefix_out_bias", Contents::kCoefficients, 1, {kDOut}},
    {"static_a", Contents::kCoefficients, 2, {kP, kCp}},
    {"static_b", Contents::kCoefficients, 2, {kP, kCp}},
};
static_assert(sizeof kInputs / sizeof kInputs[0] == kRoleCount, "one line for each role");

const InputSpec& spec(Role role) { return kInputs[static_cast<int>(role)]; }

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

using Values = std::array<int64_t, kSymbolCount>;  // -1: not known

std::string shape_text(const nvinfer1::Dims& shape) {
  std::ostringstream text;
  text << '(';
  for (int i = 0; i < shape.nbDims; ++i) {
    text << (i > 0 ? ", " : "");
    shape.d[i] < 0 ? text << '?' : text << shape.d[i];
  }
  text << ')';
  return text.str();
}

// "(C, 3, 3) = (64, 3, 3)", with the values that earlier inputs have fixed.
std::string expected_text(const InputSpec& input, const Values& values) {
  nvinfer1::Dims known{};
  known.nbDims = input.rank;
  std::ostringstream text;
  text << '(';
  for (int i = 0; i < input.rank; ++i) {
    text << (i > 0 ? ", " : "") << kSymbolNames[input.dims[i]];
    known.d[i] = values[input.dims[i]];
  }
  text << ") = " << shape_text(known);
  return text.str();
}

// Compares a shape with what is known, and learns from it.
void match(const InputSpec& input, const nvinfer1::Dims& shape, Values& values) {
  const Values before = values;
  bool fits = shape.nbDims == input.rank;
  for (int i = 0; fits && i < input.rank; ++i) {
    int64_t& value = values[input.dims[i]];
    if (value < 0) value = shape.d[i];
    fits = shape.d[i] < 0 || shape.d[i] == value;
  }
  if (!fits) {
    refuse("input '", input.name, "' has the shape ", shape_text(shape), ", expected ",
           expected_text(input, before));
  }
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) found.push_back(word);
  return found;
}

Role role_of(const std::string& name) {
  const auto found = std::find_if(std::begin(kInputs), std::end(kInputs),
                                  [&](const InputSpec& input) { return name == input.name; });
  if (found == std::end(kInputs)) {
    std::ostringstream names;
    for (const InputSpec& input : kInputs) names << ' ' << input.name;
    refuse("field 'inputs' names '", name,
           "', which is no input; inputs are, in this order:", names.str());
  }
  return static_cast<Role>(found - std::begin(kInputs));
}

cuda::PrefixRows prefix_of(const std::string& name) {
  if (name == "drop") return cuda::PrefixRows::kNone;
  if (name == "exact") return cuda::PrefixRows::kExact;
  if (name == "static") return cuda::PrefixRows::kStatic;
  refuse("field 'prefix' is '", name, "', expected 'drop', 'exact' or 'static'");
}

}  // namespace

const char* role_name(Role role) { return spec(role).name; }
Contents contents(Role role) { return spec(role).contents; }

Layer::Layer(bool narrow, Fields fields)
    : narrow_(narrow), fields_(std::move(fields)), prefix_(prefix_of(fields_.prefix)) {
  read_inputs();
  check_inputs();
  check_grid();
  check_prefix();
}

void Layer::read_inputs() {
  index_.fill(-1);
  for (const std::string& name : words(fields_.inputs)) {
    const Role role = role_of(name);
    if (!roles_.empty() && role <= roles_.back()) {
      refuse("field 'inputs' is '", fields_.inputs, "': '", name, "' must come before '",
             role_name(roles_.back()), "', and every input at most once");
    }
    index_[static_cast<int>(role)] = input_count();
    roles_.push_back(role);
  }
}

void Layer::check_grid() const {
  const Fields& f = fields_;
  const auto values = [&] {
    std::ostringstream text;
    text << "height=" << f.height << ", width=" << f.width;
    return text.str();
  };
  if (f.num_prefix < 0) refuse("field 'num_prefix' is ", f.num_prefix, ", expected 0 or more");
  const bool given = f.height >= 1 && f.width >= 1, absent = f.height == 0 && f.width == 0;
  if (!given && !absent) {
    refuse(values(), ": expected the grid of patches, or 0 for both and the input 'grid'");
  }
  if (absent && !has(Role::kGrid)) {
    refuse(values(), " reads the grid from the input 'grid', which field 'inputs' does not name ('",
           f.inputs, "')");
  }
  if (given && has(Role::kGrid)) {
    refuse(values(), " and the input 'grid' exclude each other: set both fields to 0");
  }
}

void Layer::check_inputs() const {
  for (Role needed : {Role::kX, Role::kWv, Role::kKernel, Role::kWo}) {
    if (!has(needed)) {
      refuse("field 'inputs' is '", fields_.inputs, "': '", role_name(needed), "' is missing");
    }
  }
  if (has(Role::kKappa) && fields_.num_prefix == 0) {
    refuse("input 'kappa' holds weights of prefix tokens, but num_prefix=0");
  }
  constexpr std::pair<Role, Role> kNeeds[] = {{Role::kPrefixValueBias, Role::kPrefixValue},
                                              {Role::kPrefixOutBias, Role::kPrefixOut},
                                              {Role::kQueryBias, Role::kQuery}};
  for (const auto& [option, base] : kNeeds) {
    if (has(option) && !has(base)) {
      refuse("input '", role_name(option), "' needs the input '", role_name(base), "'");
    }
  }
}

void Layer::check_prefix() const {
  const bool exact = prefix_ == cuda::PrefixRows::kExact;
  const bool fixed = prefix_ == cuda::PrefixRows::kStatic;
  if ((exact || fixed) && fields_.num_prefix == 0) {
    refuse("prefix='", fields_.prefix, "' needs prefix tokens, but num_prefix=0; use 'drop'");
  }
  if (exact ? fields_.num_heads < 1 : fields_.num_heads != 0) {
    refuse("num_heads=", fields_.num_heads, " with prefix='", fields_.prefix, "': expected ",
           exact ? "the heads of the prefix queries" : "0, heads are those of exact prefix rows");
  }
  const auto only_for = [&](Role role, bool wanted, bool needed) {
    if (has(role) && !wanted) {
      refuse("input '", role_name(role), "' has no use with prefix='", fields_.prefix, "'");
    }
    if (needed && !has(role)) {
      refuse("prefix='", fields_.prefix, "' needs the input '", role_name(role),
             "', which field 'inputs' does not name ('", fields_.inputs, "')");
    }
  };
  only_for(Role::kQuery, exact, exact);
  only_for(Role::kKey, exact, exact);
  only_for(Role::kPrefixValue, exact || fixed, false);
  only_for(Role::kPrefixOut, exact || fixed, false);
  only_for(Role::kStaticA, fixed, fixed);
  only_for(Role::kStaticB, fixed, fixed);
}

int64_t Layer::output_prefix() const {
  return prefix_ == cuda::PrefixRows::kNone ? 0 : fields_.num_prefix;
}

void Layer::check_input_count(int count) const {
  if (count == input_count()) return;
  refuse("the node has ", count, " inputs, but field 'inputs' names ", input_count(), ": '",
         fields_.inputs, "'");
}

Sizes Layer::sizes(const Shapes& shapes) const {
  Values values;
  values.fill(-1);
  values[kP] = fields_.num_prefix;
  values[kThree] = 3;
  int64_t height = fields_.height, width = fields_.width;
  if (dynamic_grid()) {
    const nvinfer1::Dims& grid = shapes[index(Role::kGrid)];
    if (grid.nbDims < 2) {
      refuse("input 'grid' has the shape ", shape_text(grid), ", expected (..., height, width)");
    }
    height = grid.d[grid.nbDims - 2];
    width = grid.d[grid.nbDims - 1];
  }

  match(spec(Role::kX), shapes[0], values);
  const int64_t prefix = fields_.num_prefix;
  if (height >= 0 && width >= 0) {
    const int64_t tokens = prefix + height * width;
    if (values[kN] >= 0 && values[kN] != tokens) {
      refuse("x has ", values[kN], " tokens, but num_prefix + height * width = ", prefix, " + ",
             height, " * ", width, " = ", tokens,
             "; export the model for the size that it runs at");
    }
    values[kN] = tokens;
  }
  if (values[kN] >= 0) values[kNOut] = values[kN] - prefix + output_prefix();

  for (int i = 1; i < input_count(); ++i) {
    if (role(i) == Role::kGrid) continue;
    match(spec(role(i)), shapes[i], values);
    if (role(i) == Role::kWv && !has(Role::kPrefixValue)) values[kCp] = values[kC];
  }
  const int64_t c = values[kC], cp = values[kCp], heads = fields_.num_heads;
  if (output_prefix() > 0 && !has(Role::kPrefixOut) && c >= 0 && cp >= 0 && c != cp) {
    refuse("prefix rows have Cp = ", cp, " channels, which 'wo' with C = ", c,
           " cannot take; give the input 'prefix_out'");
  }
  if (heads > 0 && cp >= 0 && cp % heads != 0) {
    refuse("num_heads=", heads, " does not divide the Cp = ", cp, " channels of prefix rows");
  }
  return {values[kB], values[kN], height, width, values[kD], values[kDOut], c, cp};
}

}  // namespace dwattn::trt
