/// \file
/// Where a CPU kernel runs: an Eigen device, the instruction set, scratch memory. A kernel is
/// `execute(const Backend<D, Isa>&, const problem::X&)` in this namespace; the dispatch is
/// core/dispatch.h.
///
/// A backend may stand wherever an operator takes a device. It fixes the instruction set, which is
/// otherwise the best one of the build:
///
///   const auto avx2 = ef::cpu::backend(device, ef::isa::avx2{});   // the device must outlive it
///   ef::rms_norm(avx2, x, weight);
#pragma once

#include <type_traits>
#include <utility>

#include "../core/device.h"
#include "../core/workspace.h"
#include "parallel.h"
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

template <typename D, typename Isa>
struct Backend {
  using isa = Isa;
  const D& device;
  Workspace& workspace;
};

template <CpuDevice D, typename Isa>
Backend<D, Isa> backend(const D& device, Isa, Workspace& workspace = thread_workspace()) {
  return {device, workspace};
}
/// The device must outlive the backend: a temporary one is refused.
template <CpuDevice D, typename Isa>
  requires(!std::is_lvalue_reference_v<D>)
Backend<D, Isa> backend(D&& device, Isa, Workspace& = thread_workspace()) = delete;

template <typename D, typename Isa>
int worker_count(const Backend<D, Isa>& on) {
  return worker_count(on.device);
}
template <typename D, typename Isa>
Index part_count(const Backend<D, Isa>& on, Index count, Cost cost) {
  return part_count(on.device, count, cost);
}
template <typename D, typename Isa, typename Body>
void parallel_for(const Backend<D, Isa>& on, Index count, Cost cost, Body&& body) {
  parallel_for(on.device, count, cost, std::forward<Body>(body));
}

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

/// Whether kernels for a problem may use AMX tiles, which the operating system has to grant: a
/// problem says so by a member kUsesTiles.
template <typename Problem>
inline constexpr bool uses_tiles = requires { requires Problem::kUsesTiles; };

/// f(the tag to use): that of the build, unless it is amx and tiles are not granted. One kernel
/// family for all of a process's calls: their bits agree.
template <typename Problem, typename F>
decltype(auto) with_granted_isa(F&& f) {
#if defined(EIGENFORMER_ISA_AMX)
  if constexpr (uses_tiles<Problem>)
    if (!tiles_granted()) return f(eigenformer::isa::avx512_bf16{});
#endif
  return f(eigenformer::isa::best{});
}

}  // namespace cpu

template <typename D, typename Isa>
inline constexpr bool detail::is_cpu_device<cpu::Backend<D, Isa>> = true;

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
