/// \file
/// What the AMX instructions do, as plain functions on a tile state: palette 1, eight tiles of at
/// most 16 rows of 64 bytes.
///
/// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, the "Operation"
/// sections of LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD/TILELOADDT1, TILESTORED,
/// TDPBSSD/TDPBSUD/TDPBUSD/TDPBUUD and TDPBF16PS, and the exception classes AMX-E1 to AMX-E6; the
/// same text is at https://felixcloutier.com/x86/tdpbf16ps and its neighbours. What hardware
/// answers with #GP or #UD ends the program here with a line on stderr that names the instruction
/// and the shapes.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace eigenformer_test::amx {

inline constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

/// The tile registers of one thread. Trivial, so that a thread's copy needs no constructor and a
/// signal handler may touch it.
struct Tiles {
  bool configured = false;
  std::uint8_t start_row = 0;
  std::uint16_t row_bytes[kTiles] = {};
  std::uint8_t rows[kTiles] = {};
  alignas(64) std::uint8_t data[kTiles][kMaxRows][kMaxRowBytes] = {};
};

[[noreturn, gnu::format(printf, 1, 2)]] inline void stop(const char* format, ...) {
  char text[320];
  std::va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (length > 0 && write(2, text, static_cast<std::size_t>(length)) < 0)
    std::abort();  // it ends here either way
  std::abort();
}

inline void ldtilecfg(Tiles& tiles, const void* memory) {
  std::uint8_t config[64];
  std::memcpy(config, memory, sizeof(config));
  if (config[0] > 1) stop("ldtilecfg: palette %d (#GP)\n", config[0]);
  Tiles next;
  if (config[0] == 1) {
    for (int i = 2; i < 64; ++i)
      if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && config[i] != 0)
        stop("ldtilecfg: reserved byte %d is %d (#GP)\n", i, config[i]);
    next.configured = true;
    next.start_row = config[1];
    std::memcpy(next.row_bytes, config + 16, sizeof(next.row_bytes));
    std::memcpy(next.rows, config + 48, sizeof(next.rows));
    for (int t = 0; t < kTiles; ++t)
      if (next.rows[t] > kMaxRows || next.row_bytes[t] > kMaxRowBytes ||
          (next.rows[t] == 0) != (next.row_bytes[t] == 0))
        stop("ldtilecfg: tmm%d of %d rows x %d bytes (#GP)\n", t, next.rows[t], next.row_bytes[t]);
  }
  tiles = next;
}

inline void sttilecfg(const Tiles& tiles, void* memory) {
  std::uint8_t config[64] = {};
  if (tiles.configured) {
    config[0] = 1;
    config[1] = tiles.start_row;
    std::memcpy(config + 16, tiles.row_bytes, sizeof(tiles.row_bytes));
    std::memcpy(config + 48, tiles.rows, sizeof(tiles.rows));
  }
  std::memcpy(memory, config, sizeof(config));
}

inline void tilerelease(Tiles& tiles) { tiles = Tiles{}; }

inline void check_valid(const Tiles& tiles, const char* name, int t) {
  if (!tiles.configured) stop("%s tmm%d: no tile is configured (#UD)\n", name, t);
  if (tiles.rows[t] == 0)
    stop("%s tmm%d: this tile has no rows in the configuration (#UD)\n", name, t);
}

inline void tilezero(Tiles& tiles, int t) {
  check_valid(tiles, "tilezero", t);
  std::memset(tiles.data[t], 0, sizeof(tiles.data[t]));
  tiles.start_row = 0;
}

inline void check_moved(const Tiles& tiles, const char* name, int t) {
  check_valid(tiles, name, t);
  if (tiles.row_bytes[t] % 4 != 0 || tiles.start_row >= tiles.rows[t])
    stop("%s tmm%d: %d rows x %d bytes, start row %d (#UD)\n", name, t, tiles.rows[t],
         tiles.row_bytes[t], tiles.start_row);
}

/// Reads the tile's rows from address, address + stride, ... The rest of the tile becomes zero.
inline void tileloadd(Tiles& tiles, int t, std::uint64_t address, std::uint64_t stride) {
  check_moved(tiles, "tileloadd", t);
  if (tiles.start_row == 0) std::memset(tiles.data[t], 0, sizeof(tiles.data[t]));
  for (std::uint64_t row = tiles.start_row; row < tiles.rows[t]; ++row)
    std::memcpy(tiles.data[t][row], reinterpret_cast<const void*>(address + row * stride),
                tiles.row_bytes[t]);
  tiles.start_row = 0;
}

inline void tilestored(Tiles& tiles, int t, std::uint64_t address, std::uint64_t stride) {
  check_moved(tiles, "tilestored", t);
  for (std::uint64_t row = tiles.start_row; row < tiles.rows[t]; ++row)
    std::memcpy(reinterpret_cast<void*>(address + row * stride), tiles.data[t][row],
                tiles.row_bytes[t]);
  tiles.start_row = 0;
}

/// c (m, n) += a (m, k) * b (k, n): the shapes a product needs, elements of 4 bytes each.
inline void check_product(const Tiles& tiles, const char* name, int c, int a, int b) {
  const char* wrong = nullptr;
  const auto multiple_of_4 = [&](int t) { return tiles.row_bytes[t] % 4 == 0; };
  if (!tiles.configured)
    wrong = "no tile is configured";
  else if (c == a || c == b || a == b)
    wrong = "the three tiles must differ";
  else if (tiles.rows[c] == 0 || tiles.rows[a] == 0 || tiles.rows[b] == 0)
    wrong = "a tile has no rows in the configuration";
  else if (!multiple_of_4(c) || !multiple_of_4(a) || !multiple_of_4(b))
    wrong = "row bytes must be a multiple of 4";
  else if (tiles.rows[c] != tiles.rows[a])
    wrong = "the rows of the first and the second tile differ";
  else if (tiles.row_bytes[c] != tiles.row_bytes[b])
    wrong = "the columns of the first and the third tile differ";
  else if (tiles.row_bytes[a] / 4 != tiles.rows[b])
    wrong = "the second tile's columns of 4 bytes are not the third tile's rows";
  if (wrong == nullptr) return;
  stop("%s tmm%d (%d rows x %d bytes) += tmm%d (%d x %d) * tmm%d (%d x %d): %s (#UD)\n", name, c,
       tiles.rows[c], tiles.row_bytes[c], a, tiles.rows[a], tiles.row_bytes[a], b, tiles.rows[b],
       tiles.row_bytes[b], wrong);
}

/// Writes 16 results into row m of tile c, zero past the tile's columns.
template <typename T>
void write_row_and_zero(Tiles& tiles, int c, int m, const T (&result)[16]) {
  std::memset(tiles.data[c][m], 0, kMaxRowBytes);
  std::memcpy(tiles.data[c][m], result, tiles.row_bytes[c]);
}

/// tdpbssd, tdpbsud, tdpbusd, tdpbuud: A and B are std::int8_t or std::uint8_t. int32 wraps, as the
/// instruction does.
template <typename A, typename B>
void dot_bytes(Tiles& tiles, const char* name, int c, int a, int b) {
  check_product(tiles, name, c, a, b);
  std::uint32_t wide[kMaxRows][4]
                    [16];  // b widened and with the bytes apart, so that 16 columns are one vector
  for (int k = 0; k < kMaxRows; ++k)
    for (int i = 0; i < 4; ++i)
      for (int n = 0; n < 16; ++n)
        wide[k][i][n] = static_cast<std::uint32_t>(static_cast<B>(tiles.data[b][k][4 * n + i]));
  for (int m = 0; m < tiles.rows[c]; ++m) {
    std::uint32_t sum[16];
    std::memcpy(sum, tiles.data[c][m], sizeof(sum));
    for (int k = 0; k < tiles.row_bytes[a] / 4; ++k)
      for (int i = 0; i < 4; ++i) {
        const auto x = static_cast<std::uint32_t>(static_cast<A>(tiles.data[a][m][4 * k + i]));
        for (int n = 0; n < 16; ++n) sum[n] += x * wide[k][i][n];
      }
    write_row_and_zero(tiles, c, m, sum);
  }
  tiles.start_row = 0;
}

/// MXCSR as TDPBF16PS computes whatever the program's is: denormals are zero in operands and
/// results, to nearest even, no traps.
class FlushDenormals {
 public:
  FlushDenormals() {
    asm volatile("stmxcsr %0" : "=m"(saved_)::"memory");
    const std::uint32_t flush = 0x9fc0;
    asm volatile("ldmxcsr %0" ::"m"(flush) : "memory");
  }
  ~FlushDenormals() { asm volatile("ldmxcsr %0" ::"m"(saved_) : "memory"); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  std::uint32_t saved_;
};

/// The arithmetic of TDPBF16PS alone. Not inlined, so that none of it is moved out of the life of
/// FlushDenormals.
[[gnu::noinline]] inline void multiply_bfloat16(int rows, int pairs, float (*c)[16],
                                                const float (*a)[32], const float (*b)[2][16]) {
  for (int m = 0; m < rows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < pairs; ++k) {
      const float x = a[m][2 * k], y = a[m][2 * k + 1];
      for (int n = 0; n < 16; ++n) even[n] = std::fma(x, b[k][0][n], even[n]);
      for (int n = 0; n < 16; ++n) odd[n] = std::fma(y, b[k][1][n], odd[n]);
    }
    for (int n = 0; n < 16; ++n) c[m][n] += even[n] + odd[n];
  }
}

/// The float whose upper half is the 2 bytes at `bytes`.
inline float widen_bfloat16(const std::uint8_t* bytes) {
  const std::uint32_t bits =
      static_cast<std::uint32_t>(bytes[0]) << 16 | static_cast<std::uint32_t>(bytes[1]) << 24;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

/// Two chains of fused multiply-adds per column, over the even and over the odd elements; their
/// rounded sum is added to c. Which payload a NaN result carries is the one thing that is not the
/// manual's but the compiler's.
inline void tdpbf16ps(Tiles& tiles, int c, int a, int b) {
  check_product(tiles, "tdpbf16ps", c, a, b);
  float left[kMaxRows][32], right[kMaxRows][2][16], sum[kMaxRows][16];
  for (int row = 0; row < kMaxRows; ++row)
    for (int n = 0; n < 16; ++n) {
      left[row][2 * n] = widen_bfloat16(tiles.data[a][row] + 4 * n);
      left[row][2 * n + 1] = widen_bfloat16(tiles.data[a][row] + 4 * n + 2);
      right[row][0][n] = widen_bfloat16(tiles.data[b][row] + 4 * n);
      right[row][1][n] = widen_bfloat16(tiles.data[b][row] + 4 * n + 2);
    }
  std::memcpy(sum, tiles.data[c], sizeof(sum));
  {
    const FlushDenormals flush;
    multiply_bfloat16(tiles.rows[c], tiles.row_bytes[a] / 4, sum, left, right);
  }
  for (int m = 0; m < tiles.rows[c]; ++m) write_row_and_zero(tiles, c, m, sum[m]);
  tiles.start_row = 0;
}

}  // namespace eigenformer_test::amx
