# The CPU kernels, compiled once per instruction set and chosen at run time.
include(CheckCXXCompilerFlag)

set(DWATTN_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(DWATTN_AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(DWATTN_AVX512_BF16_FLAGS ${DWATTN_AVX512_FLAGS} -mavx512bf16)
set(DWATTN_AMX_FLAGS ${DWATTN_AVX512_BF16_FLAGS} -mamx-tile -mamx-bf16)
set(DWATTN_CPU_ISAS generic)
set(DWATTN_CPU_ISA_DEFINITIONS)

# An object library: an archive would drop kernels that nothing refers to yet.
add_library(
  dwattn_cpu_kernels OBJECT
  csrc/kernels/cpu/features.cpp csrc/kernels/cpu/attention_variance.cpp
  csrc/kernels/cpu/dw_aggregate.cpp csrc/kernels/cpu/dw_layer.cpp csrc/kernels/cpu/gemm.cpp
  csrc/kernels/cpu/prefix_rows.cpp csrc/kernels/cpu/kernels_generic.cpp)
target_include_directories(dwattn_cpu_kernels PUBLIC csrc)
target_compile_options(dwattn_cpu_kernels PRIVATE ${DWATTN_WARNINGS} -fno-math-errno
                                                  -fno-trapping-math)

# Adds the kernels of an instruction set, where the compiler has it.
macro(dwattn_add_isa isa source)
  string(TOLOWER ${isa} lower)
  string(JOIN " " flags ${DWATTN_${isa}_FLAGS})
  check_cxx_compiler_flag("${flags}" DWATTN_COMPILER_HAS_${isa})
  if(DWATTN_COMPILER_HAS_${isa})
    target_sources(dwattn_cpu_kernels PRIVATE ${source})
    # GCC's own intrinsics headers use undefined registers on purpose and warn about it.
    set_source_files_properties(
      ${source} PROPERTIES COMPILE_OPTIONS
                           "${DWATTN_${isa}_FLAGS};-Wno-uninitialized;-Wno-maybe-uninitialized")
    list(APPEND DWATTN_CPU_ISA_DEFINITIONS DWATTN_HAVE_${isa})
    list(PREPEND DWATTN_CPU_ISAS ${lower})
  endif()
endmacro()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  dwattn_add_isa(AVX2 csrc/kernels/cpu/kernels_avx2.cpp)
  dwattn_add_isa(AVX512 csrc/kernels/cpu/kernels_avx512.cpp)
  # Products of bf16 on top of AVX-512, whose flags theirs include.
  dwattn_add_isa(AVX512_BF16 csrc/kernels/cpu/gemm_avx512_bf16.cpp)
  dwattn_add_isa(AMX csrc/kernels/cpu/gemm_amx.cpp)
endif()
target_compile_definitions(dwattn_cpu_kernels PUBLIC ${DWATTN_CPU_ISA_DEFINITIONS})
message(STATUS "dwattn: CPU instruction sets: ${DWATTN_CPU_ISAS}")
