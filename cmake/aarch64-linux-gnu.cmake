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
set(CMAKE_CUDA_FLAGS_INIT "-I${DWATTN_CUDA_TARGET}/include -L${DWATTN_CUDA_TARGET}/lib")

# Test programs of CMake are compiled and not linked: nvcc looks for its libraries elsewhere.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES DWATTN_CUDA_TARGET)
