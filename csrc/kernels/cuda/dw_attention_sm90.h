// dw_attention by Hopper's warpgroup products and tensor copies. Host interface.
#pragma once

#include "kernels/cuda/dw_attention.h"

namespace dwattn::cuda {

// Whether DWATTN_CUDA_HOPPER=1 asks for it. It is off by default: no GPU has run it yet.
bool hopper_wanted();

// Whether this build has it: it needs the architecture 90a.
bool hopper_built();

// The same result as dw_attention with ctx given, for fp16 and bf16 on compute capability 9.0.
// kUnsupportedIsa, with nothing launched, where it does not apply: another device or dtype, a build
// without sm_90a, rows that are not 16-byte aligned, odd C, no features, images wider than 95.
Status dw_attention_sm90(const DwAttentionParams& params, const float* ctx, Stream stream);

}  // namespace dwattn::cuda
