// The CPU kernels over numpy arrays, without torch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace dwattn::python {

void bind_numpy_ops(pybind11::module_& module);
void bind_numpy_variance(pybind11::module_& module);

}  // namespace dwattn::python
