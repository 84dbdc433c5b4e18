// Nodes that the checks start from.
#pragma once

#include <cstdint>

#include "node.h"

namespace harness {

constexpr int64_t kBatch = 2, kHeight = 3, kWidth = 4, kPrefix = 2, kDim = 16, kChannels = 8,
                  kPrefixChannels = 12, kDimOut = 24, kHeads = 3;
constexpr int64_t kTokens = kPrefix + kHeight * kWidth;

enum class Prefix { kDrop, kExact, kStatic };
enum class Grid { kFields, kInput };

// A node with every input that it may have. Prefix rows have values and an output projection of
// their own, of kPrefixChannels.
Node full_node(Prefix prefix, Grid grid, nvinfer1::DataType type = nvinfer1::DataType::kFLOAT,
               const char* plugin = "DWAttention");

// With no other inputs than a node cannot be without.
Node least_node(Prefix prefix);

}  // namespace harness
