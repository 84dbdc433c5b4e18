// The emulation against a machine: fragments of the tensor cores and warp collectives, from their
// published layouts, and kernels that break a rule on purpose. `test_emulation RULE` has to die.
#include <cstring>

#include "harness.h"
#include "kernels/cuda/fragments.cuh"

namespace {

using namespace dwattn::cuda;
using harness::expect;

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// c (16x8) = a (16xK) b (Kx8), with b given as its transpose, loaded like the kernels do; K is the
// depth of a step.
template <class T>
__global__ void multiply_kernel(const T* a, const T* bt, float* c) {
  constexpr int kDepth = 2 * kVector<T>, kStride = 3 * kVector<T>;
  DYN_SHARED(T, shared);
  for (int i = threadIdx.x; i < 24 * 2; i += kWarp) {
    const int row = i / 2, column = i % 2 * kVector<T>;
    const T* const from = row < 16 ? a + row * kDepth : bt + (row - 16) * kDepth;
    cp_async16(shared + row * kStride + column, from + column, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t fa[4], fb[4];
  load_fragments<T>(fa, shared + lane % 16 * kStride + lane / 16 * kVector<T>);
  load_fragments<T>(fb, shared + (16 + lane % 8) * kStride + lane / 8 % 2 * kVector<T>);
  const uint32_t pair[2] = {fb[0], fb[1]};
  float sum[4] = {};
  multiply_step<T>(sum, fa, pair);
  for (int e = 0; e < 4; ++e) {
    c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
  }
}

template <class T>
void check_product() {
  constexpr int kDepth = 2 * kVector<T>;
  const auto a = harness::Tensor<T>::random(1, 16, kDepth),
             bt = harness::Tensor<T>::random(1, 8, kDepth);
  std::vector<float> c(16 * 8);
  launch(multiply_kernel<T>, dim3(1), dim3(kWarp), 24 * 3 * kVector<T> * sizeof(T), nullptr,
         a.data(), bt.data(), c.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += harness::multiplied<T>(a(0, i, k)) * harness::multiplied<T>(bt(0, j, k));
      }
      expect(std::fabs(sum - c[i * 8 + j]) < 1e-5, "a product of fragments");
    }
  }
}

void check_rounding() {
  const float infinity = std::numeric_limits<float>::infinity();
  const float pairs[][2] = {{1 + 0x1p-11f, 1 + 0x1p-10f},   {1 + 0x1p-11f - 0x1p-23f, 1},
                            {-1 - 0x1p-11f, -1 - 0x1p-10f}, {0x1.ffcp3f, 0x1.ffcp3f},
                            {0x1.fffp3f, 0x1p4f},           {0, 0},
                            {0x1.fffffep127f, infinity},    {infinity, infinity}};
  for (const auto& pair : pairs) {
    expect(harness::multiplied<Tf32>(pair[0]) == pair[1], "a number rounded to TF32");
  }
  expect(std::isnan(harness::multiplied<Tf32>(std::nan(""))), "NaN rounded to TF32");
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
  kMisaligned,
  kUnrounded
};
const char* const kRules[] = {"divergent-barrier", "two-barriers",      "early-exit",
                              "half-a-warp",       "mixed-collectives", "unwaited-copy",
                              "misaligned-copy",   "unrounded-tf32"};

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
  if (rule == kUnrounded) {
    float sum[4] = {};
    const uint32_t third = 0x3eaaaaab, a[4] = {third, third, third, third}, b[2] = {third, third};
    mma_1688_tf32(sum, a, b);
  }
}

void break_rule(const char* name) {
  std::vector<__half> from(8);
  for (int rule = 0; rule <= kUnrounded; ++rule) {
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
    check_product<Tf32>();
    check_rounding();
    check_collectives();
  });
}
