# torch, as headers only. The extension uses LibTorch's stable ABI, so one binary runs with every
# PyTorch >= 2.11. Nothing of torch is linked: libtorch is already in the process when the extension is
# loaded, and the stand-ins below only record its sonames.
set(DWATTN_TORCH_TARGET_VERSION 0x020b000000000000) # 2.11

execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch_headers.py
  OUTPUT_VARIABLE DWATTN_TORCH_INCLUDE_DIR
  ERROR_VARIABLE DWATTN_TORCH_ERROR
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE DWATTN_TORCH_RESULT)
if(DWATTN_TORCH_RESULT)
  message(FATAL_ERROR "${DWATTN_TORCH_ERROR}")
endif()
message(STATUS "dwattn: torch headers in ${DWATTN_TORCH_INCLUDE_DIR}")

add_library(dwattn_torch INTERFACE)
target_include_directories(dwattn_torch SYSTEM INTERFACE ${DWATTN_TORCH_INCLUDE_DIR})
target_compile_definitions(dwattn_torch
                           INTERFACE TORCH_TARGET_VERSION=${DWATTN_TORCH_TARGET_VERSION})

set(DWATTN_STUB_DIR ${CMAKE_CURRENT_BINARY_DIR}/torch_sonames)
file(WRITE ${DWATTN_STUB_DIR}/empty.cpp "")
foreach(name torch torch_cpu)
  add_library(dwattn_soname_${name} SHARED ${DWATTN_STUB_DIR}/empty.cpp)
  set_target_properties(
    dwattn_soname_${name} PROPERTIES OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY
                                                         ${DWATTN_STUB_DIR})
  target_link_libraries(dwattn_torch INTERFACE dwattn_soname_${name})
endforeach()
target_link_options(dwattn_torch INTERFACE LINKER:--no-as-needed)
