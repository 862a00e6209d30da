/// \file
/// Matrix tiles of AMX: eight registers of 16 rows of 64 bytes, and one instruction that multiplies
/// two of them into a third (16 x 16 sums, 32 bfloat16 or 64 int8 of k; 16 cycles).
///
/// The weights' panels are those of AVX-512: 16 steps of one, 32 columns wide, are two tiles in a
/// row, 2 KiB. Activations lie as [16 steps][row][step], so that a tile of them is contiguous. More
/// than 16 rows take two tiles of rows by one panel (4 sums, one load per product); fewer take one by
/// two panels, which keeps four loads of weights in flight where one token streams them.
///
/// bfloat16 (tdpbf16ps): in each 16 steps the even and the odd k of a pair are two chains of
/// multiply-adds from zero, whose sum is added to the accumulator; denormals count as zero. So the
/// link of a sum's chain is 32 k, counted from k = 0. int8 (tdpbsud): signed activations by
/// unsigned weights, exact modulo 2^32.
///
/// Inline assembly, because GCC 12's _tile_loadconfig declares 8 of its 64 bytes as read, and its
/// _tile_loadd no memory at all. Tiles are configured for each call and released after it: another
/// library in the process may use them too. Intel 64 and IA-32 Architectures Software Developer's
/// Manual, volume 1, chapter 18.
#pragma once

#if !defined(__GNUC__) && !defined(__clang__)
#error \
    "eigenformer: the AMX kernels are inline assembly of g++ and clang: build with one of them, or without AMX"
#endif

#include "avx512.h"
#include "product.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {
namespace amx {

constexpr int kRows = 16, kSteps = 16, kRowBytes = 64;

/// Palette 1. Tiles 0 to 3 hold sums, 4 and 5 activations, the others weights.
struct alignas(64) Config {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

struct Session {
  /// `low` rows in tiles 0, 1 and 4, `high` in 2, 3 and 5; 16 of all weights.
  Session(int low, int high, int weights_from) {
    Config config;
    for (int t = 0; t < 8; ++t) {
      const int rows = t >= weights_from ? kRows : t == 0 || t == 1 || t == 4 ? low : high;
      config.rows[t] = static_cast<std::uint8_t>(rows);
      config.row_bytes[t] = kRowBytes;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() { asm volatile("tilerelease" ::: "memory"); }
};

template <int Tile>
EIGENFORMER_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
EIGENFORMER_INLINE void load(const void* p, Index row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
EIGENFORMER_INLINE void store(void* p, Index row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}

}  // namespace amx

/// The operands of what AMX multiplies: see generic.h; it has no registers of its own.
template <typename T>
struct AmxDot {
  using Stored = T;
  using Unit = std::uint32_t;
  using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, std::int32_t, float>;
  static constexpr int rows = 2 * amx::kRows, vectors = 2, columns = 32, step = 4 / sizeof(T),
                       units = 1, fragment = 16 * step;
  static constexpr int steps_at_once = amx::kSteps;
  // Fetched with each 16 steps: a quarter of the panel's 2 KiB, so that four tiles of rows have
  // fetched what comes next.
  static constexpr int lines_ahead = 8;
};
struct Bfloat16Amx : AmxDot<bfloat16> {
  template <int C, int A, int B>
  static EIGENFORMER_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
struct Int8Amx : AmxDot<std::int8_t> {
  static constexpr bool unsigned_weights = true;
  template <int C, int A, int B>
  static EIGENFORMER_INLINE void multiply_add() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

template <typename Dot>
concept Amx = std::same_as<Dot, Bfloat16Amx> || std::same_as<Dot, Int8Amx>;

namespace amx {

template <int Tile>
EIGENFORMER_INLINE void start(const void* sums, Index row_bytes, bool from_zero) {
  from_zero ? zero<Tile>() : load<Tile>(sums, row_bytes);
}

/// 17 to 32 rows by one panel; fetches lines from `ahead` on.
template <Amx Dot>
void two_by_two(int height, const std::byte* a, const std::byte* b, Index steps,
                typename Dot::Sum* sums, bool from_zero, std::uintptr_t ahead) {
  constexpr Index sum_bytes = Dot::columns * sizeof(typename Dot::Sum), panel_bytes = 2 * kRowBytes;
  const Index a_bytes = Index{height} * kRowBytes;
  auto* low = reinterpret_cast<std::byte*>(sums);
  auto* high = low + kRows * sum_bytes;
  const Session session(kRows, height - kRows, 6);
  start<0>(low, sum_bytes, from_zero);
  start<1>(low + kRowBytes, sum_bytes, from_zero);
  start<2>(high, sum_bytes, from_zero);
  start<3>(high + kRowBytes, sum_bytes, from_zero);
  for (Index s = 0; s < steps; s += kSteps, a += a_bytes, b += kSteps * panel_bytes) {
    load<6>(b, panel_bytes);
    load<4>(a, kRowBytes);
    Dot::template multiply_add<0, 4, 6>();
    load<5>(a + kRows * kRowBytes, kRowBytes);
    Dot::template multiply_add<2, 5, 6>();
    load<7>(b + kRowBytes, panel_bytes);
    Dot::template multiply_add<1, 4, 7>();
    Dot::template multiply_add<3, 5, 7>();
    unroll<Dot::lines_ahead>([&](auto line) { simd::prefetch(ahead + line * kLineBytes); });
    ahead += Dot::lines_ahead * kLineBytes;
  }
  store<0>(low, sum_bytes);
  store<1>(low + kRowBytes, sum_bytes);
  store<2>(high, sum_bytes);
  store<3>(high + kRowBytes, sum_bytes);
}

/// 1 to 16 rows by one or two panels.
template <Amx Dot, int Panels>
void one_by_four(int height, const std::byte* a, const std::byte* b, Index panel_bytes, Index steps,
                 typename Dot::Sum* sums, Index sums_stride, bool from_zero) {
  constexpr Index sum_bytes = Dot::columns * sizeof(typename Dot::Sum), line = 2 * kRowBytes;
  const Index a_bytes = Index{height} * kRowBytes;
  auto* first = reinterpret_cast<std::byte*>(sums);
  auto* second = reinterpret_cast<std::byte*>(sums + sums_stride);
  const Session session(height, height, 5);
  start<0>(first, sum_bytes, from_zero);
  start<1>(first + kRowBytes, sum_bytes, from_zero);
  if constexpr (Panels == 2) {
    start<2>(second, sum_bytes, from_zero);
    start<3>(second + kRowBytes, sum_bytes, from_zero);
  }
  for (Index s = 0; s < steps; s += kSteps, a += a_bytes, b += kSteps * line) {
    load<4>(a, kRowBytes);
    load<5>(b, line);
    Dot::template multiply_add<0, 4, 5>();
    load<6>(b + kRowBytes, line);
    Dot::template multiply_add<1, 4, 6>();
    if constexpr (Panels == 2) {
      load<7>(b + panel_bytes, line);
      Dot::template multiply_add<2, 4, 7>();
      load<5>(b + panel_bytes + kRowBytes, line);
      Dot::template multiply_add<3, 4, 5>();
    }
  }
  store<0>(first, sum_bytes);
  store<1>(first + kRowBytes, sum_bytes);
  if constexpr (Panels == 2) {
    store<2>(second, sum_bytes);
    store<3>(second + kRowBytes, sum_bytes);
  }
}

}  // namespace amx

/// Any height: a tile has as many rows as it is configured for.
template <Amx Dot>
constexpr int tile_height(Index rows) {
  return static_cast<int>(std::min<Index>(rows, Dot::rows));
}

/// See product.h. steps is a multiple of 16; operands are zero beyond the true k.
template <Amx Dot>
void tile_products(int height, const TileOperands<Dot>& at, Index steps, typename Dot::Sum* sums,
                   Index sums_stride, Index panels, bool from_zero) {
  const auto* rows = reinterpret_cast<const std::byte*>(at.a);
  const auto* weights = reinterpret_cast<const std::byte*>(at.b);
  const Index panel_bytes = at.panel_stride * static_cast<Index>(sizeof(typename Dot::Stored));
  Index p = 0;
  if (height > amx::kRows) {
    for (; p < panels; ++p)
      amx::two_by_two<Dot>(height, rows, weights + p * panel_bytes, steps, sums + p * sums_stride,
                           from_zero, at.ahead);
    return;
  }
  for (; p + 2 <= panels; p += 2)
    amx::one_by_four<Dot, 2>(height, rows, weights + p * panel_bytes, panel_bytes, steps,
                             sums + p * sums_stride, sums_stride, from_zero);
  if (p < panels)
    amx::one_by_four<Dot, 1>(height, rows, weights + p * panel_bytes, panel_bytes, steps,
                             sums + p * sums_stride, sums_stride, from_zero);
}

template <Amx Dot, typename F>
void for_each_tile_sum(int height, const TileOperands<Dot>& at, Index steps, Index panels,
                       typename Dot::Sum* scratch, const F& f) {
  using V = simd::vec<float, isa::avx512>;
  const Index stride = Index{height} * Dot::columns;
  tile_products<Dot>(height, at, steps, scratch, stride, panels, true);
  for (Index p = 0; p < panels; ++p)
    for (int r = 0; r < height; ++r)
      for (int v = 0; v < Dot::vectors; ++v)
        f(p, r, v, V::load(scratch + p * stride + r * Dot::columns + v * V::lanes));
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
