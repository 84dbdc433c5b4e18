// Checks of shapes that the interfaces to numpy and to __cuda_array_interface__ share; a failed one
// becomes a ValueError with the values in it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace dwattn::python {

using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw pybind11::value_error(text.str());
}

// As Python writes a tuple.
inline std::string shape_text(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t d = 0; d < shape.size(); ++d) text << (d ? ", " : "") << shape[d];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline void check_shape(const char* name, const Shape& got, const Shape& expected) {
  if (got == expected) return;
  fail(name, " must have shape ", shape_text(expected), ", got ", shape_text(got), ".");
}

struct Sizes {
  int64_t height, width, num_prefix;

  int64_t patches() const { return height * width; }
};

inline void check_tokens(const char* name, const Shape& shape, const Sizes& s) {
  if (shape.size() != 3) {
    fail(name, " must have the three dimensions (batch, tokens, channels), got ", shape_text(shape),
         ".");
  }
  if (s.height < 1 || s.width < 1 || s.num_prefix < 0) {
    fail("A patch grid needs height >= 1, width >= 1 and num_prefix >= 0, got height=", s.height,
         ", width=", s.width, ", num_prefix=", s.num_prefix, ".");
  }
  if (shape[1] != s.num_prefix + s.patches()) {
    fail("The sequence has N=", shape[1], " tokens, but num_prefix=", s.num_prefix,
         " and a grid of height=", s.height, " x width=", s.width, " make ",
         s.num_prefix + s.patches(), ".");
  }
}

// A projection's weight (rows, columns); `rows` is the letter of the free size.
inline void check_weight(const char* name, const Shape& shape, const char* rows, int64_t columns) {
  if (shape.size() == 2 && shape[1] == columns) return;
  fail(name, " must have shape (", rows, ", ", columns, "), got ", shape_text(shape), ".");
}

}  // namespace dwattn::python
