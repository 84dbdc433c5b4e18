// The products of bf16 by AMX tiles; gemm.h chooses them for Isa::kAmx.
#pragma once

#include "kernels/cpu/gemm.h"

namespace dwattn::cpu::amx {

int64_t gemm_workspace(const GemmParams& params, int64_t threads);
Status gemm(const GemmParams& params, void* workspace, const ParallelFor& parallel);

}  // namespace dwattn::cpu::amx
