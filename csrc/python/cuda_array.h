// Arrays in GPU memory that are described by __cuda_array_interface__ (version 2 or 3): CuPy,
// Numba, PyTorch and others have it. Reads the description only, never the memory.
#pragma once

#include <optional>

#include "kernels/params.h"
#include "python/checks.h"

namespace dwattn::python {

struct CudaArray {
  const char* name = nullptr;  // of the argument, for messages
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Shape shape;
  Shape strides;  // in elements
  bool read_only = false;
  // The stream on which the array's owner works: 1 is the legacy default stream, 2 the default
  // stream of the thread, anything else a cudaStream_t. Without it nothing has to be waited for.
  std::optional<uintptr_t> stream;

  int64_t numel() const;
  // One past the last byte that belongs to the array.
  const char* end() const;
};

bool overlap(const CudaArray& a, const CudaArray& b);

const char* dtype_name(DType dtype);

// The array that `object` describes. Its last dimension must be contiguous, and so must all of it
// where `dense`. bfloat16 comes as "<V2" (PyTorch, ml_dtypes) or as the bits in "<u2"; float64 is
// refused unless `wide`.
CudaArray cuda_array(const char* name, pybind11::handle object, bool dense, bool wide = false);

}  // namespace dwattn::python
