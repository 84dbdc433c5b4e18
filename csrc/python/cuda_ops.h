// The CUDA kernels over objects with __cuda_array_interface__, without torch.
#pragma once

#include <pybind11/pybind11.h>

namespace dwattn::python {

// The submodule `cuda`. In a build without CUDA its functions check their arguments and then say
// so.
void bind_cuda_ops(pybind11::module_& module);

}  // namespace dwattn::python
