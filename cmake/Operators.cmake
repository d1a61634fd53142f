# zebra_operator(NAME [CPU] [CUDA] [SM90A] [SM90A_WIDE] [CUTLASS]) collects sources; zebra_build_libraries() makes the targets.
#
# Files of an operator, all in csrc/NAME/:
#   NAME_cpu.cpp         CPU kernels, torch-free; compiled once per instruction set
#   NAME_cuda.cu         portable CUDA kernels, torch-free; ZEBRA_CUDA_ARCHS
#   NAME_sm90.cu         Hopper kernels, torch-free; sm_90a only
#   NAME_wide_sm90.cu    more of them
#   NAME_torch_cpu.cpp   registration for CPU tensors
#   NAME_torch_cuda.cpp  registration for CUDA tensors
# CUTLASS: the Hopper kernels of this operator include CUTLASS headers (third_party/).

set(ZEBRA_COMPILE_OPTIONS -Wall -Wextra -Werror -fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=)

# Name, flags: the best one that the machine has is picked at run time (common/cpu/isa.h).
set(ZEBRA_ISA_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(ZEBRA_ISAS baseline v3 v4)
  set(ZEBRA_ISA_v3 -march=x86-64-v3)
  set(ZEBRA_ISA_v4 -march=x86-64-v4 -mprefer-vector-width=512)
else()
  set(ZEBRA_ISAS baseline)
endif()

macro(zebra_operator NAME)
  foreach(part ${ARGN})
    set(dir "csrc/${NAME}")
    if(part STREQUAL "CPU")
      list(APPEND ZEBRA_CPU_KERNELS "${dir}/${NAME}_cpu.cpp")
      list(APPEND ZEBRA_CPU_TORCH "${dir}/${NAME}_torch_cpu.cpp")
    elseif(part STREQUAL "CUDA")
      list(APPEND ZEBRA_CUDA_KERNELS "${dir}/${NAME}_cuda.cu")
      list(APPEND ZEBRA_CUDA_TORCH "${dir}/${NAME}_torch_cuda.cpp")
    elseif(part STREQUAL "SM90A")
      list(APPEND ZEBRA_SM90A_KERNELS "${dir}/${NAME}_sm90.cu")
    elseif(part STREQUAL "SM90A_WIDE")
      list(APPEND ZEBRA_SM90A_KERNELS "${dir}/${NAME}_wide_sm90.cu")
    elseif(part STREQUAL "CUTLASS")
      set(ZEBRA_NEEDS_CUTLASS ON)
    else()
      message(FATAL_ERROR "zebra_operator(${NAME}): unknown part ${part}")
    endif()
  endforeach()
endmacro()

function(zebra_cuda_objects NAME)  # NAME, then ARCHS ..., then SOURCES ...
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "ARCHS;SOURCES")
  add_library(${NAME} OBJECT ${arg_SOURCES})
  set_target_properties(${NAME} PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 17)
  target_include_directories(${NAME} PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
  foreach(arch ${arg_ARCHS})
    list(APPEND gencode "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  endforeach()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(compress --compress-mode=size)
  endif()
  # ptxas fails the build on a register spill: a kernel that must spill says so in its own file.
  target_compile_options(${NAME} PRIVATE
    ${gencode} -O3 -lineinfo ${compress} -Xptxas -warn-spills,-Werror
    -Xcompiler -fvisibility=hidden,-Wall,-Wextra
    --expt-relaxed-constexpr -Wno-deprecated-gpu-targets)
endfunction()

# Finds nvcc and says in one line which kernels will be built.  A macro: enable_language() needs the
# top-level scope.
macro(zebra_find_cuda)
  set(ZEBRA_CUDA_FOUND OFF)
  if(NOT ZEBRA_CUDA STREQUAL "OFF")
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(ZEBRA_CUDA_FOUND ON)
      set(CMAKE_CUDA_ARCHITECTURES OFF)
      set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
      enable_language(CUDA)
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
        list(REMOVE_ITEM ZEBRA_CUDA_ARCHS 100 120)  # Blackwell came with CUDA 12.8
      endif()
      list(JOIN ZEBRA_CUDA_ARCHS " " archs)
      message(STATUS "zebra: CPU and CUDA kernels (nvcc ${CMAKE_CUDA_COMPILER_VERSION}; sm_90a, portable: ${archs})")
    elseif(ZEBRA_CUDA STREQUAL "ON")
      message(FATAL_ERROR "zebra: ZEBRA_CUDA=ON but no nvcc was found (set CUDACXX or PATH)")
    else()
      message(STATUS "zebra: CPU kernels only (no nvcc found; set CUDACXX to build the CUDA kernels)")
    endif()
  else()
    message(STATUS "zebra: CPU kernels only (ZEBRA_CUDA=OFF)")
  endif()
endmacro()

function(zebra_build_cuda)
  zebra_cuda_objects(zebra_cuda_portable ARCHS ${ZEBRA_CUDA_ARCHS} SOURCES ${ZEBRA_CUDA_KERNELS})
  set(objects $<TARGET_OBJECTS:zebra_cuda_portable>)
  if(ZEBRA_NEEDS_CUTLASS)
    include("${CMAKE_SOURCE_DIR}/third_party/CutlassHeaders.cmake")
  endif()
  if(ZEBRA_SM90A_KERNELS)
    zebra_cuda_objects(zebra_cuda_sm90a ARCHS 90a SOURCES ${ZEBRA_SM90A_KERNELS})
    if(ZEBRA_NEEDS_CUTLASS)
      target_include_directories(zebra_cuda_sm90a SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}")
    endif()
    list(APPEND objects $<TARGET_OBJECTS:zebra_cuda_sm90a>)
  endif()
  add_library(zebra_cuda SHARED ${ZEBRA_CUDA_TORCH} ${objects})
  zebra_torch_library(zebra_cuda)
  set_target_properties(zebra_cuda PROPERTIES CUDA_ARCHITECTURES OFF LINKER_LANGUAGE CXX)
  target_link_libraries(zebra_cuda PRIVATE
    cudart_static rt dl pthread)
  target_link_directories(zebra_cuda PRIVATE ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
endfunction()

function(zebra_torch_library NAME)
  target_link_libraries(${NAME} PRIVATE torch_stable)
  target_include_directories(${NAME} PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
  target_compile_options(${NAME} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${ZEBRA_COMPILE_OPTIONS}>")
  target_link_options(${NAME} PRIVATE -Wl,--exclude-libs,ALL)
  set_target_properties(${NAME} PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${ZEBRA_OUTPUT_DIR}/_lib" BUILD_WITH_INSTALL_RPATH ON)
endfunction()

# benchmarks/native/NAME.cu and the kernels of the operator it drives: a program without torch, Python
# or a CUDA runtime library, to be copied to a machine with a GPU.
function(zebra_native_driver NAME)  # NAME, then further sources
  zebra_cuda_objects(zebra_native_${NAME}_objects ARCHS 90a SOURCES
    "benchmarks/native/${NAME}.cu" "csrc/${NAME}/${NAME}_cuda.cu" "csrc/${NAME}/${NAME}_sm90.cu"
    ${ARGN})
  add_executable(zebra_native_${NAME} $<TARGET_OBJECTS:zebra_native_${NAME}_objects>)
  set_target_properties(zebra_native_${NAME} PROPERTIES
    CUDA_ARCHITECTURES OFF LINKER_LANGUAGE CXX OUTPUT_NAME ${NAME}
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/native")
  target_link_libraries(zebra_native_${NAME} PRIVATE cudart_static rt dl pthread)
  target_link_options(zebra_native_${NAME} PRIVATE -static-libstdc++ -static-libgcc)
  target_link_directories(zebra_native_${NAME} PRIVATE ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
endfunction()

# zebra._C for every interpreter in ZEBRA_PYTHON; the operators do not need it.
function(zebra_build_bindings)
  if(ZEBRA_PYTHON AND EXISTS "${ZEBRA_PYBIND11_INCLUDE}/pybind11")  # copied as torch's headers are
    file(COPY "${ZEBRA_PYBIND11_INCLUDE}/pybind11" DESTINATION "${CMAKE_BINARY_DIR}/include")
  endif()
  list(JOIN ZEBRA_CUDA_ARCHS " " archs)
  foreach(python ${ZEBRA_PYTHON})
    execute_process(COMMAND ${python} -c
      "import sysconfig as s; print(s.get_config_var('EXT_SUFFIX'), s.get_paths()['include'], sep=';')"
      OUTPUT_VARIABLE facts OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    list(GET facts 0 suffix)
    list(GET facts 1 include)
    string(MAKE_C_IDENTIFIER "zebra_C${suffix}" target)
    add_library(${target} MODULE csrc/module.cpp)
    set_target_properties(${target} PROPERTIES
      PREFIX "" OUTPUT_NAME _C SUFFIX "${suffix}" LIBRARY_OUTPUT_DIRECTORY "${ZEBRA_OUTPUT_DIR}")
    target_include_directories(${target} PRIVATE csrc)
    target_include_directories(${target} SYSTEM PRIVATE "${include}" "${CMAKE_BINARY_DIR}/include")
    target_compile_options(${target} PRIVATE ${ZEBRA_COMPILE_OPTIONS})
    target_compile_definitions(${target} PRIVATE
      ZEBRA_VERSION="${ZEBRA_VERSION}" ZEBRA_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
      ZEBRA_CUDA_ARCHS="${archs}" ZEBRA_TORCH_TARGET="${ZEBRA_TORCH_TARGET}")
  endforeach()
endfunction()

function(zebra_build_libraries)
  foreach(isa ${ZEBRA_ISAS})
    add_library(zebra_cpu_${isa} OBJECT ${ZEBRA_CPU_KERNELS})
    target_include_directories(zebra_cpu_${isa} PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
    target_compile_definitions(zebra_cpu_${isa} PRIVATE ZEBRA_ISA=${isa})
    target_compile_options(zebra_cpu_${isa} PRIVATE ${ZEBRA_COMPILE_OPTIONS} -O3 -fopenmp-simd
      -fno-math-errno -fno-trapping-math ${ZEBRA_ISA_${isa}})
    list(APPEND objects $<TARGET_OBJECTS:zebra_cpu_${isa}>)
  endforeach()
  add_library(zebra_cpu SHARED
    csrc/schema.cpp csrc/common/cpu/isa.cpp csrc/common/cpu/parallel_torch.cpp
    ${ZEBRA_CPU_TORCH} ${objects})
  zebra_torch_library(zebra_cpu)
  if(ZEBRA_CUDA_FOUND)
    zebra_build_cuda()
  endif()
  if(ZEBRA_TESTS)
    add_executable(zebra_test_configs tests/csrc/test_configs.cpp)
    target_include_directories(zebra_test_configs PRIVATE csrc)
    target_compile_options(zebra_test_configs PRIVATE ${ZEBRA_COMPILE_OPTIONS})
    add_test(NAME configs COMMAND zebra_test_configs)
    foreach(kernel linear_decode mla_decode mla_decode_rows mla_decode_wide ssd_scan)
      add_executable(zebra_emulate_${kernel} tests/csrc/emulate_${kernel}.cpp)
      set_target_properties(zebra_emulate_${kernel} PROPERTIES CXX_STANDARD 20)
      target_include_directories(zebra_emulate_${kernel} PRIVATE csrc)
      target_compile_options(zebra_emulate_${kernel} PRIVATE
        ${ZEBRA_COMPILE_OPTIONS} -Wno-unknown-pragmas)
      target_link_libraries(zebra_emulate_${kernel} PRIVATE pthread)
      add_test(NAME emulate_${kernel} COMMAND zebra_emulate_${kernel})
    endforeach()
    include(CheckCXXSourceRuns)
    # Whole kernels, on Hopper's instructions as the host has them.  Their threads are threads, so
    # ThreadSanitizer finds what a barrier does not order.
    set(CMAKE_REQUIRED_FLAGS -fsanitize=thread)
    set(CMAKE_REQUIRED_LINK_OPTIONS -fsanitize=thread -static-libtsan)
    check_cxx_source_runs("int main() {}" ZEBRA_HAS_THREAD_SANITIZER)
    unset(CMAKE_REQUIRED_FLAGS)
    unset(CMAKE_REQUIRED_LINK_OPTIONS)
    foreach(kernel mla_decode_rows mla_decode_wide)
      target_include_directories(zebra_emulate_${kernel} BEFORE PRIVATE
        tests/csrc/sm90_on_host tests/csrc)
      if(ZEBRA_HAS_THREAD_SANITIZER)
        target_compile_options(zebra_emulate_${kernel} PRIVATE -fsanitize=thread -g)
        target_link_options(zebra_emulate_${kernel} PRIVATE
          -fsanitize=thread -static-libtsan)  # and so finds what is suppressed
      endif()
    endforeach()
  endif()
  if(ZEBRA_NATIVE)
    if(NOT ZEBRA_CUDA_FOUND)
      message(FATAL_ERROR "zebra: ZEBRA_NATIVE=ON but no nvcc was found (set CUDACXX or PATH)")
    endif()
    zebra_native_driver(linear_decode)
    zebra_native_driver(mla_decode csrc/mla_decode/mla_decode_wide_sm90.cu)
    zebra_native_driver(ssd_scan)
  endif()
  zebra_build_bindings()
endfunction()
