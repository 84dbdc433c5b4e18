// A kernel on arrays that others own: their device, and the order of their streams.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "python/cuda_array.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::python {

// Rows that are copied as they are: `count` runs of `bytes`.
struct RowCopy {
  void* to = nullptr;
  const void* from = nullptr;
  int64_t to_pitch = 0, from_pitch = 0, bytes = 0, count = 0;
};

struct Launch {
  std::vector<CudaArray> arrays;    // everything that is read or written
  size_t written = 1;               // how many of them are written, the last ones
  std::optional<uintptr_t> stream;  // of the caller; 0 is the legacy default stream
  RowCopy copy;
  int64_t workspace_bytes = 0;
  std::function<Status(void* workspace, CUstream_st* stream)> kernel;
};

// Queues the work and returns. It runs on the caller's stream, else on that of the last array, else
// on the legacy default stream, after what the owners' streams hold now; the owners of what is
// written continue after it. The workspace comes from the stream's memory pool and goes back to it
// in the order of the stream, so the host does not wait; a device without memory pools makes it
// wait for the work.
void launch(const Launch& work);

}  // namespace dwattn::python
