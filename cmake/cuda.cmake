# CUDA specializations: nvcc, one list of architectures per program (kernels of two lists must not meet in one), named in the ABI tag.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
string(REPLACE ";" "_" _eigenformer_architectures "${CMAKE_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "[^A-Za-z0-9_]" "" _eigenformer_architectures "${_eigenformer_architectures}")
if(EIGENFORMER_CUBLASLT)  # include/eigenformer/cuda/gemm.cuh; units with it and without it must not meet either
  string(APPEND _eigenformer_architectures _cublaslt)
  target_compile_definitions(eigenformer INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:EIGENFORMER_CUBLASLT>")
  target_link_libraries(eigenformer INTERFACE CUDA::cublasLt)
endif()
target_compile_definitions(eigenformer INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:EIGENFORMER_CUDA_ARCHITECTURES_TAG=sm${_eigenformer_architectures}>")
# C++20 by hand, because CMake 3.25 does not know the feature cuda_std_20 of nvcc 13; Eigen's and std's constexpr functions are called in kernels.
target_compile_options(eigenformer INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--expt-relaxed-constexpr>")
target_link_libraries(eigenformer INTERFACE CUDA::cudart)
