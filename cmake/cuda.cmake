# eigenformer::cuda, for targets with .cu files, in a subproject and in the installed package alike. What is wrong is left in
# EIGENFORMER_CUDA_PROBLEM. nvcc itself links CUDA's runtime, the one of CUDA_RUNTIME_LIBRARY.
set(EIGENFORMER_CUDA_PROBLEM "")
get_property(_eigenformer_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
if(NOT "CUDA" IN_LIST _eigenformer_languages)
  set(EIGENFORMER_CUDA_PROBLEM
    "eigenformer's component cuda needs the language CUDA before it is asked for: project(NAME LANGUAGES CXX CUDA). "
    "CMake then looks for nvcc of the CUDA toolkit, 12.0 or later, in the PATH, in CUDACXX and in CMAKE_CUDA_COMPILER.")
elseif(CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  set(EIGENFORMER_CUDA_PROBLEM "eigenformer's component cuda is C++20 and needs the CUDA toolkit 12.0 or later, "
    "but ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}. Set CMAKE_CUDA_COMPILER to a later nvcc.")
elseif(EIGENFORMER_CUBLASLT)  # include/eigenformer/cuda/gemm.cuh
  find_package(CUDAToolkit QUIET)
  if(NOT TARGET CUDA::cublasLt)
    set(EIGENFORMER_CUDA_PROBLEM "EIGENFORMER_CUBLASLT is on, but there is no cuBLASLt: install it, or set CUDAToolkit_ROOT.")
  endif()
endif()
if(NOT EIGENFORMER_CUDA_PROBLEM AND NOT TARGET eigenformer::cuda)
  add_library(eigenformer::cuda INTERFACE IMPORTED ${EIGENFORMER_CUDA_SCOPE})
  # Kernels of two lists of architectures must not meet in one program, nor units with cuBLASLt and without it: both are in the names of
  # all that is ours. C++20 by hand, because CMake 3.25 does not know the feature cuda_std_20 of nvcc 13; Eigen's and std's constexpr
  # functions are called in kernels. The library by its file: the target CUDA::cublasLt is not seen by all who see this one.
  set(_eigenformer_architectures "sm$<JOIN:$<TARGET_PROPERTY:CUDA_ARCHITECTURES>,_>$<$<BOOL:${EIGENFORMER_CUBLASLT}>:_cublaslt>")
  set_target_properties(eigenformer::cuda PROPERTIES
    INTERFACE_LINK_LIBRARIES "eigenformer::eigenformer;$<$<BOOL:${EIGENFORMER_CUBLASLT}>:${CUDA_cublasLt_LIBRARY}>"
    INTERFACE_COMPILE_DEFINITIONS "$<$<COMPILE_LANGUAGE:CUDA>:EIGEN_USE_GPU;$<$<BOOL:${EIGENFORMER_CUBLASLT}>:EIGENFORMER_CUBLASLT>;\
EIGENFORMER_CUDA_ARCHITECTURES_TAG=$<MAKE_C_IDENTIFIER:${_eigenformer_architectures}>>"
    INTERFACE_COMPILE_OPTIONS
      "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>;$<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:--expt-relaxed-constexpr>")
endif()
