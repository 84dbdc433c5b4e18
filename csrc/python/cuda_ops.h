// The CUDA kernels over objects with __cuda_array_interface__, without torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

namespace dwattn::python {

using OptionalObject = std::optional<pybind11::object>;
using OptionalStream = std::optional<uintptr_t>;

// The submodule `cuda`. In a build without CUDA its functions check their arguments and then say
// so.
void bind_cuda_ops(pybind11::module_& module);

// The attention statistics, into that submodule.
void bind_cuda_variance(pybind11::module_& module);

}  // namespace dwattn::python
