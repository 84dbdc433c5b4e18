// The fused kernel and its context on awkward shapes, against an fp64 loop.
#include "dw_attention_cases.h"

namespace {

using namespace dw_cases;

const Case kCases[] = {
    {2, 5, 7, 1, 64, 64},                                       // one partial tile
    {1, 7, 5, 5, 40, 72, kEverything, 4, kGaps, kGaps, kGaps},  // partial stages and slices
    {3, 1, 37, 0, 32, 16, kBias | kMu},                         // a single row
    {1, 37, 1, 5, 32, 24, kKappa | kBias},                      // a single column
    {1, 13, 11, 2, 96, 130, kEverything, 1},                    // two tiles, three slices
    {1, 24, 17, 0, 40, 64, kBias, 1},                           // four tiles in one band
    {1, 17, 24, 1, 40, 64, kBias | kBeta, 40},                  // many bands
    {5, 3, 4, 1, 8, 8, kMu | kBeta},  // images do not fill a group of four
    {1, 3, 113, 0, 16, 8, kBias, 4},  // rectangles beside each other
    {1, 5, 230, 1, 8, 2, kEverything, 64, kGaps, kGaps, kGaps},
    {2, 6, 5, 1, 33, 65, kEverything, 4, kOdd, kOdd, kOdd},  // element by element
    {1, 11, 13, 5, 7, 3, kEverything, 1, kOdd, kPacked, kGaps},
    {2, 3, 5, 1, 33, 6, kBias, 4, {7, 8, 0}, {7, 0, 0}},  // aligned rows of an odd length
    {1, 4, 3, 0, 1, 1, kNothing},
    {1, 1, 1, 1, 8, 2, kEverything},
    {2, 3, 2, 1, 0, 4, kEverything},  // no features: V is its bias
};

Status run(const DwAttentionParams& p, void* workspace) {
  return dwattn::cuda::dw_attention(p, workspace, nullptr);
}

void check_refusals() {
  DwAttentionParams p{};
  p.batch = p.height = p.width = p.channels = p.dim = 1;
  expect(dwattn::cuda::dw_attention(p, nullptr, nullptr) == Status::kInvalidArgument,
         "null pointers are refused");
  const float one = 1;
  float y = 0;
  p.x = p.wv = p.kernel = &one;
  p.y = &y;
  p.dtype = dwattn::DType::kFloat64;
  expect(dwattn::cuda::dw_attention(p, nullptr, nullptr) == Status::kUnsupportedDType,
         "fp64 is refused");
  p.dtype = dwattn::DType::kFloat32;
  p.beta = &one;
  expect(dwattn::cuda::dw_attention(p, nullptr, nullptr) == Status::kInvalidArgument,
         "a missing workspace is refused");
  p.batch = 0;
  expect(dwattn::cuda::dw_attention(p, nullptr, nullptr) == Status::kOk, "no images are fine");
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return run_drawn(arguments, [](uint32_t which) {
      check_typed(which, [](auto element) { check<decltype(element)>(drawn_case(), run); });
    });
  }
  check_refusals();
  return run_schedules([] {
    for (const Case& c : kCases) {
      check<float>(c, run);
      check<__half>(c, run);
      // The same code as for fp16 but for the conversions: one schedule is enough.
      if (simt::machine.order != simt::Order::kForward) continue;
      check<__nv_bfloat16>(c, run);
      check<dwattn::cuda::Tf32>(c, run);
    }
  });
}
