/// \file
/// AMX for machines without it: on such a CPU every AMX instruction raises SIGILL, and the handler
/// here executes it, so that AMX kernels (intrinsics or assembly, unchanged) can be tested on any
/// Linux x86-64 machine. For tests only: one instruction costs 7 to 13 microseconds on a virtual
/// Zen 5, 7 of them the signal.
///
/// The tile registers are the thread's, as in hardware. Loads and stores are ordinary C++, so ASan
/// and TSan see what the tiles touch. A signal handler runs past the red zone, and the kernel saves
/// and restores vector registers and MXCSR around it.
///
/// Not emulated is what a program asks about AMX: CPUID, XCR0 and arch_prctl still say that there
/// is none. Neither are segment and address-size prefixes, AMX-FP16 and later, or the kernel's own
/// view of the tiles (ptrace, the signal frame). Where the CPU has AMX but Linux refuses the tile
/// data, ldtilecfg runs in hardware, unseen by the emulator, and the first tile instruction after
/// it stops the program.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#define EIGENFORMER_TEST_AMX_EMULATOR 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <csignal>
#include <mutex>

#include "amx_decoder.h"
#include "amx_tiles.h"
#endif

namespace eigenformer_test {

namespace amx {
inline constinit std::atomic<std::uint64_t> emulated{0};
}

/// How many instructions the emulator has executed in this process: proof that a kernel used AMX.
inline std::uint64_t amx_emulated_instructions() { return amx::emulated.load(); }

#if defined(EIGENFORMER_TEST_AMX_EMULATOR)

namespace amx {

// Constant initialisation and the initial-exec model: no allocation and no lazy set-up inside a
// signal handler.
[[gnu::tls_model("initial-exec")]] inline constinit thread_local Tiles tiles_of_thread{};

inline void execute(Tiles& tiles, const Instruction& i) {
  switch (i.op) {
    case Op::ldtilecfg:
      return ldtilecfg(tiles, reinterpret_cast<const void*>(i.address));
    case Op::sttilecfg:
      return sttilecfg(tiles, reinterpret_cast<void*>(i.address));
    case Op::tilerelease:
      return tilerelease(tiles);
    case Op::tilezero:
      return tilezero(tiles, i.c);
    case Op::tileloadd:
      return tileloadd(tiles, i.c, i.address, i.stride);
    case Op::tilestored:
      return tilestored(tiles, i.c, i.address, i.stride);
    case Op::tdpbf16ps:
      return tdpbf16ps(tiles, i.c, i.a, i.b);
    case Op::tdpbssd:
      return dot_bytes<std::int8_t, std::int8_t>(tiles, "tdpbssd", i.c, i.a, i.b);
    case Op::tdpbsud:
      return dot_bytes<std::int8_t, std::uint8_t>(tiles, "tdpbsud", i.c, i.a, i.b);
    case Op::tdpbusd:
      return dot_bytes<std::uint8_t, std::int8_t>(tiles, "tdpbusd", i.c, i.a, i.b);
    case Op::tdpbuud:
      return dot_bytes<std::uint8_t, std::uint8_t>(tiles, "tdpbuud", i.c, i.a, i.b);
  }
}

/// What SIGILL did before; written while no emulator is installed.
inline struct sigaction action_before {};

inline void on_illegal_instruction(int, siginfo_t* info, void* context) {
  greg_t* const saved = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};
  // sent by a process, not raised by an instruction: returning would lose it
  if (info->si_code <= 0) {
    sigaction(SIGILL, &action_before, nullptr);
    raise(SIGILL);
    return;
  }
  std::uint64_t registers[16];
  for (int i = 0; i < 16; ++i) registers[i] = static_cast<std::uint64_t>(saved[order[i]]);
  const auto instruction = decode(reinterpret_cast<const std::uint8_t*>(saved[REG_RIP]), registers);
  if (!instruction) {  // the instruction runs again and meets what it would have met
    sigaction(SIGILL, &action_before, nullptr);
    return;
  }
  execute(tiles_of_thread, *instruction);
  emulated.fetch_add(1, std::memory_order_relaxed);
  saved[REG_RIP] += instruction->length;
}

inline std::mutex installation;
inline int installed = 0;

}  // namespace amx

/// True where CPU and operating system have AMX tiles, int8 and bfloat16, and Linux grants this
/// process the tile data.
inline bool amx_in_hardware() {
  static const bool granted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kOsxsave = 1u << 27, kTilesInt8Bfloat16 = 1u << 24 | 1u << 25 | 1u << 22,
                       kTileState = 3u << 17;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsxsave) == 0) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTilesInt8Bfloat16) != kTilesInt8Bfloat16)
      return false;
    std::uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kTileState) != kTileState) return false;
    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

/// While one lives, AMX instructions of every thread are emulated. Several at a time count as one.
class AmxEmulator {
 public:
  AmxEmulator() {
    const std::lock_guard lock(amx::installation);
    if (amx::installed++ > 0) return;
    struct sigaction action {};
    action.sa_sigaction = amx::on_illegal_instruction;
    // SA_NODEFER: an illegal instruction inside the handler is a defect and shall reach whoever
    // comes next, not block.
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGILL, &action, &amx::action_before) != 0)
      amx::stop("AmxEmulator: sigaction failed\n");
  }
  ~AmxEmulator() {
    const std::lock_guard lock(amx::installation);
    if (--amx::installed == 0) sigaction(SIGILL, &amx::action_before, nullptr);
  }
  AmxEmulator(const AmxEmulator&) = delete;
  AmxEmulator& operator=(const AmxEmulator&) = delete;
};

/// From here on this process can execute AMX instructions, in hardware or emulated.
inline void provide_amx() {
  // Never destroyed: threads of a pool may outlive static objects.
  [[maybe_unused]] static const AmxEmulator* const emulator =
      amx_in_hardware() ? nullptr : new AmxEmulator;
}

#else

inline bool amx_in_hardware() { return false; }
inline void provide_amx() {}

#endif

}  // namespace eigenformer_test
