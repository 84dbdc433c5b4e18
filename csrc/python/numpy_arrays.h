// What the operators over numpy arrays have in common: threads, dtypes, layouts and statuses.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"
#include "kernels/params.h"
#include "python/checks.h"

namespace dwattn::python {

using OptionalArray = std::optional<pybind11::array>;

// Contiguous chunks of the range on `threads >= 1` threads, the caller's among them.
cpu::ParallelFor thread_for(int& threads);

cpu::Isa isa_of(const std::string& name);

// Raises ValueError for what the kernels do not read: other kinds of numbers, other byte orders.
DType dtype_of(const char* name, const pybind11::array& array);

Shape shape_of(const pybind11::array& array);

// The array itself where it is contiguous already.
pybind11::array dense(const pybind11::array& array);

void check(Status status);

}  // namespace dwattn::python
