# How the kernels in csrc/kernels/cuda are compiled, for everything that contains them.
set(DWATTN_CUDA_ARCHITECTURES
    "80-real;86-real;87-real;89-real;90a-real;100-real;120-real;90-virtual"
    CACHE STRING "CUDA architectures; 87 is Jetson Orin, the virtual one is PTX for later GPUs")

# Before CUDA is enabled, and before check_language(CUDA): an architecture that every nvcc knows. The
# default of CMake is one that nvcc 13 rejects, and older ones reject some of ours.
macro(dwattn_prepare_cuda)
  set(CMAKE_CUDA_ARCHITECTURES 87-real)
  if(DWATTN_CUDA_ARCHITECTURES STREQUAL "native")
    if(CMAKE_VERSION VERSION_LESS 3.24)
      message(FATAL_ERROR "dwattn: DWATTN_CUDA_ARCHITECTURES=native needs CMake 3.24, this is "
                          "${CMAKE_VERSION}. Name the architecture, for example 87-real.")
    endif()
    set(CMAKE_CUDA_ARCHITECTURES native)
  endif()
endmacro()

# Once CUDA is enabled: the wanted architectures that this nvcc knows. For the GPU of the machine it
# takes plain 90 where that is a Hopper, and the kernels for Hopper need 90a.
macro(dwattn_choose_cuda_architectures)
  set(CMAKE_CUDA_ARCHITECTURES "${DWATTN_CUDA_ARCHITECTURES}")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    list(FILTER CMAKE_CUDA_ARCHITECTURES EXCLUDE REGEX "^1[0-9][0-9]")
  endif()
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
