/// \file
/// The best tag at run time: that of the build, unless it is amx and the operating system does not
/// grant the tile registers.
#pragma once

#include "isa.h"
#if defined(EIGENFORMER_ISA_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

#if defined(EIGENFORMER_ISA_AMX)
/// The processor has AMX with palette 1 as the kernels use it (8 tiles of 16 rows of 64 bytes:
/// CPUID 7 and 1D).
inline bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25,
                     all = bfloat16 | tile | int8;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & all) != all) return false;
  if (__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) == 0) return false;
  return (b & 0xffffu) == 64 && (b >> 16) == 8 && (c & 0xffffu) == 16;
}

/// Linux lends the 8 KiB of tile state to a process that asks (arch_prctl ARCH_REQ_XCOMP_PERM,
/// XTILEDATA), for all its threads. Asked once.
inline bool tiles_granted() {
#if defined(__linux__)
  static const bool granted = [] {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return has_tiles() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

/// f(the tag to use). One kernel family for all of a process's calls: their bits agree.
template <typename F>
decltype(auto) with_granted_isa(F&& f) {
#if defined(EIGENFORMER_ISA_AMX)
  if (!tiles_granted()) return f(isa::avx512{});
#endif
  return f(isa::best{});
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
