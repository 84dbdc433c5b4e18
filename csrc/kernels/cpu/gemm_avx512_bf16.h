// The products of bf16 by AVX512_BF16; gemm.h chooses them for Isa::kAvx512Bf16.
#pragma once

#include "kernels/cpu/gemm.h"

namespace dwattn::cpu::pairs {

int64_t packed_weight_bytes(const WeightParams& params);
Status pack_weight(const WeightParams& params, const ParallelFor& parallel);
int64_t gemm_workspace(const GemmParams& params);
Status gemm(const GemmParams& params, void* workspace, const ParallelFor& parallel);

}  // namespace dwattn::cpu::pairs
