// Depthwise 3x3 aggregation with context on the CPU. See ../params.h for the definition.
#pragma once

#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"
#include "kernels/params.h"

namespace dwattn::cpu {

// Bytes of scratch memory that dw_aggregate needs for these sizes.
int64_t dw_aggregate_workspace(const DwAggregateParams& params);

// Rows of the grid by which `y` lies in front of `v` where it is written over it: a block of four
// rows needs the row above it, but of that none of the columns that it has passed.
constexpr int64_t kRowsInFront = 4;

// The result does not depend on how `parallel` splits the work. `y` overlaps `v` nowhere, or has
// its stride between tokens, each of its images begins a whole number of tokens, at least
// kRowsInFront rows, in front of the patches in `v`, and the loop has one thread.
Status dw_aggregate(const DwAggregateParams& params, void* workspace, const ParallelFor& parallel,
                    Isa isa = Isa::kAuto);

// Channels are padded to this many accumulators in the workspace, a multiple of every vector width.
constexpr int64_t kChannelPad = 16;
constexpr int64_t padded_channels(int64_t channels) {
  return (channels + kChannelPad - 1) / kChannelPad * kChannelPad;
}

// One implementation per instruction set, each in its own translation unit.
#define DWATTN_DECLARE_ISA(ISA)                                         \
  namespace ISA {                                                       \
  Status dw_aggregate(const DwAggregateParams& params, void* workspace, \
                      const ParallelFor& parallel);                     \
  }
DWATTN_DECLARE_ISA(generic)
DWATTN_DECLARE_ISA(avx2)
DWATTN_DECLARE_ISA(avx512)
#undef DWATTN_DECLARE_ISA

}  // namespace dwattn::cpu
