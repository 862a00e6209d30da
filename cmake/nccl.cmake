# eigenformer::nccl, what .cu files need for ef::NcclCommunicator, in a subproject and in the installed package alike. What is wrong is
# left in EIGENFORMER_NCCL_PROBLEM.
set(EIGENFORMER_NCCL_PROBLEM "")
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${NCCL_ROOT} $ENV{NCCL_ROOT} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} PATH_SUFFIXES include)
find_library(NCCL_LIBRARY nccl HINTS ${NCCL_ROOT} $ENV{NCCL_ROOT} ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} PATH_SUFFIXES lib lib64)
mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)
get_property(_eigenformer_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
if(NOT "CUDA" IN_LIST _eigenformer_languages)
  set(EIGENFORMER_NCCL_PROBLEM
    "eigenformer's component nccl needs the language CUDA before it is asked for: project(NAME LANGUAGES CXX CUDA).")
elseif(NOT NCCL_INCLUDE_DIR OR NOT NCCL_LIBRARY)
  set(EIGENFORMER_NCCL_PROBLEM "eigenformer's component nccl needs NCCL 2.14 or later, and found no nccl.h or no libnccl. "
    "Set NCCL_ROOT to the folder whose include and lib have them.")
elseif(NOT TARGET eigenformer::nccl)
  add_library(eigenformer::nccl INTERFACE IMPORTED ${EIGENFORMER_NCCL_SCOPE})
  set_target_properties(eigenformer::nccl PROPERTIES
    INTERFACE_LINK_LIBRARIES "eigenformer::eigenformer;$<TARGET_NAME_IF_EXISTS:eigenformer::cuda>;${NCCL_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${NCCL_INCLUDE_DIR}"
    INTERFACE_COMPILE_DEFINITIONS "$<$<COMPILE_LANGUAGE:CUDA>:EIGENFORMER_NCCL>")
endif()
