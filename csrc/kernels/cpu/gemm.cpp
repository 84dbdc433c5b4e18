#include "kernels/cpu/gemm.h"

#include "kernels/cpu/dispatch.h"

namespace dwattn::cpu {

int64_t packed_weight_bytes(const WeightParams& p) {
  const int64_t columns = (p.n + kColumnPad - 1) / kColumnPad * kColumnPad;
  return columns * p.k * (p.dtype == DType::kFloat64 ? 8 : 4);
}

Status pack_weight(const WeightParams& p, const ParallelFor& parallel, Isa isa) {
  if (p.n < 0 || p.k < 0) return Status::kInvalidArgument;
  if (p.n == 0 || p.k == 0) return Status::kOk;
  if (p.weight == nullptr || p.packed == nullptr) return Status::kInvalidArgument;
  DWATTN_DISPATCH_ISA(isa, pack_weight(p, parallel));
}

int64_t gemm_workspace(const GemmParams& p) {
  const bool widened = p.a_dtype == DType::kFloat16 || p.a_dtype == DType::kBFloat16;
  return widened ? p.batch * p.m * widened_stride(p.k) * 4 : 0;
}

Status gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel, Isa isa) {
  if (p.batch < 0 || p.m < 0 || p.n < 0 || p.k < 0) return Status::kInvalidArgument;
  if (p.batch == 0 || p.m == 0 || p.n == 0) return Status::kOk;
  if (p.out == nullptr || (p.k > 0 && (p.a == nullptr || p.packed == nullptr))) {
    return Status::kInvalidArgument;
  }
  if (workspace == nullptr && gemm_workspace(p) > 0) return Status::kInvalidArgument;
  DWATTN_DISPATCH_ISA(isa, gemm(p, workspace, parallel));
}

}  // namespace dwattn::cpu
