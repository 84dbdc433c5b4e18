#include "kernels/cpu/prefix_rows.h"

#include "kernels/cpu/dispatch.h"

namespace dwattn::cpu {

int64_t prefix_rows_workspace(const PrefixRowsParams& p) {
  return PrefixRowsMemory(p).end * (p.dtype == DType::kFloat64 ? 8 : 4);
}

Status prefix_rows(const PrefixRowsParams& p, void* workspace, const ParallelFor& parallel,
                   Isa isa) {
  if (p.batch == 0 || p.num_prefix == 0 || p.dim_out == 0) return Status::kOk;
  if (p.batch < 0 || p.num_prefix < 0 || p.tokens < p.num_prefix || p.dim < 0 || p.heads < 1 ||
      p.head_dim < 1 || p.dim_out < 0 || workspace == nullptr) {
    return Status::kInvalidArgument;
  }
  DWATTN_DISPATCH_ISA(isa, prefix_rows(p, workspace, parallel));
}

}  // namespace dwattn::cpu
