// The kernels own no threads: the caller passes a parallel loop (torch's pool, std::thread, or
// none).
#pragma once

#include <cstdint>

namespace dwattn::cpu {

// body(body_context, begin, end) handles tasks begin..end-1; it never throws.
using LoopBody = void (*)(void* body_context, int64_t begin, int64_t end);

struct ParallelFor {
  // `cost` is the work of one task in output elements, so that the loop can stay serial when
  // everything together is not worth waking a thread.
  void (*run)(void* context, int64_t tasks, int64_t cost, LoopBody body, void* body_context);
  void* context;
  int64_t threads;  // that it may use, the caller's among them

  template <class F>
  void operator()(int64_t tasks, int64_t cost, F& body) const {
    run(
        context, tasks, cost,
        [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); }, &body);
  }
};

// Tasks that one thread should get at least.
constexpr int64_t min_tasks_per_thread(int64_t cost) {
  constexpr int64_t kElementsPerThread = 16384;
  return cost >= kElementsPerThread ? 1 : kElementsPerThread / (cost > 0 ? cost : 1);
}

inline ParallelFor serial_for() {
  return {[](void*, int64_t tasks, int64_t, LoopBody body, void* body_context) {
            if (tasks > 0) body(body_context, 0, tasks);
          },
          nullptr, 1};
}

}  // namespace dwattn::cpu
