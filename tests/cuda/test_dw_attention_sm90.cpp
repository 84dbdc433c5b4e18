// The kernel for Hopper, on a model of its barriers, tensor copies and products.
#include "dw_attention_cases.h"
#include "kernels/cuda/dw_attention_sm90.h"

namespace {

using namespace dw_cases;

// The kernel itself, without the way back that dw_attention has.
Status run(const DwAttentionParams& p, void* workspace) {
  float* ctx = static_cast<float*>(workspace);
  if (dwattn::cuda::dw_attention_workspace(p) == 0) {
    ctx = nullptr;
  } else {
    const int64_t floats = (p.batch * p.channels + 3) / 4 * 4;  // as in dw_attention
    const Status status = dwattn::cuda::dw_context(p, ctx, ctx + floats, nullptr);
    if (status != Status::kOk) return status;
  }
  return dwattn::cuda::dw_attention_sm90(p, ctx, nullptr);
}

const Case kCases[] = {
    {1, 5, 7, 1, 64, 128, kEverything, 1},  // one warpgroup of the first tile
    {2, 17, 12, 5, 136, 130, kEverything, 3, kGaps, kGaps, kGaps},  // two tiles, two slices, pieces
    {1, 24, 24, 0, 200, 64, kBias, 1},      // three tiles, a ring that wraps
    {3, 3, 4, 1, 8, 6, kMu | kBeta, 2},     // a block takes several pieces
    {1, 5, 95, 2, 72, 8, kEverything, 64},  // the widest, in bands
    {1, 19, 37, 0, 64, 2, kBias, 1},        // four tiles, the last of one group
    {1, 1, 1, 1, 16, 2, kEverything, 2},
    {2, 3, 5, 1, 33, 6, kBias, 4, {7, 8, 0}, {7, 0, 0}},  // aligned rows of an odd length
};

void check_refusals() {
  const auto refused = [](const Case& c, dwattn::DType dtype, const char* what) {
    alignas(16) static char memory[16];
    DwAttentionParams p{};
    p.dtype = dtype;
    p.x = p.wv = p.y = memory;
    p.batch = c.batch;
    p.height = c.height;
    p.width = c.width;
    p.dim = p.x_stride_token = p.wv_stride = c.dim;
    p.x_stride_batch = c.height * c.width * c.dim;
    p.channels = p.y_stride_token = c.channels;
    p.y_stride_batch = c.height * c.width * c.channels;
    expect(dwattn::cuda::dw_attention_sm90(p, nullptr, nullptr) == Status::kUnsupportedIsa, what);
  };
  refused({1, 2, 2, 0, 8, 2}, dwattn::DType::kFloat32, "fp32 is left to the other kernel");
  refused({1, 2, 96, 0, 8, 2}, dwattn::DType::kFloat16, "wide images are left to the other kernel");
  refused({1, 2, 2, 0, 8, 3}, dwattn::DType::kFloat16, "odd channels are left to the other kernel");
  refused({1, 2, 2, 0, 9, 2}, dwattn::DType::kFloat16, "odd rows are left to the other kernel");
}

// dw_attention takes this kernel when it is asked to, and the other one where it does not apply.
void check_the_switch() {
  const auto both = [](const DwAttentionParams& p, void* workspace) {
    return dwattn::cuda::dw_attention(p, workspace, nullptr);
  };
  setenv("DWATTN_CUDA_HOPPER", "1", 1);
  expect(dwattn::cuda::hopper_wanted(), "DWATTN_CUDA_HOPPER=1 asks for the kernel");
  check<__half>({1, 5, 7, 1, 64, 64}, both);
  check<__half>({1, 5, 7, 1, 64, 65}, both);
  check<float>({1, 5, 7, 1, 64, 64}, both);
  unsetenv("DWATTN_CUDA_HOPPER");
  expect(!dwattn::cuda::hopper_wanted(), "it is off by default");
}

// Of the sizes that the kernel takes.
Case drawn_for_hopper() {
  Case c = drawn_case();
  c.width = std::min<int64_t>(c.width, 95);
  c.dim = std::max<int64_t>(c.dim, 1);
  c.channels += c.channels % 2;
  const auto aligned = [](int64_t length, Layout& layout) {
    layout = {(8 - length % 8) % 8 + 8 * between(0, 2), 8 * between(0, 2), 8 * between(0, 1)};
  };
  aligned(c.dim, c.x);
  aligned(c.dim, c.wv);
  c.y = coin() ? kPacked : kGaps;
  return c;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    return run_drawn(arguments, [](uint32_t which) {
      which % 2 == 0 ? check<__half>(drawn_for_hopper(), run)
                     : check<__nv_bfloat16>(drawn_for_hopper(), run);
    });
  }
  check_refusals();
  check_the_switch();
  return run_schedules([] {
    for (const Case& c : kCases) {
      check<__half>(c, run);
      // The same code as for fp16 but for the conversions: one schedule is enough.
      if (simt::machine.order == simt::Order::kForward) check<__nv_bfloat16>(c, run);
    }
  });
}
