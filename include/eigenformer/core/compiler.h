/// \file
/// What differs by compiler (g++, clang, MSVC, nvcc), and the one place where compilers are told
/// apart, but for the assembly of the tiles, which stands with the instructions it names. What the
/// ISA decides is in core/isa.h.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#if defined(_MSC_VER)
#include <intrin.h>
#endif

/// Kernels are split into small functions that must not cost a call in the inner loop.
#if defined(__GNUC__) || defined(__clang__)
#define EIGENFORMER_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define EIGENFORMER_INLINE __forceinline
#else
#define EIGENFORMER_INLINE inline
#endif

/// For an inner loop that needs all registers: inlined into a large function g++ 12 leaves some of
/// its own calls, and with them its sums, in memory.
#if defined(__GNUC__) || defined(__clang__)
#define EIGENFORMER_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define EIGENFORMER_NOINLINE __declspec(noinline)
#else
#define EIGENFORMER_NOINLINE
#endif

/// Before a loop over the lanes of a vector: without it g++ 12 keeps vectors in memory at -O2,
/// where a dot product of 128 doubles then took 831 ns, and 35 with it (Zen 3). nvcc, which warns
/// of it, compiles no work for the CPU.
#if (defined(__GNUC__) || defined(__clang__)) && !defined(__CUDACC__)
#define EIGENFORMER_UNROLL _Pragma("GCC unroll 16")
#else
#define EIGENFORMER_UNROLL
#endif

/// EIGENFORMER_CUDA_UNIT is defined where nvcc compiles. EIGENFORMER_UNROLL_ALL stands before a
/// loop of a kernel over an array of one thread: only where every index is known is it in
/// registers.
#if defined(__CUDACC__)
#define EIGENFORMER_CUDA_UNIT 1
#define EIGENFORMER_UNROLL_ALL _Pragma("unroll")
#define EIGENFORMER_HOST_DEVICE __host__ __device__
#define EIGENFORMER_DEVICE __device__
#else
#define EIGENFORMER_UNROLL_ALL
#define EIGENFORMER_HOST_DEVICE
#define EIGENFORMER_DEVICE
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// result = a + b, where that fits an Integer; else false, and result stays what it was.
template <std::integral Integer>
constexpr bool add_fits(Integer a, Integer b, Integer& result) {
  using Limits = std::numeric_limits<Integer>;
  if (b > 0 ? a > (Limits::max)() - b : a < (Limits::min)() - b) return false;
  result = static_cast<Integer>(a + b);
  return true;
}

/// p + count, where there is memory: an empty tensor has none, and adding to nullptr is undefined.
template <typename T, std::integral Integer>
constexpr T* offset_by(T* p, Integer count) {
  return p == nullptr ? p : p + count;
}

/// std::memcpy that allows null pointers for nothing and a copy onto itself.
template <typename T, std::integral Integer>
void copy_elements(const T* source, T* target, Integer count) {
  if (count > 0 && source != target)
    std::memcpy(static_cast<void*>(target), source, static_cast<std::size_t>(count) * sizeof(T));
}

/// result = a * b, where that fits an Integer; else false, and result stays what it was.
template <std::integral Integer>
constexpr bool multiply_fits(Integer a, Integer b, Integer& result) {
  constexpr Integer least = (std::numeric_limits<Integer>::min)(),
                    greatest = (std::numeric_limits<Integer>::max)();
  // of an unsigned Integer the greatest
  constexpr Integer minus_one = static_cast<Integer>(Integer{0} - Integer{1});
  if (b > 0 && (a > greatest / b || a < least / b)) return false;
  if (b < 0 && (b == minus_one ? a < -greatest : a < greatest / b || a > least / b)) return false;
  result = static_cast<Integer>(a * b);
  return true;
}

/// Gives the core's other hardware thread its turn, and leaves a spin loop without the penalty of a
/// mispredicted exit.
inline void pause_instruction() {
#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
  _mm_pause();
#elif defined(_MSC_VER) && defined(_M_ARM64)
  __yield();
#elif defined(__x86_64__) || defined(__i386__)
  __asm__ __volatile__("pause");
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

/// Fetches the line at an address into L2 (L1 where Level is 3). An address is a number here,
/// because a fetch past the end of an array is harmless and a pointer there is not.
template <int Level = 2>
EIGENFORMER_INLINE void prefetch(std::uintptr_t address) {
  static_assert(Level == 2 || Level == 3);
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, Level);
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
  _mm_prefetch(reinterpret_cast<const char*>(address), Level == 3 ? _MM_HINT_T0 : _MM_HINT_T1);
#else
  (void)address;
#endif
}

/// Takes the line at an address from other cores, to be written here.
EIGENFORMER_INLINE void prefetch_to_write(std::uintptr_t address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(reinterpret_cast<const void*>(address), 1);
#else
  (void)address;
#endif
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
