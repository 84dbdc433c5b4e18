// The machine that simt_host.h emulates: one fiber per CUDA thread, block barriers, asynchronous
// copies and the scheduler. One block runs at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "The fiber switch below is written for x86-64 and AArch64."
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

namespace simt {

[[noreturn]] inline void die(const char* reason) {
  std::fprintf(stderr, "simt: %s\n", reason);
  std::abort();
}

enum class Order { kForward, kReverse, kShuffled };
inline constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32;

enum class State { kReady, kAtBarrier, kAtSharedBarrier, kAtCollective, kDone };

// Something the 32 lanes of a warp do together: the last lane to arrive does it for all.
enum class Collective { kNone, kSync, kShuffle, kLoadMatrices, kMultiply, kEndProducts };

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Fiber;

// A product of a warpgroup in flight (simt_hopper.h).
struct Product {
  float* sums;
  uint64_t a, b;
  bool add;
  void (*multiply)(Fiber* lanes, size_t index);
};

struct Fiber {
  State state = State::kReady;
  uint3 thread{};
  int warp = 0, lane = 0, barrier = 0;
  std::vector<AsyncCopy> open;                  // not committed yet
  std::vector<std::vector<AsyncCopy>> flights;  // committed groups, oldest first
  const void* waits_for = nullptr;              // a barrier in shared memory
  std::vector<Product> products;                // oldest first
  std::vector<size_t> product_groups;           // how many of them were committed together
  float sums[64];                               // of the products in flight
  size_t products_left = 0;
  bool products_may_begin = false;
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
};

struct Warp {
  Collective collective = Collective::kNone;
  int arrived = 0;
  struct Slot {
    uint64_t in[3];
    uint64_t out[2];
    const void* row;
    float c[4];
    int source;
  } slots[kLanes];
};

// The one block that is running.
struct Machine {
  struct Barrier {  // in shared memory
    int count, pending, bytes;
    unsigned parity;  // of the phase that has not ended
  };
  Order order = Order::kForward;
  int multiprocessors = 4;  // what kernels are told; steers how they split the work
  dim3 grid, block;
  uint3 block_index{};
  unsigned char* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, Barrier> barriers;
  std::vector<std::function<void()>> tensor_copies;  // that have not landed
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::mt19937 random{1};
  void* scheduler_pointer = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
};
inline Machine machine;

// ---- Fibers

// Saves the callee-saved registers on the stack, swaps stacks, restores. A new stack starts with
// such a frame of kFrameWords, which returns to the address in the word kReturnWord.
#if defined(__x86_64__)
constexpr int kFrameWords = 8, kReturnWord = 6;

extern "C" __attribute__((naked, noinline, used)) inline void dwattn_simt_switch(void** /*save*/,
                                                                                 void* /*load*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
#else
constexpr int kFrameWords = 20, kReturnWord = 11;

// GCC has no naked functions for AArch64; weak, since every file that includes this defines it.
extern "C" void dwattn_simt_switch(void** save, void* load);
asm(R"(
    .pushsection .text
    .weak dwattn_simt_switch
    .type dwattn_simt_switch, %function
    .balign 4
dwattn_simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size dwattn_simt_switch, .-dwattn_simt_switch
    .popsection
)");
#endif

inline void to_scheduler() {
  Fiber& self = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self.state == State::kDone ? nullptr : &self.fake_stack,
                                 machine.scheduler_stack, machine.scheduler_bytes);
#endif
  dwattn_simt_switch(&self.stack_pointer, machine.scheduler_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_bytes);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_bytes);
#endif
  (*machine.body)();
  machine.current->state = State::kDone;
  to_scheduler();
  die("a finished thread was resumed");
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  dwattn_simt_switch(&machine.scheduler_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void start(Fiber& fiber, int index) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::malloc(kStackBytes));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  const unsigned i = static_cast<unsigned>(index);
  const dim3& b = machine.block;
  fiber.thread = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
  fiber.warp = index / kLanes;
  fiber.lane = index % kLanes;
  fiber.state = State::kReady;
  fiber.open.clear();
  fiber.flights.clear();
  fiber.products.clear();
  fiber.product_groups.clear();
  fiber.products_may_begin = false;
  // The first switch returns into fiber_main, as if it had been called.
  const uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - kFrameWords;
  std::fill(frame, frame + kFrameWords, nullptr);
  frame[kReturnWord] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = frame;
}

// ---- Block barriers

inline void block_barrier(int site) {
  Fiber& self = *machine.current;
  self.barrier = site;
  self.state = State::kAtBarrier;
  to_scheduler();
}

// ---- Asynchronous copies

inline void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes) die("cp.async: shared address not aligned");
  if (valid && reinterpret_cast<uintptr_t>(from) % bytes) die("cp.async: source not aligned");
  std::memset(to, 0xFF, bytes);
  machine.current->open.push_back({to, valid ? from : nullptr, bytes});
}

inline void commit_copies() {
  Fiber& self = *machine.current;
  self.flights.push_back(std::move(self.open));
  self.open.clear();
}

inline void wait_copies(size_t in_flight) {
  auto& flights = machine.current->flights;
  while (flights.size() > in_flight) {
    for (const AsyncCopy& copy : flights.front()) {
      if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    flights.erase(flights.begin());
  }
}

inline bool copies_in_flight(const Fiber& fiber) {
  bool any = !fiber.open.empty();
  for (const auto& group : fiber.flights) any = any || !group.empty();
  return any;
}

// ---- The scheduler

template <class Index>
void arrange(std::vector<Index>& order) {
  if (machine.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), machine.random);
}

template <class Index>
std::vector<Index> initial_order(Index count) {
  std::vector<Index> order(count);
  std::iota(order.begin(), order.end(), Index{0});
  if (machine.order == Order::kReverse) std::reverse(order.begin(), order.end());
  return order;
}

// Runs every ready lane of a warp until all of them wait or are done; whether anything ran.
inline bool run_warp(int warp, std::vector<int>& lanes) {
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    arrange(lanes);
    for (int lane : lanes) {
      Fiber& fiber = machine.fibers[static_cast<size_t>(warp) * kLanes + lane];
      if (fiber.state != State::kReady) continue;
      resume(fiber);
      ran = again = true;
      if (fiber.state == State::kDone && copies_in_flight(fiber)) {
        die("a thread ended with asynchronous copies in flight");
      }
      if (fiber.state == State::kDone && !fiber.products.empty()) {
        die("a thread ended with products in flight");
      }
    }
    if (machine.order == Order::kShuffled && machine.random() % 4 == 0) break;
  }
  return ran;
}

// Releases the block's barrier once nobody but waiting threads is left; whether it did.
inline bool release_barrier() {
  size_t waiting = 0, done = 0;
  for (const Fiber& fiber : machine.fibers) {
    waiting += fiber.state == State::kAtBarrier;
    done += fiber.state == State::kDone;
  }
  if (waiting == 0 || waiting + done < machine.fibers.size()) return false;
  if (done > 0) die("__syncthreads after some threads of the block returned");
  for (Fiber& fiber : machine.fibers) {
    if (fiber.barrier != machine.fibers[0].barrier) die("threads wait at different __syncthreads");
    fiber.state = State::kReady;
  }
  return true;
}

// Lets one tensor copy land; whether there was one.
inline bool land_tensor_copy() {
  auto& copies = machine.tensor_copies;
  if (copies.empty()) return false;
  const size_t last = copies.size() - 1;
  const size_t i = machine.order == Order::kForward   ? 0
                   : machine.order == Order::kReverse ? last
                                                      : machine.random() % copies.size();
  const std::function<void()> land = std::move(copies[i]);
  copies.erase(copies.begin() + i);
  land();
  return true;
}

inline void run_block() {
  const int threads = static_cast<int>(machine.fibers.size());
  for (int i = 0; i < threads; ++i) start(machine.fibers[i], i);
  machine.warps.assign(threads / kLanes, Warp{});
  std::vector<int> warps = initial_order(threads / kLanes), lanes = initial_order(kLanes);
  const auto done = [](const Fiber& f) { return f.state == State::kDone; };
  while (!std::all_of(machine.fibers.begin(), machine.fibers.end(), done)) {
    bool progress = false;
    arrange(warps);
    for (int warp : warps) progress = run_warp(warp, lanes) || progress;
    progress = release_barrier() || progress;
    const bool early = machine.order == Order::kShuffled && machine.random() % 4 == 0;
    if (!progress || early) progress = land_tensor_copy() || progress;
    if (!progress) die("deadlock: a barrier or warp collective that not every thread reaches");
  }
  if (!machine.tensor_copies.empty()) die("a block ended with tensor copies in flight");
  machine.barriers.clear();
}

inline void resize_block(size_t threads) {
  if (threads % kLanes) die("the block is not a multiple of 32 threads");
  for (size_t i = threads; i < machine.fibers.size(); ++i) std::free(machine.fibers[i].stack);
  machine.fibers.resize(threads);
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  if (grid.y > 65535 || grid.z > 65535) die("grid.y and grid.z are limited to 65535");
  if (block.x * block.y * block.z > 1024) die("a block has at most 1024 threads");
  machine.body = &body;
  machine.grid = grid;
  machine.block = block;
  resize_block(size_t{block.x} * block.y * block.z);
  std::vector<uint64_t> blocks = initial_order(uint64_t{grid.x} * grid.y * grid.z);
  arrange(blocks);
  for (uint64_t i : blocks) {
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, shared_bytes)) die("out of memory");
    std::memset(shared, 0xFF, shared_bytes);
    machine.shared = static_cast<unsigned char*>(shared);
    machine.block_index = {static_cast<unsigned>(i % grid.x),
                           static_cast<unsigned>(i / grid.x % grid.y),
                           static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
    std::free(shared);
  }
}

}  // namespace simt
