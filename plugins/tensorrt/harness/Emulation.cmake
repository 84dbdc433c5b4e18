# dwattn_trt_harness_emulated: plugin, harness and kernels in one program without CUDA, the kernels
# emulated (tests/cuda/simt_host.h). CUDA's headers are needed.
set(DWATTN_CUDA_INCLUDE_DIR "" CACHE PATH "CUDA's headers; where nvcc is, if empty")
set(DWATTN_TRT_EMULATED_KERNELS "" CACHE STRING "Object files of the kernels; compiled here, if empty")
option(DWATTN_TRT_SANITIZE "Build the emulation with the address and undefined sanitizers" ON)

if(NOT DWATTN_CUDA_INCLUDE_DIR)
  find_package(CUDAToolkit REQUIRED)
  set(DWATTN_CUDA_INCLUDE_DIR ${CUDAToolkit_INCLUDE_DIRS})
endif()
if(DWATTN_TRT_EMULATED_KERNELS)
  set(kernels ${DWATTN_TRT_EMULATED_KERNELS})
else()
  set(kernels ${kernel_sources})
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX)
endif()
add_executable(dwattn_trt_harness_emulated ${plugin_sources} ${harness_sources} ${kernels})
target_link_libraries(dwattn_trt_harness_emulated PRIVATE dwattn_trt_headers)
target_include_directories(dwattn_trt_harness_emulated PRIVATE ${root}/tests/cuda)
target_include_directories(dwattn_trt_harness_emulated SYSTEM PRIVATE ${DWATTN_CUDA_INCLUDE_DIR})
target_compile_definitions(dwattn_trt_harness_emulated PRIVATE DWATTN_SIMT_HOST)
target_compile_options(dwattn_trt_harness_emulated
                       PRIVATE -O1 -g1 -fno-strict-aliasing -fno-omit-frame-pointer
                               -Wno-unknown-pragmas -Wno-class-memaccess)
if(DWATTN_TRT_SANITIZE)
  target_compile_options(dwattn_trt_harness_emulated
                         PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=all)
  target_link_options(dwattn_trt_harness_emulated PRIVATE -fsanitize=address,undefined)
endif()
