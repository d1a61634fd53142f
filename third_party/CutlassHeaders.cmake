# Finds the CUTLASS / CuTe headers: sets CUTLASS_INCLUDE_DIR.  Only kernels that include them need this;
# nothing is vendored.  In order:
#   1. $ZEBRA_CUTLASS_INCLUDE            a folder that holds cutlass/cutlass.h
#   2. an installed package              nvidia-cutlass (cutlass_library) or flashinfer-python
#   3. third_party/_pypi                 what step 4 fetched earlier
#   4. the Python package registry       pip install --no-deps --target third_party/_pypi (42 MB), unless
#                                        ZEBRA_CUTLASS_FETCH=OFF
# Also runs by itself:  cmake -P third_party/CutlassHeaders.cmake
set(ZEBRA_CUTLASS_PACKAGE "nvidia-cutlass==4.2.0.0")
if(NOT DEFINED ZEBRA_CUTLASS_FETCH)
  set(ZEBRA_CUTLASS_FETCH ON)
endif()
set(_pypi "${CMAKE_CURRENT_LIST_DIR}/_pypi")

function(zebra_cutlass_candidate DIR SOURCE)
  if(NOT CUTLASS_INCLUDE_DIR AND EXISTS "${DIR}/cutlass/cutlass.h")
    set(CUTLASS_INCLUDE_DIR "${DIR}" PARENT_SCOPE)
    message(STATUS "zebra: CUTLASS headers in ${DIR} (${SOURCE})")
  endif()
endfunction()

set(CUTLASS_INCLUDE_DIR "")
if(DEFINED ENV{ZEBRA_CUTLASS_INCLUDE})
  zebra_cutlass_candidate("$ENV{ZEBRA_CUTLASS_INCLUDE}" "ZEBRA_CUTLASS_INCLUDE")
  if(NOT CUTLASS_INCLUDE_DIR)
    message(FATAL_ERROR
      "zebra: ZEBRA_CUTLASS_INCLUDE must hold cutlass/cutlass.h, got '$ENV{ZEBRA_CUTLASS_INCLUDE}'")
  endif()
endif()
if(NOT CUTLASS_INCLUDE_DIR)
  execute_process(
    COMMAND python3 -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE _site OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  zebra_cutlass_candidate("${_site}/cutlass_library/source/include" "nvidia-cutlass")
  zebra_cutlass_candidate("${_site}/flashinfer/data/cutlass/include" "flashinfer-python")
  zebra_cutlass_candidate("${_pypi}/cutlass_library/source/include" "third_party/_pypi")
endif()
if(NOT CUTLASS_INCLUDE_DIR AND ZEBRA_CUTLASS_FETCH)
  message(STATUS "zebra: fetching ${ZEBRA_CUTLASS_PACKAGE}")
  execute_process(
    COMMAND python3 -m pip install --quiet --no-deps --target "${_pypi}" ${ZEBRA_CUTLASS_PACKAGE}
    RESULT_VARIABLE _failed)
  zebra_cutlass_candidate("${_pypi}/cutlass_library/source/include" "${ZEBRA_CUTLASS_PACKAGE}")
endif()
if(NOT CUTLASS_INCLUDE_DIR)
  message(FATAL_ERROR
    "zebra: CUTLASS headers not found. Set ZEBRA_CUTLASS_INCLUDE=<folder with cutlass/cutlass.h> or "
    "pip install --no-deps ${ZEBRA_CUTLASS_PACKAGE}")
endif()
