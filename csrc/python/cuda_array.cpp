#include "python/cuda_array.h"

#include <pybind11/stl.h>

#include <utility>

namespace py = pybind11;

namespace dwattn::python {
namespace {

py::dict interface_of(const char* name, py::handle object) {
  constexpr const char* kAttribute = "__cuda_array_interface__";
  if (!py::hasattr(object, kAttribute)) {
    throw py::type_error(std::string(name) + " must be an array in GPU memory with " + kAttribute +
                         ", got " +
                         py::str(py::type::of(object).attr("__name__")).cast<std::string>() + ".");
  }
  const py::object description = object.attr(kAttribute);
  if (!py::isinstance<py::dict>(description)) fail(name, ".", kAttribute, " is not a dict.");
  return description;
}

py::object entry(const char* name, const py::dict& interface, const char* key) {
  if (!interface.contains(key)) {
    fail(name, ".__cuda_array_interface__ has no entry \"", key, "\".");
  }
  return interface[key];
}

// An entry that may be missing or None.
py::object optional_entry(const py::dict& interface, const char* key) {
  return interface.contains(key) ? py::object(interface[key]) : py::none();
}

// A value that has another type than the protocol says ends in a sentence, not in a cast error.
template <class T>
T cast(const char* name, const char* key, const py::handle& value) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    fail(name, ".__cuda_array_interface__[\"", key,
         "\"] is not what the protocol says: ", py::repr(value).cast<std::string>(), ".");
  }
}

DType dtype_of(const char* name, const std::string& typestr, bool wide) {
  if (typestr == "<f4") return DType::kFloat32;
  if (typestr == "<f2") return DType::kFloat16;
  if (typestr == "<V2" || typestr == "<u2") return DType::kBFloat16;
  if (typestr == "<f8" && wide) return DType::kFloat64;
  if (typestr == "<f8") {
    fail(name, " is float64, which the CUDA kernels do not compute in; convert it to float32.");
  }
  fail(name,
       " must be float32 (\"<f4\"), float16 (\"<f2\") or bfloat16 (\"<V2\", or \"<u2\" holding ",
       "its bits), got \"", typestr, "\".");
}

// Strides of an array without holes, in elements.
Shape dense_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = step;
    step *= shape[d];
  }
  return strides;
}

Shape strides_of(const char* name, const Shape& bytes, const Shape& shape, int64_t itemsize) {
  if (bytes.size() != shape.size()) {
    fail(name, " has ", shape.size(), " dimensions, but strides ", shape_text(bytes), ".");
  }
  Shape strides;
  for (const int64_t step : bytes) {
    if (step < 0 || step % itemsize != 0) {
      fail(name, " has strides ", shape_text(bytes), " in bytes, which must be multiples of its ",
           itemsize, "-byte elements and not negative; pass a contiguous copy.");
    }
    strides.push_back(step / itemsize);
  }
  return strides;
}

// Whether the strides step through memory without holes; those of a single element do not matter.
bool is_dense(const CudaArray& array, size_t first) {
  const Shape expected = dense_strides(array.shape);
  for (size_t d = first; d < array.shape.size(); ++d) {
    if (array.shape[d] > 1 && array.strides[d] != expected[d]) return false;
  }
  return true;
}

}  // namespace

int64_t CudaArray::numel() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

const char* CudaArray::end() const {
  const char* begin = static_cast<const char*>(data);
  if (numel() == 0) return begin;
  int64_t last = 0;
  for (size_t d = 0; d < shape.size(); ++d) last += (shape[d] - 1) * strides[d];
  return begin + (last + 1) * dtype_size(dtype);
}

bool overlap(const CudaArray& a, const CudaArray& b) {
  return static_cast<const char*>(a.data) < b.end() && static_cast<const char*>(b.data) < a.end();
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

CudaArray cuda_array(const char* name, py::handle object, bool dense, bool wide) {
  const py::dict interface = interface_of(name, object);
  const auto version = cast<int>(name, "version", entry(name, interface, "version"));
  if (version < 2) {
    fail(name, " has version ", version, " of __cuda_array_interface__; 2 or later is needed.");
  }
  if (!optional_entry(interface, "mask").is_none()) {
    fail(name, " is a masked array, which is not supported; fill it first.");
  }
  CudaArray array;
  array.name = name;
  array.dtype =
      dtype_of(name, cast<std::string>(name, "typestr", entry(name, interface, "typestr")), wide);
  array.shape = cast<Shape>(name, "shape", entry(name, interface, "shape"));
  const auto data = cast<std::pair<uintptr_t, bool>>(name, "data", entry(name, interface, "data"));
  array.data = reinterpret_cast<void*>(data.first);
  array.read_only = data.second;
  for (const int64_t size : array.shape) {
    if (size < 0) fail(name, " has a negative size in its shape ", shape_text(array.shape), ".");
  }
  if (array.data == nullptr && array.numel() > 0) {
    fail(name, " has shape ", shape_text(array.shape), " but no memory.");
  }

  const py::object strides = optional_entry(interface, "strides");
  array.strides = strides.is_none() ? dense_strides(array.shape)
                                    : strides_of(name, cast<Shape>(name, "strides", strides),
                                                 array.shape, dtype_size(array.dtype));
  const size_t dimensions = array.shape.size();
  if (!is_dense(array, dense || dimensions == 0 ? 0 : dimensions - 1)) {
    fail(name, " must be contiguous", dense ? "" : " in its last dimension", ", got strides of ",
         shape_text(array.strides), " elements for shape ", shape_text(array.shape),
         "; pass a contiguous copy.");
  }

  const py::object stream = optional_entry(interface, "stream");
  if (!stream.is_none()) {
    array.stream = cast<uintptr_t>(name, "stream", stream);
    if (*array.stream == 0) {
      fail(name,
           " names the stream 0, which the protocol forbids because it is ambiguous: 1 is the ",
           "legacy default stream, 2 that of the thread.");
    }
  }
  return array;
}

}  // namespace dwattn::python
