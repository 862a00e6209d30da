/// \file
/// The only file that includes Eigen. It defines what Eigen's Tensor module needs before the first include, and says what to do
/// where another header was faster.
#pragma once

#if defined(EIGEN_CXX11_TENSOR_TENSOR_H) || \
    defined(EIGEN_TENSOR_TENSOR_H)  // guards of Eigen's Tensor class, 3.4 and 5
#if !defined(EIGEN_USE_THREADS)
#error \
    "eigenformer: Eigen's Tensor module was included before eigenformer without EIGEN_USE_THREADS, so half of it is missing. Link the CMake target eigenformer::eigenformer, define EIGEN_USE_THREADS for the whole program, or include <eigenformer/eigenformer.h> first."
#endif
#if defined(__CUDACC__) && !defined(EIGEN_USE_GPU)
#error \
    "eigenformer: Eigen's Tensor module was included before eigenformer without EIGEN_USE_GPU. Link the CMake target eigenformer::eigenformer, define EIGEN_USE_GPU for CUDA files, or include <eigenformer/eigenformer.h> first."
#endif
#endif

#if !defined(EIGEN_USE_THREADS)
#define EIGEN_USE_THREADS
#endif
#if defined(__CUDACC__) && !defined(EIGEN_USE_GPU)
#define EIGEN_USE_GPU
#endif
// Without this Eigen's allocator follows -m flags, and memory from one translation unit freed in
// another corrupts the heap: Eigen's functions have the same name in both.
#if !defined(EIGEN_MAX_ALIGN_BYTES)
#define EIGEN_MAX_ALIGN_BYTES 64
#elif EIGEN_MAX_ALIGN_BYTES != 64
#error \
    "eigenformer: EIGEN_MAX_ALIGN_BYTES is not 64. Either it was set so, or Eigen was included before eigenformer without it: Eigen then follows the -m flags of each file, and a tensor made in one file and freed in another corrupts the heap. Link the CMake target eigenformer::eigenformer, or define EIGEN_MAX_ALIGN_BYTES=64 for the whole program; including <eigenformer/eigenformer.h> before Eigen mends this file alone."
#endif

#if defined(__CUDACC__)
#pragma nv_diagnostic push
#pragma nv_diag_suppress 20011, 20012, 20013, 20014, 20015, 20208
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // g++ 12 sees ghosts in Eigen's inlined evaluators
#endif

#if __has_include(<unsupported/Eigen/Tensor>)  // Eigen 5
#include <unsupported/Eigen/Tensor>
#else
#include <unsupported/Eigen/CXX11/Tensor>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#if defined(__CUDACC__)
#pragma nv_diagnostic pop
#endif

#include <cstddef>
#include <type_traits>

static_assert(std::is_same_v<Eigen::Index, std::ptrdiff_t>,
              "eigenformer: Eigen::Index is not std::ptrdiff_t, so EIGEN_DEFAULT_DENSE_INDEX_TYPE "
              "was set. Tensors of eigenformer have sizes and strides of std::ptrdiff_t: take that "
              "definition away for the files that include eigenformer.");
