# Target torch_stable: what a library needs to register operators through the LibTorch stable ABI.
#
# Only the headers are used: one binary then serves every torch from ZEBRA_TORCH_TARGET on, CPU or
# CUDA, and every Python.  Search order: $ZEBRA_TORCH_INCLUDE, what setup.py found (it looks by path,
# so that pip's isolated environment sees the surrounding torch), python3 on PATH.
set(ZEBRA_TORCH_TARGET "0x020a000000000000ULL")  # 2.10: byte 0x02, byte 0x0a

set(ZEBRA_TORCH_INCLUDE "$ENV{ZEBRA_TORCH_INCLUDE}" CACHE PATH "torch/include of a torch >= 2.10")
if(NOT EXISTS "${ZEBRA_TORCH_INCLUDE}" AND NOT DEFINED ENV{ZEBRA_TORCH_INCLUDE})
  execute_process(
    COMMAND python3 -c "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('torch').origin).parent / 'include')"
    OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(ZEBRA_TORCH_INCLUDE "${_found}" CACHE PATH "" FORCE)
endif()
if(NOT EXISTS "${ZEBRA_TORCH_INCLUDE}/torch/csrc/stable/ops.h")
  message(FATAL_ERROR
    "zebra needs the headers of torch >= 2.10 (torch/csrc/stable/ops.h); looked in "
    "'${ZEBRA_TORCH_INCLUDE}'. Install torch first or set ZEBRA_TORCH_INCLUDE=<site-packages>/torch/include.")
endif()
message(STATUS "zebra: torch headers in ${ZEBRA_TORCH_INCLUDE}")
# The headers are copied (2 MB): pip removes its build environment, and a later `cmake --build` must
# still find them.
foreach(part csrc/stable headeronly csrc/inductor/aoti_torch)
  file(COPY "${ZEBRA_TORCH_INCLUDE}/torch/${part}/"
    DESTINATION "${CMAKE_BINARY_DIR}/include/torch/${part}" FILES_MATCHING PATTERN "*.h")
endforeach()

# NEEDED libtorch.so without a torch to link against: an empty library with that name.  Through it the
# loader binds the CPU shims, and the CUDA ones where the torch at run time has them.
file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/torch_stub.c" CONTENT "void zebra_torch_stub(void) {}\n")
add_library(torch_stub SHARED "${CMAKE_BINARY_DIR}/torch_stub.c")
set_target_properties(torch_stub PROPERTIES
  OUTPUT_NAME torch LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stub")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${CMAKE_BINARY_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${ZEBRA_TORCH_TARGET})
target_link_libraries(torch_stable INTERFACE
  -Wl,--no-as-needed torch_stub -Wl,--as-needed)
