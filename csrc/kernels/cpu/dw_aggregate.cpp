#include "kernels/cpu/dw_aggregate.h"

#include "kernels/cpu/dispatch.h"

namespace dwattn::cpu {
namespace {

bool valid(const DwAggregateParams& p) {
  return p.batch >= 0 && p.height >= 1 && p.width >= 1 && p.num_prefix >= 0 && p.channels >= 0 &&
         p.kernel != nullptr && p.v != nullptr && p.y != nullptr;
}

}  // namespace

int64_t dw_aggregate_workspace(const DwAggregateParams& p) {
  const int64_t accumulator = p.v_dtype == DType::kFloat64 ? 8 : 4;
  return (9 + p.batch) * padded_channels(p.channels) * accumulator;  // packed kernel, ctx
}

Status dw_aggregate(const DwAggregateParams& params, void* workspace, const ParallelFor& parallel,
                    Isa isa) {
  if (params.batch == 0 || params.channels == 0) return Status::kOk;
  if (!valid(params) || workspace == nullptr) return Status::kInvalidArgument;
  DWATTN_DISPATCH_ISA(isa, dw_aggregate(params, workspace, parallel));
}

}  // namespace dwattn::cpu
