// The loop of torch's own thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "kernels/cpu/parallel.h"

namespace dwattn::torch_ops {

inline cpu::ParallelFor torch_parallel_for() {
  return {[](void*, int64_t tasks, int64_t cost, cpu::LoopBody body, void* context) {
            torch::stable::parallel_for(
                0, tasks, cpu::min_tasks_per_thread(cost),
                [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          nullptr, static_cast<int64_t>(torch::stable::get_num_threads())};
}

}  // namespace dwattn::torch_ops
