// Runs CUDA kernels on the CPU, so that sanitizers and tests can judge them.
//
// A .cu file is compiled by a plain C++ compiler with -DDWATTN_SIMT_HOST; CUDA's own headers supply
// half, bfloat16, uint4 and dim3. Every CUDA thread is a fiber (simt_machine.h), and scheduling is
// chosen to make mistakes visible, not to be fair:
//   - a warp runs until it has to wait for others, so that a missing barrier meets the largest
//     skew, in three orders (forward, reverse, shuffled), which also apply to lanes and blocks;
//   - an asynchronous copy lands only when its own thread waits for it; until then its destination
//     is NaN;
//   - shared memory starts as NaN, has exactly the size of the launch and lies between guard zones;
//   - threads that meet at different barriers, that leave while others wait, or that never meet end
//     the program with a sentence.
// What Hopper adds is in simt_hopper.h. Not emulated: clusters, the proxies of asynchronous
// accesses, atomics between blocks in flight, static __shared__ arrays.
#pragma once

#include "simt_machine.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {

// ---- Warp collectives

template <class Act>
void together(Collective kind, const Act& act) {
  Fiber& self = *machine.current;
  Warp& warp = machine.warps[self.warp];
  if (warp.arrived > 0 && warp.collective != kind) {
    die("lanes of a warp wait in different warp collectives");
  }
  warp.collective = kind;
  if (++warp.arrived < kLanes) {
    self.state = State::kAtCollective;
    to_scheduler();
    return;
  }
  act(warp.slots);
  warp.arrived = 0;
  const size_t first = static_cast<size_t>(self.warp) * kLanes;
  for (size_t i = first; i < first + kLanes; ++i) {
    if (machine.fibers[i].state == State::kAtCollective) machine.fibers[i].state = State::kReady;
  }
}

inline Warp::Slot& own_slot() {
  return machine.warps[machine.current->warp].slots[machine.current->lane];
}

inline void warp_barrier() {
  together(Collective::kSync, [](Warp::Slot*) {});
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8, "a register pair at most");
  Warp::Slot& slot = own_slot();
  std::memcpy(slot.in, &value, sizeof(T));
  slot.source = source;
  together(Collective::kShuffle, [](Warp::Slot* slots) {
    for (int l = 0; l < kLanes; ++l) slots[l].out[0] = slots[slots[l].source % kLanes].in[0];
  });
  std::memcpy(&value, slot.out, sizeof(T));
  return value;
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) die("ldmatrix: a row is not 16-byte aligned");
  Warp::Slot& slot = own_slot();
  slot.row = row;
  together(Collective::kLoadMatrices, [transposed](Warp::Slot* slots) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j) std::memcpy(matrix[j], slots[i * 8 + j].row, 16);
      for (int l = 0; l < kLanes; ++l) {
        const int g = l / 4, t = l % 4 * 2;
        const uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
        const uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
        reinterpret_cast<uint32_t*>(slots[l].out)[i] = low | high << 16;
      }
    }
  });
  std::memcpy(r, slot.out, 16);
}

// As cvt.rna.tf32.f32: what is neither infinite nor NaN to the nearest, halves away from zero.
constexpr uint32_t kBelowTf32 = 0x1fff;
inline uint32_t round_tf32(uint32_t bits) {
  constexpr uint32_t kInfinity = 0x7f800000, kQuiet = 0x400000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > kInfinity) return (bits | kQuiet) & ~kBelowTf32;
  return magnitude == kInfinity ? bits : (bits + 0x1000) & ~kBelowTf32;
}

template <class T>
float element(const uint64_t* words, int word, int half) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(words) + word * 4 + half * 2, 2);
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

// Adds a (16 x kDepth) b (kDepth x 8) to the fragments of c (16x8) of the 32 lanes.
template <int kDepth>
void add_products(Warp::Slot* slots, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float c[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4 * 2;
    for (int e = 0; e < 4; ++e) slots[l].c[e] += c[g + e / 2 * 8][t + e % 2];
  }
}

// c (16x8) += a (16x16) b (16x8) on the fragments of the 32 lanes.
template <class T>
void multiply_fragments(Warp::Slot* slots) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4 * 2;
    for (int word = 0; word < 4; ++word) {
      for (int half = 0; half < 2; ++half) {
        a[g + word % 2 * 8][t + word / 2 * 8 + half] = element<T>(slots[l].in, word, half);
      }
    }
    for (int word = 0; word < 2; ++word) {
      for (int half = 0; half < 2; ++half) {
        b[t + word * 8 + half][g] = element<T>(slots[l].in, 4 + word, half);
      }
    }
  }
  add_products(slots, a, b);
}

// The GPU ignores the bits below TF32, so operands that were not rounded would be cut off.
inline float tf32_element(const uint64_t* words, int word) {
  uint32_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(words) + word * 4, 4);
  if (bits & kBelowTf32) die("mma: an operand is not rounded to TF32");
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// c (16x8) += a (16x8) b (8x8) in TF32.
inline void multiply_tf32_fragments(Warp::Slot* slots) {
  float a[16][8], b[8][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int word = 0; word < 4; ++word) {
      a[g + word % 2 * 8][t + word / 2 * 4] = tf32_element(slots[l].in, word);
    }
    for (int word = 0; word < 2; ++word) {
      b[t + word * 4][g] = tf32_element(slots[l].in, 4 + word);
    }
  }
  add_products(slots, a, b);
}

inline void multiply(void (*fragments)(Warp::Slot*), float (&c)[4], const uint32_t (&a)[4],
                     const uint32_t (&b)[2]) {
  Warp::Slot& slot = own_slot();
  std::memcpy(slot.in, a, 16);
  std::memcpy(slot.in + 2, b, 8);
  std::memcpy(slot.c, c, 16);
  together(Collective::kMultiply, fragments);
  std::memcpy(c, slot.c, 16);
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(multiply_fragments<T>, c, a, b);
}

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply(multiply_tf32_fragments, c, a, b);
}

}  // namespace simt

// ---- The names that kernels use

#define threadIdx (::simt::machine.current->thread)
#define blockIdx (::simt::machine.block_index)
#define blockDim (::simt::machine.block)
#define gridDim (::simt::machine.grid)
#define __syncthreads() ::simt::block_barrier(__LINE__)
#define __syncwarp(...) ::simt::warp_barrier()
#define __shfl_sync(mask, value, source) ::simt::shuffle(value, source)
#define __shfl_xor_sync(mask, value, bits) \
  ::simt::shuffle(value, ::simt::machine.current->lane ^ (bits))
#define __shfl_down_sync(mask, value, step)                           \
  ::simt::shuffle(value, ::simt::machine.current->lane + (step) < 32  \
                             ? ::simt::machine.current->lane + (step) \
                             : ::simt::machine.current->lane)

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }
