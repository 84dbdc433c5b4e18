// From the function that callers see to its implementation for one instruction set.
#pragma once

#include "kernels/cpu/features.h"
#include "kernels/params.h"

#ifdef DWATTN_HAVE_AVX512
#define DWATTN_CASE_AVX512(CALL) \
  case Isa::kAmx:                \
  case Isa::kAvx512Bf16:         \
  case Isa::kAvx512:             \
    return avx512::CALL;
#else
#define DWATTN_CASE_AVX512(CALL)
#endif

#ifdef DWATTN_HAVE_AVX2
#define DWATTN_CASE_AVX2(CALL) \
  case Isa::kAvx2:             \
    return avx2::CALL;
#else
#define DWATTN_CASE_AVX2(CALL)
#endif

// Ends the calling function with the status of CALL for `isa`.
#define DWATTN_DISPATCH_ISA(isa, CALL)                    \
  do {                                                    \
    if ((isa) == Isa::kAuto) (isa) = default_isa();       \
    if (!isa_usable(isa)) return Status::kUnsupportedIsa; \
    switch (isa) {                                        \
      DWATTN_CASE_AVX512(CALL)                            \
      DWATTN_CASE_AVX2(CALL)                              \
      default:                                            \
        return generic::CALL;                             \
    }                                                     \
  } while (false)
