/// \file
/// AMX programs for the emulator's test, written once for two backends: the instructions
/// themselves, and the plain functions.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "amx_emulator.h"

namespace eigenformer_test {

using Bytes = std::vector<std::uint8_t>;

template <typename T>
T at(const Bytes& bytes, std::size_t i) {
  T value;
  std::memcpy(&value, &bytes[i * sizeof(T)], sizeof(T));
  return value;
}

struct TileShape {
  std::uint8_t rows;
  std::uint16_t row_bytes;
};

/// The operand of ldtilecfg.
struct alignas(64) Config {
  constexpr explicit Config(std::initializer_list<TileShape> shapes = {},
                            std::uint8_t palette_id = 1)
      : palette(palette_id) {
    std::size_t t = 0;
    for (const TileShape& shape : shapes) {
      rows[t] = shape.rows;
      row_bytes[t++] = shape.row_bytes;
    }
  }
  bool operator==(const Config&) const = default;
  std::uint8_t palette, start_row = 0;
  std::array<std::uint8_t, 14> reserved{};
  std::array<std::uint16_t, 8> row_bytes{};
  std::array<std::uint16_t, 8> reserved_bytes{};
  std::array<std::uint8_t, 8> rows{};
  std::array<std::uint8_t, 8> reserved_rows{};
};
static_assert(sizeof(Config) == 64);

inline Config full_tiles() {
  constexpr TileShape full{16, 64};
  return Config({full, full, full, full, full, full, full, full});
}

/// The instructions, executed by the CPU or by the emulator. Needs no -mamx flag.
struct Instructions {
  void ldtilecfg(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  void tilerelease() { asm volatile("tilerelease" ::: "memory"); }
  template <int T>
  void tilezero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
  }
  template <int T>
  void tileloadd(const void* memory, std::uint64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(memory), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void tilestored(void* memory, std::uint64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(memory), "r"(stride), "i"(T) : "memory");
  }
  template <amx::Op op, int C, int A, int B>
  void product() {
    using enum amx::Op;
    if constexpr (op == tdpbf16ps)
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
    if constexpr (op == tdpbssd)
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
    if constexpr (op == tdpbsud)
      asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
    if constexpr (op == tdpbusd)
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
    if constexpr (op == tdpbuud)
      asm volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B) : "memory");
  }
};

/// The same names on a tile state of their own.
struct Functions {
  amx::Tiles tiles{};
  void ldtilecfg(const Config& config) { amx::ldtilecfg(tiles, &config); }
  void tilerelease() { amx::tilerelease(tiles); }
  template <int T>
  void tilezero() {
    amx::tilezero(tiles, T);
  }
  template <int T>
  void tileloadd(const void* memory, std::uint64_t stride) {
    amx::tileloadd(tiles, T, reinterpret_cast<std::uint64_t>(memory), stride);
  }
  template <int T>
  void tilestored(void* memory, std::uint64_t stride) {
    amx::tilestored(tiles, T, reinterpret_cast<std::uint64_t>(memory), stride);
  }
  template <amx::Op op, int C, int A, int B>
  void product() {
    amx::execute(tiles, amx::Instruction{op, 5, C, A, B, 0, 0});
  }
};

template <typename F>
void for_each_tile(F&& f) {
  [&]<int... T>(std::integer_sequence<int, T...>) {
    (f.template operator()<T>(), ...);
  }(std::make_integer_sequence<int, 8>{});
}

/// c (m, n) += a (m, k) * b (k, n) in elements of 4 bytes.
struct Shape {
  std::size_t m, n, k;
};
struct Operands {
  Bytes a, b, c;
};

/// The whole life of a product, seven instructions: configure, load, multiply, store, release.
template <amx::Op op, typename Backend>
Bytes multiply(Backend& backend, const Operands& x, Shape s) {
  const auto tile = [](std::size_t rows, std::size_t columns) {
    return TileShape{static_cast<std::uint8_t>(rows), static_cast<std::uint16_t>(4 * columns)};
  };
  Bytes result(x.c.size());
  backend.ldtilecfg(Config({tile(s.m, s.n), tile(s.m, s.k), tile(s.k, s.n)}));
  backend.template tileloadd<0>(x.c.data(), 4 * s.n);
  backend.template tileloadd<1>(x.a.data(), 4 * s.k);
  backend.template tileloadd<2>(x.b.data(), 4 * s.n);
  backend.template product<op, 0, 1, 2>();
  backend.template tilestored<0>(result.data(), 4 * s.n);
  backend.tilerelease();
  return result;
}

/// tmm0 loaded from and stored to displacement(base, index, scale), in registers that the text
/// names.
struct AddressingForm {
  const char* text;
  int scale;
  std::ptrdiff_t displacement;
  void (*load)(const void* base, std::uint64_t index);
  void (*store)(void* base, std::uint64_t index);
};

// Register names must be part of the assembly's text, which only a macro can put there.
#define EIGENFORMER_TEST_ADDRESSING_FORM(base, index, scale, displacement)                       \
  AddressingForm {                                                                               \
    #displacement "(" base "," index "," #scale ")", scale, displacement,                        \
        [](const void* memory, std::uint64_t stride) {                                           \
          asm volatile("mov %0, %%" base "\n\tmov %1, %%" index "\n\ttileloadd " #displacement   \
                       "(%%" base ",%%" index "," #scale "), %%tmm0" ::"r"(memory),              \
                       "r"(stride)                                                               \
                       : base, index, "memory");                                                 \
        },                                                                                       \
        [](void* memory, std::uint64_t stride) {                                                 \
          asm volatile("mov %0, %%" base "\n\tmov %1, %%" index                                  \
                       "\n\ttilestored %%tmm0, " #displacement "(%%" base ",%%" index "," #scale \
                       ")" ::"r"(memory),                                                        \
                       "r"(stride)                                                               \
                       : base, index, "memory");                                                 \
        }                                                                                        \
  }

/// rbp cannot be a clobber where it is the frame pointer: it is put back by hand.
inline AddressingForm rbp_form() {
  return {"0(rbp,r10,1)", 1, 0,
          [](const void* memory, std::uint64_t stride) {
            asm volatile(
                "mov %1, %%r10\n\tmov %0, %%r11\n\txchg %%rbp, %%r11\n\ttileloadd (%%rbp,%%r10,1), "
                "%%tmm0\n\tmov %%r11, %%rbp" ::"r"(memory),
                "r"(stride)
                : "r10", "r11", "memory");
          },
          [](void* memory, std::uint64_t stride) {
            asm volatile(
                "mov %1, %%r10\n\tmov %0, %%r11\n\txchg %%rbp, %%r11\n\ttilestored %%tmm0, "
                "(%%rbp,%%r10,1)\n\tmov %%r11, %%rbp" ::"r"(memory),
                "r"(stride)
                : "r10", "r11", "memory");
          }};
}

inline std::vector<AddressingForm> addressing_forms() {
  return {
      EIGENFORMER_TEST_ADDRESSING_FORM("rax", "rcx", 1, 0),
      EIGENFORMER_TEST_ADDRESSING_FORM("rcx", "rax", 2, 64),
      EIGENFORMER_TEST_ADDRESSING_FORM("rdx", "rsi", 4, -128),
      EIGENFORMER_TEST_ADDRESSING_FORM("rsi", "rdx", 8, 127),
      EIGENFORMER_TEST_ADDRESSING_FORM("rdi", "r8", 1, 128),
      EIGENFORMER_TEST_ADDRESSING_FORM("r8", "rdi", 2, -129),
      EIGENFORMER_TEST_ADDRESSING_FORM("r9", "r10", 4, 0x1f0),
      EIGENFORMER_TEST_ADDRESSING_FORM("r10", "r9", 8, 8),
      EIGENFORMER_TEST_ADDRESSING_FORM("r11", "r12", 1, 0),
      EIGENFORMER_TEST_ADDRESSING_FORM("r12", "r11", 2, 0),
      EIGENFORMER_TEST_ADDRESSING_FORM("r12", "r13", 1, 16),
      EIGENFORMER_TEST_ADDRESSING_FORM("r13", "r14", 4, 0),
      EIGENFORMER_TEST_ADDRESSING_FORM("r13", "r15", 8, -0x1f0),
      EIGENFORMER_TEST_ADDRESSING_FORM("r14", "r13", 1, 0),
      EIGENFORMER_TEST_ADDRESSING_FORM("r15", "r14", 2, 1),
      rbp_form(),
  };
}

/// tmm0 from 1024 bytes copied to the stack, addressed by rsp with an 8-bit displacement. The
/// signal's frame lies below them.
inline void load_from_stack(const void* source) {
  asm volatile(
      "mov %0, %%rsi\n\tsub $2048, %%rsp\n\tlea 96(%%rsp), %%rdi\n\tmov $1024, %%ecx\n\tcld\n\trep "
      "movsb\n\t"
      "mov $16, %%r8\n\ttileloadd 96(%%rsp,%%r8,4), %%tmm0\n\tadd $2048, %%rsp" ::"r"(source)
      : "rsi", "rdi", "rcx", "r8", "memory", "cc");
}

/// tmm0 from sibmem without an index: every row is the first.
inline void load_without_index(const void* source) {
  asm volatile("mov %0, %%r12\n\ttileloadd (%%r12), %%tmm0" ::"r"(source) : "r12", "memory");
}

struct Survivors {
  bool carry;
  std::uint32_t mxcsr;
  std::uint64_t red_zone;
};

/// tdpbf16ps with 16 vector registers (512 or 128 bits) loaded from `memory` and stored back to it,
/// the carry set, MXCSR rounding towards zero, and a word in the red zone.
inline Survivors multiply_with_full_registers(std::uint8_t* memory, bool wide) {
  Survivors seen{};
  std::uint32_t before;
  asm volatile("stmxcsr %0" : "=m"(before));
  const std::uint32_t toward_zero = 0x7f80;
  asm volatile(
      "mov %[wide], %%r9d\n\tmov %[memory], %%r8\n\tldmxcsr %[toward_zero]\n\t"
      "lea -256(%%rsp), %%rsp\n\tmovabs $0x123456789abcdef, %%r10\n\tmov %%r10, -64(%%rsp)\n\txor "
      "%%r10d, %%r10d\n\t"
      "test %%r9d, %%r9d\n\tjz 1f\n\t"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\tvmovups \\i*64(%%r8), %%zmm\\i\n\t.endr\n\t"
      "stc\n\ttdpbf16ps %%tmm2, %%tmm1, %%tmm0\n\tsetc %%r11b\n\t"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\tvmovups %%zmm\\i, \\i*64(%%r8)\n\t.endr\n\t"
      "vzeroupper\n\tjmp 2f\n1:\n\t"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\tmovups \\i*64(%%r8), %%xmm\\i\n\t.endr\n\t"
      "stc\n\ttdpbf16ps %%tmm2, %%tmm1, %%tmm0\n\tsetc %%r11b\n\t"
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\tmovups %%xmm\\i, "
      "\\i*64(%%r8)\n\t.endr\n2:\n\t"
      "mov -64(%%rsp), %%r10\n\tlea 256(%%rsp), %%rsp\n\tmov %[seen], %%r8\n\t"
      "mov %%r11b, (%%r8)\n\tstmxcsr 4(%%r8)\n\tmov %%r10, 8(%%r8)\n\tldmxcsr %[before]"
      :
      : [memory] "r"(memory), [wide] "r"(static_cast<int>(wide)), [toward_zero] "m"(toward_zero),
        [before] "m"(before), [seen] "r"(&seen)
      : "r8", "r9", "r10", "r11", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5",
        "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
  return seen;
}

}  // namespace eigenformer_test
