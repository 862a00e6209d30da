/// \file
/// The one file that reads compiler feature macros. It yields the ISA tags (`isa::Known`), those
/// this translation unit may call (`isa::Callable`), the best of them, and the names of two inline
/// namespaces: that of the ISA, in which everything lives but problems, and that of the version, in
/// which these do.
///
/// Tags inherit what they fall back to:
///
///   generic <- avx2 <- avx_vnni
///              avx2 <- avx512 <- avx512_vnni <- avx512_bf16 <- amx
///   generic <- neon <- neon_dotprod
///
/// A kernel written for a tag serves every tag that inherits from it, and a unit may call all that
/// its best tag inherits from, so that one build with VNNI tests AVX-512 without it, AVX2 and plain
/// C++ as well. EIGENFORMER_ISA_X is defined where tag x may be called: what names its instructions
/// stands under it. One more ISA is one macro, one tag and a file of cmake/isa.
///
/// A CUDA translation unit always gets `generic`: nvcc never parses CPU intrinsics.
#pragma once

#include <type_traits>

#include "version.h"

// NaN and infinity carry meaning here (masks, padding, overflow checks), sums have one fixed order,
// and -0 is not 0: a compiler that may assume otherwise takes the checks out and spoils the
// results.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) ||                     \
    defined(__NO_SIGNED_ZEROS__) || defined(_M_FP_FAST)
#error \
    "eigenformer: -ffast-math (or a part of it: -Ofast, -ffinite-math-only, -funsafe-math-optimizations, /fp:fast) breaks what the library guarantees. Build the files that include it with -fno-fast-math (MSVC: /fp:precise); other files may keep the flag. -fno-math-errno and -fno-trapping-math are welcome."
#endif

// MSVC's /arch:AVX2 stands for FMA and F16C as well, but names neither.
#if defined(_MSC_VER) && !defined(__clang__) && defined(__AVX2__)
#define EIGENFORMER_ISA_HAS_AVX2_FMA_F16C 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define EIGENFORMER_ISA_HAS_AVX2_FMA_F16C 1
#endif

#if defined(__CUDACC__)
#define EIGENFORMER_ISA_GENERIC 1
#elif defined(EIGENFORMER_ISA_HAS_AVX2_FMA_F16C)
#define EIGENFORMER_ISA_AVX2 1
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define EIGENFORMER_ISA_AVX512 1
#endif
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define EIGENFORMER_ISA_NEON 1
#else
#define EIGENFORMER_ISA_GENERIC 1
#endif

#if defined(EIGENFORMER_ISA_AVX2) && defined(__AVXVNNI__)
#define EIGENFORMER_ISA_AVX_VNNI 1
#endif
#if defined(EIGENFORMER_ISA_AVX512) && defined(__AVX512VNNI__)
#define EIGENFORMER_ISA_AVX512_VNNI 1
#endif
#if defined(EIGENFORMER_ISA_AVX512_VNNI) && defined(__AVX512BF16__)
#define EIGENFORMER_ISA_AVX512_BF16 1
#endif
#if defined(EIGENFORMER_ISA_AVX512_BF16) && defined(__x86_64__) && defined(__AMX_TILE__) && \
    defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define EIGENFORMER_ISA_AMX 1
#endif
#if defined(EIGENFORMER_ISA_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define EIGENFORMER_ISA_NEON_DOTPROD 1
#endif

#if defined(EIGENFORMER_ISA_AMX)
#define EIGENFORMER_ISA_BEST amx
#elif defined(EIGENFORMER_ISA_AVX512_BF16)
#define EIGENFORMER_ISA_BEST avx512_bf16
#elif defined(EIGENFORMER_ISA_AVX512_VNNI)
#define EIGENFORMER_ISA_BEST avx512_vnni
#elif defined(EIGENFORMER_ISA_AVX512)
#define EIGENFORMER_ISA_BEST avx512
#elif defined(EIGENFORMER_ISA_AVX_VNNI)
#define EIGENFORMER_ISA_BEST avx_vnni
#elif defined(EIGENFORMER_ISA_AVX2)
#define EIGENFORMER_ISA_BEST avx2
#elif defined(EIGENFORMER_ISA_NEON_DOTPROD)
#define EIGENFORMER_ISA_BEST neon_dotprod
#elif defined(EIGENFORMER_ISA_NEON)
#define EIGENFORMER_ISA_BEST neon
#else
#define EIGENFORMER_ISA_BEST generic
#endif

// Objects compiled for different ISAs, or from different versions of these headers, link into one
// program: each version and each feature set changes the code, so each has a name of its own, for
// example v0_1_0_avx2: the best tag, and what the compiler may use besides.
#define EIGENFORMER_ABI_JOIN_(a, b) a##b
#define EIGENFORMER_ABI_JOIN(a, b) EIGENFORMER_ABI_JOIN_(a, b)
#define EIGENFORMER_ABI_VERSION_(major, minor, patch) v##major##_##minor##_##patch
#define EIGENFORMER_ABI_VERSION(major, minor, patch) EIGENFORMER_ABI_VERSION_(major, minor, patch)
// Problems and what they name are data that every unit of a version agrees on: their types carry
// the version alone (v0_1_0). A function beside them is EIGENFORMER_INLINE, for units of different
// flags would emit it under one name.
#define EIGENFORMER_VERSION_NAMESPACE                                           \
  EIGENFORMER_ABI_VERSION(EIGENFORMER_VERSION_MAJOR, EIGENFORMER_VERSION_MINOR, \
                          EIGENFORMER_VERSION_PATCH)
#if defined(__CUDACC__)
#if defined(EIGENFORMER_CUDA_ARCHITECTURES_TAG)  // set by the CMake target, for example sm80_90
#define EIGENFORMER_ABI_BASE EIGENFORMER_ABI_JOIN(_cuda_, EIGENFORMER_CUDA_ARCHITECTURES_TAG)
#else
#define EIGENFORMER_ABI_BASE _cuda
#endif
#elif !defined(EIGENFORMER_ISA_GENERIC)
#define EIGENFORMER_ABI_BASE EIGENFORMER_ABI_JOIN(_, EIGENFORMER_ISA_BEST)
#else  // the compiler may use these in generic kernels
#if defined(__AVX512F__)
#define EIGENFORMER_ABI_VECTORS _generic_avx512f
#elif defined(__AVX2__)
#define EIGENFORMER_ABI_VECTORS _generic_avx2
#elif defined(__AVX__)
#define EIGENFORMER_ABI_VECTORS _generic_avx
#elif defined(__SSE4_2__)
#define EIGENFORMER_ABI_VECTORS _generic_sse42
#elif defined(__SSE4_1__)
#define EIGENFORMER_ABI_VECTORS _generic_sse41
#elif defined(__SSSE3__)
#define EIGENFORMER_ABI_VECTORS _generic_ssse3
#elif defined(__SSE3__)
#define EIGENFORMER_ABI_VECTORS _generic_sse3
#else
#define EIGENFORMER_ABI_VECTORS _generic
#endif
#if defined(__FMA__)
#define EIGENFORMER_ABI_BASE EIGENFORMER_ABI_JOIN(EIGENFORMER_ABI_VECTORS, _fma)
#else
#define EIGENFORMER_ABI_BASE EIGENFORMER_ABI_VECTORS
#endif
#endif
#if defined(EIGENFORMER_ISA_AVX512) && defined(EIGENFORMER_ISA_AVX_VNNI)
#define EIGENFORMER_ABI_ISA EIGENFORMER_ABI_JOIN(EIGENFORMER_ABI_BASE, _avxvnni)
#elif defined(EIGENFORMER_ISA_NEON) && defined(__ARM_FEATURE_FP16_SCALAR_ARITHMETIC)
// Eigen::half holds an __fp16 then, which calls pass in another register.
#define EIGENFORMER_ABI_ISA EIGENFORMER_ABI_JOIN(EIGENFORMER_ABI_BASE, _fp16)
#else
#define EIGENFORMER_ABI_ISA EIGENFORMER_ABI_BASE
#endif

// Without exceptions errors go to a handler (core/error.h), so functions differ there as well.
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define EIGENFORMER_HAS_EXCEPTIONS 1
#define EIGENFORMER_ABI_ERRORS EIGENFORMER_ABI_ISA
#else
#define EIGENFORMER_ABI_ERRORS EIGENFORMER_ABI_JOIN(EIGENFORMER_ABI_ISA, _noexcept)
#endif
// Without run-time types the exceptions of ours have none.
#if defined(__cpp_rtti) || defined(__GXX_RTTI) || defined(_CPPRTTI)
#define EIGENFORMER_ABI_UNIT EIGENFORMER_ABI_ERRORS
#else
#define EIGENFORMER_ABI_UNIT EIGENFORMER_ABI_JOIN(EIGENFORMER_ABI_ERRORS, _nortti)
#endif
#define EIGENFORMER_ABI EIGENFORMER_ABI_JOIN(EIGENFORMER_VERSION_NAMESPACE, EIGENFORMER_ABI_UNIT)

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Tags that choose a kernel at compile time. A tag converts to the one it inherits from, so
/// overload resolution picks the most specific kernel that exists.
namespace isa {

struct generic {
  static constexpr const char* name = "generic";
};
struct avx2 : generic {
  static constexpr const char* name = "avx2";
};
struct avx_vnni : avx2 {
  static constexpr const char* name = "avx_vnni";
};
struct avx512 : avx2 {
  static constexpr const char* name = "avx512";
};
struct avx512_vnni : avx512 {
  static constexpr const char* name = "avx512_vnni";
};
struct avx512_bf16 : avx512_vnni {
  static constexpr const char* name = "avx512_bf16";
};
struct amx : avx512_bf16 {
  static constexpr const char* name = "amx";
};
struct neon : generic {
  static constexpr const char* name = "neon";
};
struct neon_dotprod : neon {
  static constexpr const char* name = "neon_dotprod";
};

/// The best tag this translation unit may call, and the one that operators use.
using best = EIGENFORMER_ISA_BEST;

template <typename... Tags>
struct List {};

/// Every tag there is; each has a file in cmake/isa of its name.
using Known =
    List<generic, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx, neon, neon_dotprod>;

/// Whether this translation unit may call a tag. best need not inherit from avx_vnni to have it.
#if defined(EIGENFORMER_ISA_AVX_VNNI)
template <typename Tag>
inline constexpr bool callable = std::is_base_of_v<Tag, best> || std::is_same_v<Tag, avx_vnni>;
#else
template <typename Tag>
inline constexpr bool callable = std::is_base_of_v<Tag, best>;
#endif

namespace detail {
template <typename Kept, typename Rest>
struct OnlyCallable {
  using type = Kept;
};
template <typename... Kept, typename Tag, typename... Rest>
struct OnlyCallable<List<Kept...>, List<Tag, Rest...>>
    : OnlyCallable<std::conditional_t<callable<Tag>, List<Kept..., Tag>, List<Kept...>>,
                   List<Rest...>> {};
}  // namespace detail

/// The tags this translation unit may call.
using Callable = detail::OnlyCallable<List<>, Known>::type;

/// True where a multiply-add is one instruction. Where it is not, kernels multiply and add in two
/// rounding steps.
#if defined(__FMA__) || defined(EIGENFORMER_ISA_AVX2) || defined(EIGENFORMER_ISA_NEON)
inline constexpr bool kHasFma = true;
#else
inline constexpr bool kHasFma = false;
#endif

}  // namespace isa
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
