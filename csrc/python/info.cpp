// The module dwattn._native: what was built, what this CPU can do, and the kernels over arrays
// of others.
#include <pybind11/pybind11.h>

#include "kernels/cpu/features.h"
#include "kernels/cpu/gemm.h"
#include "python/cuda_ops.h"
#include "python/numpy_ops.h"

namespace py = pybind11;

namespace {

using dwattn::cpu::Isa;

py::list names_of_isas(bool (*condition)(Isa)) {
  py::list names;
  for (Isa isa : dwattn::cpu::kAllIsas) {
    if (condition(isa)) names.append(dwattn::cpu::isa_name(isa));
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DWATTN_VERSION;
  info["compiler"] = DWATTN_COMPILER;
  info["flags"] = DWATTN_FLAGS;
  info["torch_target"] = DWATTN_TORCH_TARGET;
  info["cpu_isas"] = names_of_isas(dwattn::cpu::isa_compiled);
  info["cuda_architectures"] = py::str(DWATTN_CUDA_ARCHS).attr("split")();
  info["cuda"] = DWATTN_CUDA_STATE;
  return info;
}

py::dict cpu_info() {
  const dwattn::cpu::Features& f = dwattn::cpu::features();
  py::dict features;
  features["amd"] = f.amd;
  features["avx2"] = f.avx2;
  features["avx512"] = f.avx512;
  features["avx512_bf16"] = f.avx512_bf16;
  features["avx512_fp16"] = f.avx512_fp16;
  features["amx_bf16"] = f.amx_bf16;
  features["amx_fp16"] = f.amx_fp16;
  features["arm_bf16"] = f.arm_bf16;
  py::dict info;
  info["features"] = features;
  info["usable_isas"] = names_of_isas(dwattn::cpu::isa_usable);
  info["chosen_isa"] = dwattn::cpu::isa_name(dwattn::cpu::default_isa());
  info["bf16_products"] = dwattn::cpu::by_tiles(dwattn::DType::kBFloat16, Isa::kAuto)
                              ? "bfloat16 by AMX tiles"
                          : dwattn::cpu::native_bf16_gemm() ? "bfloat16"
                                                            : "float32";
  info["fp16_products"] =
      dwattn::cpu::native_fp16_gemm() ? "float16, of narrow layers in float32" : "float32";
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "Build information, and the kernels of dwattn over numpy arrays and arrays in GPU memory.";
  module.def("build_info", &build_info,
             "What was compiled: version, compiler, flags, instruction sets, CUDA architectures.");
  module.def("cpu_info", &cpu_info,
             "What this CPU can do, which instruction set the kernels use, and the dtype in which "
             "products of 16-bit tensors are computed.");
  dwattn::python::bind_numpy_ops(module);
  dwattn::python::bind_numpy_variance(module);
  dwattn::python::bind_cuda_ops(module);
}
