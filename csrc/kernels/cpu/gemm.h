// A plain blocked matrix product, for callers without a BLAS (the numpy interface).
#pragma once

#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"
#include "kernels/params.h"

namespace dwattn::cpu {

// c (m, n) = a (m, k) * b (n, k)^T, row-major, leading dimensions in elements; fp32 or fp64.
struct GemmParams {
  DType dtype;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  void* c;
  int64_t ldc;
  int64_t m, n, k;
};

Status gemm_nt(const GemmParams& params, const ParallelFor& parallel, Isa isa = Isa::kAuto);

#define DWATTN_DECLARE_ISA(ISA)                                          \
  namespace ISA {                                                        \
  Status gemm_nt(const GemmParams& params, const ParallelFor& parallel); \
  }
DWATTN_DECLARE_ISA(generic)
DWATTN_DECLARE_ISA(avx2)
DWATTN_DECLARE_ISA(avx512)
#undef DWATTN_DECLARE_ISA

}  // namespace dwattn::cpu
