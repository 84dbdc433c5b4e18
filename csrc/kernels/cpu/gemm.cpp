#include "kernels/cpu/gemm.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

#ifdef DWATTN_HAVE_AMX
#include "kernels/cpu/gemm_amx.h"
#endif
#ifdef DWATTN_HAVE_AVX512_BF16
#include "kernels/cpu/gemm_avx512_bf16.h"
#endif

namespace dwattn::cpu {

bool by_tiles(DType dtype, Isa isa) {
  return dtype == DType::kBFloat16 && (isa == Isa::kAuto ? default_isa() : isa) == Isa::kAmx;
}

bool by_pairs(DType dtype, Isa isa) {
  return dtype == DType::kBFloat16 && (isa == Isa::kAuto ? default_isa() : isa) == Isa::kAvx512Bf16;
}

int64_t rows_of_a_block(const GemmParams& p, int64_t tile, int64_t weight_bytes, int64_t threads) {
  constexpr int64_t kCached = 1 << 20, kFew = 4, kMany = 48, kEnough = 4;
  const int64_t most = weight_bytes <= kCached ? kFew : kMany, tiles = (p.m + tile - 1) / tile;
  int64_t blocks = (tiles + most - 1) / most;
  if (threads < 1) threads = 1;
  while (p.batch * blocks % threads != 0 && p.batch * blocks < kEnough * threads) ++blocks;
  return tile * ((tiles + blocks - 1) / blocks);
}

bool pack_in_passing(int64_t rows, Isa isa) {
  // Measured at 196 to 576 rows with AVX2. With AVX-512, at 196 and 256, it changes nothing.
  constexpr int64_t kFewRows = 272;
  return rows <= kFewRows && (isa == Isa::kAuto ? default_isa() : isa) == Isa::kAvx2;
}

int64_t packed_weight_bytes(const WeightParams& p, Isa isa) {
  if (by_tiles(p.dtype, isa)) return 0;
#ifdef DWATTN_HAVE_AVX512_BF16
  if (by_pairs(p.dtype, isa)) return pairs::packed_weight_bytes(p);
#endif
  const int64_t columns = (p.n + kColumnPad - 1) / kColumnPad * kColumnPad;
  return columns * p.k * (p.dtype == DType::kFloat64 ? 8 : 4);
}

Status pack_weight(const WeightParams& p, const ParallelFor& parallel, Isa isa) {
  if (p.n < 0 || p.k < 0) return Status::kInvalidArgument;
  if (p.n == 0 || p.k == 0 || p.in_passing) return Status::kOk;
  if (p.weight == nullptr) return Status::kInvalidArgument;
  if (by_tiles(p.dtype, isa)) return isa_usable(Isa::kAmx) ? Status::kOk : Status::kUnsupportedIsa;
  if (p.packed == nullptr) return Status::kInvalidArgument;
#ifdef DWATTN_HAVE_AVX512_BF16
  if (by_pairs(p.dtype, isa)) {
    if (!isa_usable(Isa::kAvx512Bf16)) return Status::kUnsupportedIsa;
    return pairs::pack_weight(p, parallel);
  }
#endif
  DWATTN_DISPATCH_ISA(isa, pack_weight(p, parallel));
}

int64_t gemm_workspace(const GemmParams& p, [[maybe_unused]] int64_t threads,
                       [[maybe_unused]] Isa isa) {
#ifdef DWATTN_HAVE_AMX
  if (by_tiles(p.a_dtype, isa)) return amx::gemm_workspace(p, threads);
#endif
#ifdef DWATTN_HAVE_AVX512_BF16
  if (by_pairs(p.a_dtype, isa)) return pairs::gemm_workspace(p);
#endif
  const bool widened = p.a_dtype == DType::kFloat16 || p.a_dtype == DType::kBFloat16;
  return widened ? p.batch * p.m * spaced_row(p.k, 4) * 4 : 0;
}

Status gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel, Isa isa) {
  if (p.batch < 0 || p.m < 0 || p.n < 0 || p.k < 0) return Status::kInvalidArgument;
  if (p.batch == 0 || p.m == 0 || p.n == 0) return Status::kOk;
  if (p.out == nullptr || p.weight == nullptr || p.weight->n != p.n || p.weight->k != p.k) {
    return Status::kInvalidArgument;
  }
  if (workspace == nullptr && gemm_workspace(p, parallel.threads, isa) > 0) {
    return Status::kInvalidArgument;
  }
#ifdef DWATTN_HAVE_AMX
  if (by_tiles(p.a_dtype, isa)) {
    if (!isa_usable(Isa::kAmx)) return Status::kUnsupportedIsa;
    if (p.out_dtype != p.a_dtype || p.weight->dtype != p.a_dtype) return Status::kUnsupportedDType;
    if (p.k > 0 && (p.a == nullptr || p.weight->weight == nullptr)) return Status::kInvalidArgument;
    return amx::gemm(p, workspace, parallel);
  }
#endif
  if (p.k > 0 && (p.a == nullptr || p.weight->packed == nullptr)) return Status::kInvalidArgument;
#ifdef DWATTN_HAVE_AVX512_BF16
  if (by_pairs(p.a_dtype, isa) || by_pairs(p.weight->dtype, isa)) {
    if (!isa_usable(Isa::kAvx512Bf16)) return Status::kUnsupportedIsa;
    if (p.out_dtype != DType::kBFloat16 || p.a_dtype != p.out_dtype ||
        p.weight->dtype != p.out_dtype) {
      return Status::kUnsupportedDType;
    }
    return pairs::gemm(p, workspace, parallel);
  }
#endif
  DWATTN_DISPATCH_ISA(isa, gemm(p, workspace, parallel));
}

}  // namespace dwattn::cpu
