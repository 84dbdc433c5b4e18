// What Hopper (sm_90a) adds to device.cuh: tensor copies that report to barriers in shared memory,
// and products of warpgroups that read their operands from there. Besides device.cuh the only file
// with PTX. As there, every wrapper has a second body for the CPU emulation
// (tests/cuda/simt_hopper.h).
//
// The instructions exist on sm_90a only. A kernel that uses them has a body only where kHopper is
// true; on other architectures it must never be launched.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/tensor_map.h"

#ifdef DWATTN_SIMT_HOST
#include "simt_hopper.h"
#endif

namespace dwattn::cuda {

#if defined(DWATTN_SIMT_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// Ends the kernel with an error.
DWATTN_DEVICE void stop() {
#ifdef __CUDA_ARCH__
  __trap();
#endif
}

// Address in the shared window, as descriptors and swizzling see it.
DWATTN_DEVICE uint32_t shared_address(const void* shared) {
#ifdef DWATTN_SIMT_HOST
  return simt::shared_address(shared);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#endif
}

// ---- Barriers in shared memory

// A phase ends when `count` arrivals and all announced bytes have come. Phases alternate in parity,
// beginning with 0.
class Barrier {
 public:
  // By one thread, followed by publish_barriers and a block barrier.
  DWATTN_DEVICE void init(int count) {
#ifdef DWATTN_SIMT_HOST
    simt::barrier_init(&state_, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count)
                 : "memory");
#endif
  }

  // What this thread did before is seen by those who wait for the end of the phase.
  DWATTN_DEVICE void arrive() {
#ifdef DWATTN_SIMT_HOST
    simt::barrier_arrive(&state_, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#endif
  }

  // Arrives and announces bytes that tensor copies will bring in this phase.
  DWATTN_DEVICE void arrive_expecting(int bytes) {
#ifdef DWATTN_SIMT_HOST
    simt::barrier_arrive(&state_, bytes);
#else
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
#endif
  }

  // Waits for the end of the current or the previous phase, whichever has this parity: on a fresh
  // barrier, parity 1 does not wait.
  DWATTN_DEVICE void wait(unsigned parity) {
#ifdef DWATTN_SIMT_HOST
    simt::barrier_wait(&state_, parity);
#else
    uint32_t ended = 0;
    while (ended == 0) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(ended)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    }
#endif
  }

 private:
  uint64_t state_;
};

// Makes initialised barriers known to the copy engine.
DWATTN_DEVICE void publish_barriers() {
#ifndef DWATTN_SIMT_HOST
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- Tensor copies

// Starts copying the box at (c0, c1, c2) of a tensor to `shared`, whose 16-byte chunks are
// exchanged as `swizzled` says; elements outside the tensor are zero. All bytes of the box are
// reported to `full`. `map` is a __grid_constant__ parameter. By one thread.
DWATTN_DEVICE void copy_box(void* shared, const TensorMap& map, Barrier& full, int c0, int c1,
                            int c2) {
#ifdef DWATTN_SIMT_HOST
  simt::copy_box(shared, map.words, &full, c0, c1, c2);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&full)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

// ---- Products of a warpgroup

// Operands lie in rows of 128 bytes (64 elements of depth), 8 rows together in 1024 aligned bytes.
// Within them the chunk of 16 bytes at address a is stored at a ^ (a / 128 % 8 * 16): copies, this
// descriptor and the product agree on it.
constexpr int kOperandRowBytes = 128;
constexpr int kOperandAlignment = 1024;
constexpr int kProductDepth = 16;
constexpr int kProductColumns = 128;

// Describes an operand that starts at a shared address: bits 0..13 the address, 16..29 the leading
// offset (not used in this layout), 32..45 the distance of groups of 8 rows, all in units of 16
// bytes, and 62..63 the exchange of chunks (1: 128 bytes).
DWATTN_DEVICE uint64_t operand(uint32_t address) {
  constexpr uint64_t kUnit = 16, kGroupBytes = 8 * kOperandRowBytes;
  return uint64_t{1} << 62 | (kGroupBytes / kUnit) << 32 | uint64_t{1} << 16 |
         (address & 0x3FFFF) / kUnit;
}

// To be called before the first product after registers of it were touched.
DWATTN_DEVICE void products_begin() {
#ifdef DWATTN_SIMT_HOST
  simt::products_begin();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

DWATTN_DEVICE void products_commit() {
#ifdef DWATTN_SIMT_HOST
  simt::products_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most N committed groups of products are in flight. Those that have ended have read
// their operands; their sums may be read after products_end only.
template <int N>
DWATTN_DEVICE void products_wait() {
#ifdef DWATTN_SIMT_HOST
  simt::products_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

#define DWATTN_SUMS8(c, i)                                                                      \
  "+f"((c)[i]), "+f"((c)[(i) + 1]), "+f"((c)[(i) + 2]), "+f"((c)[(i) + 3]), "+f"((c)[(i) + 4]), \
      "+f"((c)[(i) + 5]), "+f"((c)[(i) + 6]), "+f"((c)[(i) + 7])
#define DWATTN_SUMS64(c)                                                            \
  DWATTN_SUMS8(c, 0), DWATTN_SUMS8(c, 8), DWATTN_SUMS8(c, 16), DWATTN_SUMS8(c, 24), \
      DWATTN_SUMS8(c, 32), DWATTN_SUMS8(c, 40), DWATTN_SUMS8(c, 48), DWATTN_SUMS8(c, 56)
#define DWATTN_WGMMA(type)                                                                      \
  asm volatile(                                                                                 \
      "{\n"                                                                                     \
      ".reg .pred p;\n"                                                                         \
      "setp.ne.b32 p, %66, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "      \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "   \
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "   \
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n" \
      "}"                                                                                       \
      : DWATTN_SUMS64(c)                                                                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// Waits for all products into c, which holds their sums from here on. c is an operand: to the
// compiler the sums are there as soon as a product was issued, and could be read before any wait.
DWATTN_DEVICE void products_end(float (&c)[64]) {
#ifdef DWATTN_SIMT_HOST
  static_cast<void>(c);
  simt::products_wait(0);
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" : DWATTN_SUMS64(c)::"memory");
#endif
}

// c (64 x 128, fp32) = a (64 x 16) b (128 x 16)^T, plus c if `add`; asynchronous, by the 128
// threads of a warpgroup. With g = lane / 4 and t = lane % 4 a lane of its warp w holds, for
// j < 16, columns 8j + 2t and the next of rows 16w + g (c[4j], c[4j+1]) and 8 below (c[4j+2], ...).
template <class T>
DWATTN_DEVICE void multiply_64x128(float (&c)[64], uint64_t a, uint64_t b, bool add);

template <>
DWATTN_DEVICE void multiply_64x128<__half>(float (&c)[64], uint64_t a, uint64_t b, bool add) {
#ifdef DWATTN_SIMT_HOST
  simt::multiply_async<__half>(c, a, b, add);
#else
  DWATTN_WGMMA("f16");
#endif
}

template <>
DWATTN_DEVICE void multiply_64x128<__nv_bfloat16>(float (&c)[64], uint64_t a, uint64_t b,
                                                  bool add) {
#ifdef DWATTN_SIMT_HOST
  simt::multiply_async<__nv_bfloat16>(c, a, b, add);
#else
  DWATTN_WGMMA("bf16");
#endif
}

#undef DWATTN_WGMMA
#undef DWATTN_SUMS64
#undef DWATTN_SUMS8

}  // namespace dwattn::cuda
