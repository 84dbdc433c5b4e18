# A C++ compiler: optional, since the package also runs on plain PyTorch. A machine that has none gets it
# without compiled modules (dwattn doctor says so); one whose compiler fails gets that compiler's error.
set(DWATTN_NATIVE AUTO
    CACHE STRING "Compile the modules: AUTO (where there is a C++ compiler), ON (or fail), OFF")
set_property(CACHE DWATTN_NATIVE PROPERTY STRINGS AUTO ON OFF)

set(DWATTN_WITHOUT_NATIVE "")
set(demanded "${DWATTN_NATIVE}" "${DWATTN_CUDA}" "${DWATTN_TENSORRT}")
if(DWATTN_NATIVE STREQUAL "OFF")
  set(DWATTN_WITHOUT_NATIVE "switched off (DWATTN_NATIVE=OFF)")
elseif(NOT "ON" IN_LIST demanded AND NOT CMAKE_CXX_COMPILER AND NOT CMAKE_TOOLCHAIN_FILE)
  # check_language() would take a compiler that fails for one that is not there. CXX may name one that
  # Python was built with, elsewhere.
  string(REGEX MATCH "^[^ ]+" named "$ENV{CXX}")
  find_program(DWATTN_CXX NAMES ${named} c++ CC g++ icpx icx clang++ NO_CACHE)
  if(NOT DWATTN_CXX)
    set(DWATTN_WITHOUT_NATIVE "no C++ compiler was found (put one on PATH or set CXX)")
  endif()
endif()
