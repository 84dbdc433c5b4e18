#include "python/numpy_arrays.h"

#include <stdexcept>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace dwattn::python {

cpu::ParallelFor thread_for(int& threads) {
  if (threads < 1) fail("num_threads=", threads, " must be at least 1.");
  return {[](void* context, int64_t tasks, int64_t cost, cpu::LoopBody body, void* body_context) {
            const int64_t most = tasks / cpu::min_tasks_per_thread(cost);
            int64_t count = *static_cast<int*>(context);
            count = count > most ? (most < 1 ? 1 : most) : count;
            std::vector<std::thread> pool;
            for (int64_t i = 1; i < count; ++i) {
              pool.emplace_back(body, body_context, i * tasks / count, (i + 1) * tasks / count);
            }
            if (tasks > 0) body(body_context, 0, tasks / count);
            for (std::thread& thread : pool) thread.join();
          },
          &threads, threads};
}

cpu::Isa isa_of(const std::string& name) {
  if (name == cpu::isa_name(cpu::Isa::kAuto)) return cpu::Isa::kAuto;
  for (cpu::Isa isa : cpu::kAllIsas) {
    if (name == cpu::isa_name(isa)) return isa;
  }
  fail("isa=", name, " is not one of auto, amx, avx512_bf16, avx512, avx2, generic.");
}

DType dtype_of(const char* name, const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (!dtype.attr("isnative").cast<bool>()) {
    fail(name, " is ", py::str(dtype).cast<std::string>(),
         ", of another byte order than this machine's; convert it with .astype(dtype.newbyteorder(",
         "\"=\")).");
  }
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return DType::kFloat32;
  if (dtype.kind() == 'f' && dtype.itemsize() == 8) return DType::kFloat64;
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return DType::kFloat16;
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) return DType::kBFloat16;
  fail(name, " must be float32, float64, float16, or uint16 holding the bits of bfloat16, got ",
       py::str(dtype).cast<std::string>(), ".");
}

Shape shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

py::array dense(const py::array& array) {
  return (array.flags() & py::array::c_style) ? array
                                              : py::array::ensure(array, py::array::c_style);
}

void check(Status status) {
  if (status != Status::kOk) throw std::runtime_error(status_text(status));
}

}  // namespace dwattn::python
