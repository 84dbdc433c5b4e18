// What the kernels need from the machine: asynchronous copies, matrix fragments, tensor-core
// products, warp reductions, conversions and launches. The only file with PTX.
//
// Every wrapper has two bodies: one for the GPU, and one for a CPU emulation (DWATTN_SIMT_HOST, see
// tests/cuda/simt_host.h), under which the very same kernels run with address sanitizers.
// For the emulation to see everything, kernels take shared memory only through DYN_SHARED and use
// the warp collectives below with all 32 lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/params.h"

#ifdef DWATTN_SIMT_HOST
#include "simt_host.h"
#else
#include <cuda_runtime.h>

#include "kernels/failure.h"
#endif

// `T* const name`: the block's dynamic shared memory, 128-byte aligned, with undefined contents.
#ifdef DWATTN_SIMT_HOST
#define DYN_SHARED(T, name) T* const name = reinterpret_cast<T*>(::simt::machine.shared)
#else
#define DYN_SHARED(T, name)                                            \
  extern __shared__ __align__(128) unsigned char dwattn_dyn_shared_[]; \
  T* const name = reinterpret_cast<T*>(dwattn_dyn_shared_)
#endif

#define DWATTN_DEVICE __device__ __forceinline__

namespace dwattn::cuda {

constexpr int kWarp = 32;

// ---- Asynchronous copies from global to shared memory

// 16 bytes to `shared`, which are zero unless `valid`; then `global` is not read.
DWATTN_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
#ifdef DWATTN_SIMT_HOST
  simt::copy_async(shared, global, 16, valid);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#endif
}

DWATTN_DEVICE void cp_async_commit() {
#ifdef DWATTN_SIMT_HOST
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups are in flight; for other threads add a barrier.
template <int N>
DWATTN_DEVICE void cp_async_wait() {
#ifdef DWATTN_SIMT_HOST
  simt::wait_copies(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- Matrix fragments (warp collectives)

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
// (16-byte aligned) and receives elements (l / 4, 2 * (l % 4)) and the next of matrix i in r[i].
DWATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef DWATTN_SIMT_HOST
  simt::load_matrices(r, row, false);
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
#endif
}

// The same with every matrix transposed on the way.
DWATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef DWATTN_SIMT_HOST
  simt::load_matrices(r, row, true);
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
#endif
}

// c (16x8, fp32) += a (16x16) b (16x8). With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns 2t, 2t + 1 (a[0], a[1]) and those + 8
//   b: rows 2t, 2t + 1 (b[0]) and those + 8 (b[1]) of column g
//   c: row g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2t and 2t + 1
template <class T>
DWATTN_DEVICE void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
DWATTN_DEVICE void mma_16816<__half>(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#ifdef DWATTN_SIMT_HOST
  simt::multiply<__half>(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
DWATTN_DEVICE void mma_16816<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#ifdef DWATTN_SIMT_HOST
  simt::multiply<__nv_bfloat16>(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// fp32 in memory, of which products are taken in TF32: 8 bits of exponent and 10 of mantissa.
struct Tf32 {
  float value;
};

// The bits of an fp32 number rounded to TF32, halves away from zero.
DWATTN_DEVICE uint32_t round_tf32(uint32_t bits) {
#ifdef DWATTN_SIMT_HOST
  return simt::round_tf32(bits);
#else
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#endif
}

// c (16x8, fp32) += a (16x8) b (8x8) in TF32, of operands that are rounded to it. c as above;
//   a: rows g (a[0], a[2]) and g + 8 (a[1], a[3]), column t (a[0], a[1]) and that + 4
//   b: row t (b[0]) and that + 4 (b[1]) of column g
DWATTN_DEVICE void mma_1688_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef DWATTN_SIMT_HOST
  simt::multiply_tf32(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Conversions

DWATTN_DEVICE float to_float(float v) { return v; }
DWATTN_DEVICE float to_float(Tf32 v) { return v.value; }
DWATTN_DEVICE float to_float(__half v) { return __half2float(v); }
DWATTN_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
DWATTN_DEVICE T from_float(float v);
template <>
DWATTN_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
DWATTN_DEVICE Tf32 from_float<Tf32>(float v) {
  return {v};
}
template <>
DWATTN_DEVICE __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
DWATTN_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two 16-bit elements in one register, the first in the low half (as in the fragments).
template <class T>
DWATTN_DEVICE uint32_t pack2(float low, float high);
template <>
DWATTN_DEVICE uint32_t pack2<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <>
DWATTN_DEVICE uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <class T>
DWATTN_DEVICE float2 unpack2(uint32_t bits);
template <>
DWATTN_DEVICE float2 unpack2<__half>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, 4);
  return __half22float2(pair);
}
template <>
DWATTN_DEVICE float2 unpack2<__nv_bfloat16>(uint32_t bits) {
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, 4);
  return __bfloat1622float2(pair);
}

// ---- Warp reductions: every lane gets the result, summed in an order that does not vary

DWATTN_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

DWATTN_DEVICE float warp_max(float v) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  }
  return v;
}

// ---- Launches

// Streaming multiprocessors of the current device, to size grids by.
inline int multiprocessors() {
#ifdef DWATTN_SIMT_HOST
  return simt::machine.multiprocessors;
#else
  int device = 0, count = 0;
  cudaGetDevice(&device);
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? count : 1;
#endif
}

template <class T>
struct AsIs {
  using type = T;
};

#ifndef DWATTN_SIMT_HOST
inline Status refused(cudaError_t error) {
  cudaGetLastError();  // clears it, or the next launch would report it
  launch_error = cudaGetErrorString(error);
  return Status::kLaunchFailed;
}
#endif

// Launches `kernel` with `shared` bytes of dynamic shared memory; arguments are converted to the
// types of its parameters. An empty grid is no error and launches nothing.
template <class... Params>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
              typename AsIs<Params>::type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Status::kOk;
#ifdef DWATTN_SIMT_HOST
  (void)stream;
  simt::launch(grid, block, shared, [&] { kernel(arguments...); });
  return Status::kOk;
#else
  const void* const function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    // All that a block may have, not `shared`: the setting is the kernel's, for all threads of the
    // process, and a smaller one set in between would make this launch fail. The second setting
    // makes room for as many blocks as fit; it is a hint.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return refused(error);
  }
  void* pointers[] = {&arguments...};
  // It returns its own error. The last error may be one that other code has left.
  const cudaError_t error = cudaLaunchKernel(function, grid, block, pointers, shared, stream);
  return error == cudaSuccess ? Status::kOk : refused(error);
#endif
}

}  // namespace dwattn::cuda
