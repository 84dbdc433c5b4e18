# How the kernels in csrc/kernels/cuda are compiled, for everything that contains them.
set(DWATTN_CUDA_ARCHITECTURES
    "80-real;86-real;87-real;89-real;90a-real;100-real;120-real;90-virtual"
    CACHE STRING "CUDA architectures; 87 is Jetson Orin, the virtual one is PTX for later GPUs")

# What "native" means here; call it once CUDA is enabled. The compiler takes the GPU of the machine for
# plain 90 where it is a Hopper, and the kernels for Hopper need 90a.
macro(dwattn_resolve_native_architecture)
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native" AND CMAKE_CUDA_ARCHITECTURES_NATIVE)
    string(REGEX REPLACE "90(-|;|$)" "90a\\1" CMAKE_CUDA_ARCHITECTURES
                         "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  endif()
endmacro()

# An object library: an archive would drop kernels that nothing refers to yet. CUDA is enabled.
function(dwattn_add_cuda_kernels target)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PUBLIC ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc)
  set_target_properties(
    ${target} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
                         POSITION_INDEPENDENT_CODE ON)
  if(CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
    target_compile_definitions(${target} PRIVATE DWATTN_CUDA_90A)
  endif()
  # Spills and stack frames are reported here and refused by tests/test_cuda_build.py.
  target_compile_options(${target} PRIVATE -Xptxas=-v,-warn-spills,-warn-lmem-usage
                                           -Xfatbin=-compress-all -Xcompiler=-Wall)
  # The static runtime: the library then needs no CUDA libraries besides the driver.
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()
