# CUDA specializations: nvcc, one list of architectures a program (kernels of two lists must not meet in one), named in the ABI tag.
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(NOT CMAKE_CUDA_ARCHITECTURES OR CMAKE_CUDA_ARCHITECTURES STREQUAL "52")
  set(CMAKE_CUDA_ARCHITECTURES 80 90)
endif()
target_compile_features(eigenformer INTERFACE cuda_std_20)
string(REPLACE ";" "_" _eigenformer_architectures "${CMAKE_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "[^A-Za-z0-9_]" "" _eigenformer_architectures "${_eigenformer_architectures}")
target_compile_definitions(eigenformer INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:EIGENFORMER_CUDA_ARCHITECTURES_TAG=sm${_eigenformer_architectures}>")
# Eigen's and std's constexpr functions are called in kernels.
target_compile_options(eigenformer INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
target_link_libraries(eigenformer INTERFACE CUDA::cudart)
