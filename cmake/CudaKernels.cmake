# How the kernels in csrc/kernels/cuda are compiled, for everything that contains them.
set(DWATTN_CUDA_ARCHITECTURES
    "80-real;86-real;87-real;89-real;90a-real;100-real;120-real;90-virtual"
    CACHE STRING "CUDA architectures; 87 is Jetson Orin, the virtual one is PTX for later GPUs")

# An object library: an archive would drop kernels that nothing refers to yet. CUDA is enabled.
function(dwattn_add_cuda_kernels target)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PUBLIC ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc)
  set_target_properties(
    ${target} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
                         POSITION_INDEPENDENT_CODE ON)
  # Spills and stack frames are reported here and refused by tests/test_cuda_build.py.
  target_compile_options(${target} PRIVATE -Xptxas=-v,-warn-spills,-warn-lmem-usage
                                           -Xfatbin=-compress-all -Xcompiler=-Wall)
  # The static runtime: the library then needs no CUDA libraries besides the driver.
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()
