# Cross-compiles for Jetson and other 64-bit ARM machines on a PC (Debian and Ubuntu:
# g++-aarch64-linux-gnu, to run the result qemu-user-static):
#   cmake -S plugins/tensorrt -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
# DWATTN_CUDA_TARGET is a directory with include/ and lib/libcudart_static.a of CUDA for aarch64:
# targets/sbsa-linux of a toolkit, or nvidia/cu13 of the aarch64 wheel nvidia-cuda-runtime. Its
# version must be that of nvcc.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -L /usr/aarch64-linux-gnu)

# Through the environment it also reaches the configurations that CMake makes of its own.
if(DWATTN_CUDA_TARGET)
  set(ENV{DWATTN_CUDA_TARGET} ${DWATTN_CUDA_TARGET})
else()
  set(DWATTN_CUDA_TARGET $ENV{DWATTN_CUDA_TARGET})
endif()

# Headers of the compiler itself are not part of the target; those of the machine serve as well.
execute_process(COMMAND nvcc --dryrun -x cu /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
string(REGEX MATCH "INCLUDES=\"-I([^\"]+)\"" matched "${dryrun}")
set(DWATTN_CUDA_TARGET_INCLUDES ${DWATTN_CUDA_TARGET}/include ${CMAKE_MATCH_1})
list(JOIN DWATTN_CUDA_TARGET_INCLUDES " -I" includes)
set(CMAKE_CUDA_FLAGS_INIT "-I${includes} -L${DWATTN_CUDA_TARGET}/lib")

set(CUDA_cudart_static_LIBRARY ${DWATTN_CUDA_TARGET}/lib/libcudart_static.a CACHE FILEPATH "")
list(APPEND CMAKE_PREFIX_PATH /usr/aarch64-linux-gnu)
