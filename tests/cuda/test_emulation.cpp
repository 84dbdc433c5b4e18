// The emulation against a machine: fragments of the tensor cores and warp collectives, from their
// published layouts, and kernels that break a rule on purpose. `test_emulation RULE` has to die.
#include <cstring>

#include "harness.h"

namespace {

using namespace dwattn::cuda;
using harness::expect;

// c (16x8) = a (16x16) b (16x8), with b given as its transpose, loaded like the kernels do.
template <class T>
__global__ void multiply_kernel(const T* a, const T* bt, float* c) {
  DYN_SHARED(T, shared);
  for (int i = threadIdx.x; i < 24 * 2; i += kWarp) {
    const int row = i / 2, column = i % 2 * 8;
    const T* const from = row < 16 ? a + row * 16 : bt + (row - 16) * 16;
    cp_async16(shared + row * 24 + column, from + column, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared + lane % 16 * 24 + lane / 16 * 8);
  ldmatrix_x4(fb, shared + (16 + lane % 8) * 24 + lane / 8 % 2 * 8);
  const uint32_t pair[2] = {fb[0], fb[1]};
  float sum[4] = {};
  mma_16816<T>(sum, fa, pair);
  for (int e = 0; e < 4; ++e) {
    c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
  }
}

template <class T>
void check_product() {
  const auto a = harness::Tensor<T>::random(1, 16, 16), bt = harness::Tensor<T>::random(1, 8, 16);
  std::vector<float> c(16 * 8);
  launch(multiply_kernel<T>, dim3(1), dim3(kWarp), 24 * 24 * sizeof(T), nullptr, a.data(),
         bt.data(), c.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += a(0, i, k) * bt(0, j, k);
      expect(std::fabs(sum - c[i * 8 + j]) < 1e-5, "a product of fragments");
    }
  }
}

__global__ void collectives_kernel(float* out) {
  const int lane = threadIdx.x % kWarp;
  const float value = static_cast<float>(lane * lane);
  out[threadIdx.x] = warp_sum(value) + warp_max(value);
  DYN_SHARED(__half, shared);
  for (int i = lane; i < 8 * 32; i += kWarp) shared[i] = from_float<__half>(static_cast<float>(i));
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4_trans(r, shared + lane % 8 * 32 + lane / 8 * 8);
  // Matrix i holds columns 8i .. 8i + 7; transposed, this lane has rows 2 (lane % 4) and the next.
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<__half>(r[i]);
    const float first = static_cast<float>(lane % 4 * 2 * 32 + i * 8 + lane / 4);
    if (pair.x != first || pair.y != first + 32) out[threadIdx.x] = -1;
  }
}

void check_collectives() {
  std::vector<float> out(kWarp);
  launch(collectives_kernel, dim3(1), dim3(kWarp), 8 * 32 * 2, nullptr, out.data());
  for (float v : out) expect(v == 10416 + 961, "sums, maxima and transposed fragments of a warp");
}

enum Rule {
  kDivergentBarrier,
  kTwoBarriers,
  kEarlyExit,
  kHalfAWarp,
  kMixed,
  kUnwaited,
  kMisaligned
};
const char* const kRules[] = {"divergent-barrier", "two-barriers",  "early-exit",     "half-a-warp",
                              "mixed-collectives", "unwaited-copy", "misaligned-copy"};

__global__ void broken_kernel(int rule, const __half* from) {
  DYN_SHARED(__half, shared);
  const int thread = threadIdx.x;
  if (rule == kDivergentBarrier && thread < 32) __syncthreads();
  if (rule == kTwoBarriers) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (rule == kEarlyExit) {
    if (thread == 3) return;
    __syncthreads();
  }
  if (rule == kHalfAWarp && thread % 32 < 16) warp_sum(1.0f);
  if (rule == kMixed) {
    if (thread % 2) {
      __syncwarp();
    } else {
      warp_sum(1.0f);
    }
  }
  if (rule == kUnwaited) {
    cp_async16(shared + thread * 8, from, true);
    cp_async_commit();
  }
  if (rule == kMisaligned) cp_async16(shared + thread * 8 + 4, from, true);
}

void break_rule(const char* name) {
  std::vector<__half> from(8);
  for (int rule = 0; rule <= kMisaligned; ++rule) {
    if (std::strcmp(name, kRules[rule]) == 0) {
      launch(broken_kernel, dim3(1), dim3(64), 64 * 16 + 16, nullptr, rule, from.data());
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    break_rule(arguments[1]);
    return 0;
  }
  return harness::run_schedules([] {
    check_product<__half>();
    check_product<__nv_bfloat16>();
    check_collectives();
  });
}
