# CUDA: optional. Kernels live in csrc/kernels/cuda/*.cu. AUTO builds them where they can be used: with
# nvcc, for a PyTorch that has CUDA. A CPU-only build says why, also at run time (dwattn doctor).
# Include Torch.cmake first.
set(DWATTN_CUDA AUTO
    CACHE STRING "Build CUDA kernels: AUTO (nvcc and a CUDA build of PyTorch), ON (or fail), OFF")
set_property(CACHE DWATTN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(DWATTN_CUDA_ARCHITECTURES
    "80-real;86-real;87-real;89-real;90a-real;100-real;120-real;90-virtual"
    CACHE STRING "CUDA architectures; 87 is Jetson Orin, the virtual one is PTX for later GPUs")

set(DWATTN_HAVE_CUDA OFF)
set(DWATTN_CUDA_ARCHS_BUILT "")

# version.py lies beside the headers and says `cuda: Optional[str] = '13.0'` or `= None`.
set(DWATTN_TORCH_VERSION_FILE ${DWATTN_TORCH_INCLUDE_DIR}/../version.py)
set(DWATTN_TORCH_CUDA "")
if(EXISTS ${DWATTN_TORCH_VERSION_FILE})
  file(STRINGS ${DWATTN_TORCH_VERSION_FILE} line REGEX "^cuda[: =]")
  if(line MATCHES "= *['\"]([0-9.]+)['\"]")
    set(DWATTN_TORCH_CUDA ${CMAKE_MATCH_1})
  endif()
endif()

if(DWATTN_CUDA STREQUAL "OFF")
  set(DWATTN_CUDA_REASON "switched off (DWATTN_CUDA=OFF)")
elseif(DWATTN_CUDA STREQUAL "AUTO" AND NOT DWATTN_TORCH_CUDA)
  set(DWATTN_CUDA_REASON
      "the PyTorch of the build has no CUDA (DWATTN_CUDA=ON builds the kernels anyway)")
else()
  # Before check_language: the default architecture of CMake is one that nvcc 13 rejects.
  set(CMAKE_CUDA_ARCHITECTURES "${DWATTN_CUDA_ARCHITECTURES}")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(DWATTN_HAVE_CUDA ON)
    set(DWATTN_CUDA_ARCHS_BUILT "${DWATTN_CUDA_ARCHITECTURES}")
    set(DWATTN_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  else()
    set(DWATTN_CUDA_REASON "no nvcc was found (put it on PATH or set CUDACXX)")
    if(DWATTN_CUDA STREQUAL "ON")
      message(FATAL_ERROR "dwattn: DWATTN_CUDA=ON, but ${DWATTN_CUDA_REASON}.")
    endif()
  endif()
endif()

if(DWATTN_HAVE_CUDA)
  message(STATUS "dwattn: building with CUDA: ${DWATTN_CUDA_REASON}, ${DWATTN_CUDA_ARCHS_BUILT}")
  file(GLOB DWATTN_CUDA_SOURCES CONFIGURE_DEPENDS csrc/kernels/cuda/*.cu)
  # An object library: an archive would drop kernels that nothing refers to yet.
  add_library(dwattn_cuda_kernels OBJECT ${DWATTN_CUDA_SOURCES})
  target_include_directories(dwattn_cuda_kernels PUBLIC csrc)
  set_target_properties(dwattn_cuda_kernels PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET
                                                                        hidden)
  # Spills and stack frames are reported here and refused by tests/test_cuda_build.py.
  target_compile_options(
    dwattn_cuda_kernels PRIVATE -Xptxas=-v,-warn-spills,-warn-lmem-usage -Xfatbin=-compress-all
                                -Xcompiler=-Wall)
  # The static runtime: the library then needs no CUDA libraries besides the driver.
  target_link_libraries(dwattn_cuda_kernels PUBLIC CUDA::cudart_static)
else()
  message(STATUS "dwattn: CPU-only build: ${DWATTN_CUDA_REASON}")
endif()
