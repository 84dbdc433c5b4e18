# CUDA: optional. Kernels live in csrc/kernels/cuda/*.cu. AUTO builds them where they can be used: with
# nvcc, for a PyTorch that has CUDA. A CPU-only build says why, also at run time (dwattn doctor).
# Include Torch.cmake first.
set(DWATTN_CUDA AUTO
    CACHE STRING "Build CUDA kernels: AUTO (nvcc and a CUDA build of PyTorch), ON (or fail), OFF")
set_property(CACHE DWATTN_CUDA PROPERTY STRINGS AUTO ON OFF)
include(cmake/CudaKernels.cmake)

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
  dwattn_prepare_cuda()
  # An earlier look without success is kept, and would not be repeated where nvcc is there now.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  endif()
  if(CMAKE_CUDA_COMPILER AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
    dwattn_choose_cuda_architectures()
    find_package(CUDAToolkit REQUIRED)
    set(DWATTN_HAVE_CUDA ON)
    set(DWATTN_CUDA_ARCHS_BUILT "${CMAKE_CUDA_ARCHITECTURES}")
    set(DWATTN_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  else()
    set(DWATTN_CUDA_REASON "no nvcc was found (put it on PATH or set CUDACXX)")
    if(CMAKE_CUDA_COMPILER)
      set(DWATTN_CUDA_REASON
          "${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, and 12.0 is needed")
    endif()
    if(DWATTN_CUDA STREQUAL "ON")
      message(FATAL_ERROR "dwattn: DWATTN_CUDA=ON, but ${DWATTN_CUDA_REASON}.")
    endif()
  endif()
endif()

if(DWATTN_HAVE_CUDA)
  message(STATUS "dwattn: building with CUDA: ${DWATTN_CUDA_REASON}, ${DWATTN_CUDA_ARCHS_BUILT}")
  file(GLOB DWATTN_CUDA_SOURCES CONFIGURE_DEPENDS csrc/kernels/cuda/*.cu)
  dwattn_add_cuda_kernels(dwattn_cuda_kernels ${DWATTN_CUDA_SOURCES})
else()
  message(STATUS "dwattn: CPU-only build: ${DWATTN_CUDA_REASON}")
endif()
