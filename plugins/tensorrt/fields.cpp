#include "fields.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dwattn::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct IntegerField {
  const char* name;
  int32_t Fields::* member;
};
constexpr IntegerField kIntegers[] = {{"height", &Fields::height},
                                      {"width", &Fields::width},
                                      {"num_prefix", &Fields::num_prefix},
                                      {"num_heads", &Fields::num_heads}};

struct StringField {
  const char* name;
  std::string Fields::* member;
};
constexpr StringField kStrings[] = {{"inputs", &Fields::inputs}, {"prefix", &Fields::prefix}};

std::string type_text(PluginFieldType type) {
  constexpr const char* kNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32",
                                    "CHAR",    "DIMS",    "UNKNOWN", "BF16", "INT64"};
  const auto index = static_cast<size_t>(type);
  return index < std::size(kNames) ? kNames[index] : "type " + std::to_string(index);
}

[[noreturn]] void refuse_type(const PluginField& field, const char* expected) {
  std::ostringstream text;
  text << "field '" << field.name << "' is " << type_text(field.type) << " of length "
       << field.length << (field.data == nullptr ? " without data" : "") << ", expected "
       << expected;
  throw std::invalid_argument(text.str());
}

int32_t read_integer(const PluginField& field) {
  const bool wide = field.type == PluginFieldType::kINT64;
  if (field.data == nullptr || field.length != 1 ||
      (field.type != PluginFieldType::kINT32 && !wide)) {
    refuse_type(field, "one INT32");
  }
  int64_t value = 0;
  if (wide) {
    std::memcpy(&value, field.data, sizeof value);
  } else {
    int32_t narrow = 0;
    std::memcpy(&narrow, field.data, sizeof narrow);
    value = narrow;
  }
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(std::string("field '") + field.name + "' is " +
                                std::to_string(value) + ", which is no 32-bit integer");
  }
  return static_cast<int32_t>(value);
}

std::string read_string(const PluginField& field) {
  if (field.data == nullptr || field.type != PluginFieldType::kCHAR || field.length < 0) {
    refuse_type(field, "a string (CHAR)");
  }
  std::string text(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
  text.erase(std::find(text.begin(), text.end(), '\0'), text.end());
  return text;
}

[[noreturn]] void refuse_name(const PluginField& field) {
  std::ostringstream text;
  text << "unknown field '" << field.name << "'; fields are";
  for (const StringField& known : kStrings) text << ' ' << known.name;
  for (const IntegerField& known : kIntegers) text << ' ' << known.name;
  throw std::invalid_argument(text.str());
}

void read_field(const PluginField& field, Fields& fields) {
  for (const IntegerField& known : kIntegers) {
    if (std::strcmp(field.name, known.name) == 0) {
      fields.*known.member = read_integer(field);
      return;
    }
  }
  for (const StringField& known : kStrings) {
    if (std::strcmp(field.name, known.name) == 0) {
      fields.*known.member = read_string(field);
      return;
    }
  }
  refuse_name(field);
}

}  // namespace

Fields read_fields(const nvinfer1::PluginFieldCollection& collection) {
  Fields fields;
  std::set<std::string> seen;
  for (int i = 0; i < collection.nbFields; ++i) {
    const PluginField& field = collection.fields[i];
    if (field.name == nullptr) throw std::invalid_argument("a field has no name");
    if (!seen.insert(field.name).second) {
      throw std::invalid_argument(std::string("field '") + field.name + "' is given twice");
    }
    read_field(field, fields);
  }
  return fields;
}

std::vector<PluginField> plugin_fields(const Fields& fields) {
  std::vector<PluginField> list;
  for (const StringField& field : kStrings) {
    const std::string& text = fields.*field.member;
    list.emplace_back(field.name, text.c_str(), PluginFieldType::kCHAR,
                      static_cast<int32_t>(text.size()));
  }
  for (const IntegerField& field : kIntegers) {
    list.emplace_back(field.name, &(fields.*field.member), PluginFieldType::kINT32, 1);
  }
  return list;
}

}  // namespace dwattn::trt
