// Peaks of the dot-product instructions. The only benchmark file with intrinsics and assembly: it
// measures instructions, not kernels. What the build has is asked of core/isa.h alone.
#include <eigenformer/core/isa.h>
#include <eigenformer/cpu/backend.h>

#include "machine_limits.h"

#if defined(EIGENFORMER_ISA_AVX2)
#include <immintrin.h>
#endif

namespace bench {
namespace {

constexpr int kRounds = 9;
// covers 2 units of 6 cycles latency, within 32 registers
[[maybe_unused]] constexpr int kChains = 16;
[[maybe_unused]] constexpr int kIterations = 200000;

[[maybe_unused]] double operations_per_second(int threads, double operations,
                                              const std::function<void(int)>& round) {
  return operations * threads / detail::seconds_together(threads, kRounds, round);
}

// Inline assembly instead of intrinsics: nothing is folded, and clang++-16 crashes on the loop of
// _mm512_dpbf16_ps.
#if defined(EIGENFORMER_ISA_AVX512_BF16)
double dpbf16ps_peak(int threads) {
  return operations_per_second(threads, 64.0 * kChains * kIterations, [](int) {
    const __m512 a = _mm512_setzero_ps(), b = a;
    __m512 chain[kChains];
    for (__m512& c : chain) c = a;
    for (int i = 0; i < kIterations; ++i)
      for (__m512& c : chain) asm volatile("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  });
}
#endif

#if defined(EIGENFORMER_ISA_AVX512_VNNI)
double dpbusd_peak(int threads) {
  return operations_per_second(threads, 128.0 * kChains * kIterations, [](int) {
    const __m512i a = _mm512_set1_epi32(0x01010101), b = a;
    __m512i chain[kChains];
    for (__m512i& c : chain) c = _mm512_setzero_si512();
    for (int i = 0; i < kIterations; ++i)
      for (__m512i& c : chain) asm volatile("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  });
}
#endif

// AVX2 multiplies bytes in three instructions, or in one where it has VNNI too. 12 chains fit its
// 16 registers.
#if defined(EIGENFORMER_ISA_AVX2) && !defined(EIGENFORMER_ISA_AVX512)
constexpr int kShortChains = 12;
#if defined(EIGENFORMER_ISA_AVX_VNNI)
double int8_peak_avx2(int threads) {
  return operations_per_second(threads, 64.0 * kShortChains * kIterations, [](int) {
    const __m256i a = _mm256_set1_epi32(0x01010101), b = a;
    __m256i chain[kShortChains];
    for (__m256i& c : chain) c = _mm256_setzero_si256();
    for (int i = 0; i < kIterations; ++i)
      for (__m256i& c : chain)
        asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  });
}
#else
double int8_peak_avx2(int threads) {
  return operations_per_second(threads, 64.0 * kShortChains * kIterations, [](int) {
    const __m256i a = _mm256_set1_epi32(0x01010101), b = a, ones = _mm256_set1_epi16(1);
    __m256i chain[kShortChains];
    for (__m256i& c : chain) c = _mm256_setzero_si256();
    for (int i = 0; i < kIterations; ++i)
      for (__m256i& c : chain) {
        __m256i product;
        asm volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(c), "=&x"(product)
                     : "x"(a), "x"(b), "x"(ones));
      }
  });
}
#endif
#endif

#if defined(EIGENFORMER_ISA_AMX)
/// Palette 1: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

/// Calls step() again and again with all eight tiles zero: 4 accumulators, 2 tiles of A and 2 of B,
/// so that 4 independent products cover the latency of one (52 cycles, one issued every 16).
template <typename Step>
void with_tiles(Step step) {
  const TileConfig config;
  // GCC 12's _tile_loadconfig declares 8 of the 64 bytes as read; the whole struct is the operand
  // here.
  asm volatile("ldtilecfg %0" ::"m"(config));
  asm volatile(
      "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
      "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7" ::);
  for (int i = 0; i < kIterations / 4; ++i) step();
  asm volatile("tilerelease" ::);
}

void amx_peaks(int threads, detail::DotPeaks& peaks) {
  constexpr double products = 4.0 * (kIterations / 4);
  peaks.bfloat16 = operations_per_second(threads, products * 2 * 16 * 16 * 32, [](int) {
    with_tiles([] {
      asm volatile(
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
    });
  });
  peaks.int8 = operations_per_second(threads, products * 2 * 16 * 16 * 64, [](int) {
    with_tiles([] {
      asm volatile(
          "tdpbssd %%tmm6, %%tmm4, %%tmm0\n\ttdpbssd %%tmm7, %%tmm4, %%tmm1\n\t"
          "tdpbssd %%tmm6, %%tmm5, %%tmm2\n\ttdpbssd %%tmm7, %%tmm5, %%tmm3" ::);
    });
  });
  peaks.instruction = "tdpbf16ps, tdpbssd";
}
#endif

}  // namespace

detail::DotPeaks detail::measure_dot_peaks([[maybe_unused]] int threads) {
  DotPeaks peaks;
#if defined(EIGENFORMER_ISA_AMX)
  if (eigenformer::cpu::tiles_granted()) {
    amx_peaks(threads, peaks);
    return peaks;
  }
#endif
#if defined(EIGENFORMER_ISA_AVX2) && !defined(EIGENFORMER_ISA_AVX512)
  peaks.int8 = int8_peak_avx2(threads);
#if defined(EIGENFORMER_ISA_AVX_VNNI)
  peaks.instruction = "vpdpbusd";
#else
  peaks.instruction = "vpmaddubsw, vpmaddwd, vpaddd";
#endif
#endif
#if defined(EIGENFORMER_ISA_AVX512_BF16)
  peaks.bfloat16 = dpbf16ps_peak(threads);
  peaks.instruction = "vdpbf16ps";
#endif
#if defined(EIGENFORMER_ISA_AVX512_VNNI)
  peaks.int8 = dpbusd_peak(threads);
  peaks.instruction += peaks.instruction.empty() ? "vpdpbusd" : ", vpdpbusd";
#endif
  return peaks;
}

}  // namespace bench
