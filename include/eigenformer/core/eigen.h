/// \file
/// The only file that includes Eigen. It defines what Eigen's Tensor module needs before the first
/// include, and says what to do where another header was faster.
#pragma once

#if defined(EIGEN_CXX11_TENSOR_TENSOR_H) || \
    defined(EIGEN_TENSOR_TENSOR_H)  // guards of Eigen's Tensor class, 3.4 and 5
#if !defined(EIGEN_USE_THREADS)
#error \
    "eigenformer: Eigen's Tensor module was included before eigenformer without EIGEN_USE_THREADS, so half of it is missing. Link the CMake target eigenformer::eigenformer, define EIGEN_USE_THREADS for the whole program, or include <eigenformer/eigenformer.h> first."
#endif
#if defined(__CUDACC__) && !defined(EIGEN_USE_GPU)
#error \
    "eigenformer: Eigen's Tensor module was included before eigenformer without EIGEN_USE_GPU. Link the CMake target eigenformer::cuda, define EIGEN_USE_GPU for CUDA files, or include <eigenformer/eigenformer.h> first."
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

// Names that Eigen uses and that other people's headers define as macros (X11's Success, Apple's
// check, ...) are put aside while it is read.
#pragma push_macro("Success")
#undef Success
#pragma push_macro("None")
#undef None
#pragma push_macro("Status")
#undef Status
#pragma push_macro("Complex")
#undef Complex
#pragma push_macro("Bool")
#undef Bool
#pragma push_macro("True")
#undef True
#pragma push_macro("False")
#undef False
#pragma push_macro("Always")
#undef Always
#pragma push_macro("check")
#undef check
#pragma push_macro("verify")
#undef verify
#pragma push_macro("require")
#undef require
#pragma push_macro("min")
#undef min
#pragma push_macro("max")
#undef max
#pragma push_macro("slots")
#undef slots
#pragma push_macro("signals")
#undef signals
#pragma push_macro("emit")
#undef emit
#pragma push_macro("foreach")
#undef foreach
#pragma push_macro("small")
#undef small
#pragma push_macro("near")
#undef near
#pragma push_macro("far")
#undef far
#pragma push_macro("I")
#undef I
#if __has_include(<unsupported/Eigen/Tensor>)  // Eigen 5
#include <unsupported/Eigen/Tensor>
#else
#include <unsupported/Eigen/CXX11/Tensor>
#endif
#pragma pop_macro("Success")
#pragma pop_macro("None")
#pragma pop_macro("Status")
#pragma pop_macro("Complex")
#pragma pop_macro("Bool")
#pragma pop_macro("True")
#pragma pop_macro("False")
#pragma pop_macro("Always")
#pragma pop_macro("check")
#pragma pop_macro("verify")
#pragma pop_macro("require")
#pragma pop_macro("min")
#pragma pop_macro("max")
#pragma pop_macro("slots")
#pragma pop_macro("signals")
#pragma pop_macro("emit")
#pragma pop_macro("foreach")
#pragma pop_macro("small")
#pragma pop_macro("near")
#pragma pop_macro("far")
#pragma pop_macro("I")

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
