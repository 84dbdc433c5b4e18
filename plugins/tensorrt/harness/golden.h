// Layers with saved inputs and results, run through the plugin as an engine would run it.
#pragma once

#include <filesystem>

namespace harness {

// `folder` holds case.txt and, for every tensor, NAME.bin; expected.bin is float64.
//   plugin NAME
//   field NAME VALUE
//   input NAME DTYPE SIZE...         float32, float16 or bfloat16
//   output DTYPE SIZE...
//   tolerance MAXIMUM_ABSOLUTE_ERROR
void check_golden(const std::filesystem::path& folder);

}  // namespace harness
