#include "kernels/cpu/gemm.h"

namespace dwattn::cpu {

Status gemm_nt(const GemmParams& params, const ParallelFor& parallel, Isa isa) {
  if (params.m < 0 || params.n < 0 || params.k < 0) return Status::kInvalidArgument;
  if (params.m == 0 || params.n == 0) return Status::kOk;
  if (isa == Isa::kAuto) isa = default_isa();
  if (!isa_usable(isa)) return Status::kUnsupportedIsa;
  switch (isa) {
#ifdef DWATTN_HAVE_AVX512
    case Isa::kAvx512:
      return avx512::gemm_nt(params, parallel);
#endif
#ifdef DWATTN_HAVE_AVX2
    case Isa::kAvx2:
      return avx2::gemm_nt(params, parallel);
#endif
    default:
      return generic::gemm_nt(params, parallel);
  }
}

}  // namespace dwattn::cpu
