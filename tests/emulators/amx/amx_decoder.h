/// \file
/// Decodes one AMX instruction from its bytes: VEX.128.0F38.W0, opcodes 49, 4B, 5C and 5E (Intel
/// SDM volume 2, sections 2.1.5, 2.3 and the instructions' own pages). AMX-FP16 and later are not
/// decoded: no kernel here uses them.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

namespace eigenformer_test::amx {

enum class Op {
  ldtilecfg,
  sttilecfg,
  tilerelease,
  tilezero,
  tileloadd,  // and tileloaddt1, which differs by a cache hint
  tilestored,
  tdpbf16ps,
  tdpbssd,
  tdpbsud,
  tdpbusd,
  tdpbuud
};

struct Instruction {
  Op op;
  int length;   // bytes
  int c, a, b;  // tiles: ModRM.reg, ModRM.rm, VEX.vvvv
  // of memory: base + displacement, for the configuration + scaled index too
  std::uint64_t address;
  std::uint64_t stride;  // scaled index of sibmem, 0 where there is none
};

/// A memory operand: ModRM, SIB and displacement, with the registers in encoding order (rax rcx rdx
/// rbx rsp rbp rsi rdi r8 ... r15).
struct MemoryOperand {
  bool sib;
  std::uint64_t base, scaled_index;
  const std::uint8_t* end;
};

inline MemoryOperand decode_memory(const std::uint8_t* modrm, bool extend_index, bool extend_base,
                                   const std::uint64_t* registers) {
  const int mod = *modrm >> 6, rm = *modrm & 7;
  const int base_extension = extend_base ? 8 : 0;
  int displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  bool rip_relative = false;
  MemoryOperand operand{rm == 4, 0, 0, modrm + 1};
  if (operand.sib) {
    const int sib = *operand.end++;
    const int index = (sib >> 3 & 7) | (extend_index ? 8 : 0);
    if (index != 4)
      operand.scaled_index = registers[index] << (sib >> 6);  // 4 says no index; r12 is 12
    if ((sib & 7) == 5 && mod == 0)
      displacement_bytes = 4;  // no base, whatever VEX.B
    else
      operand.base = registers[(sib & 7) | base_extension];
  } else if (rm == 5 && mod == 0) {
    displacement_bytes = 4;
    rip_relative = true;
  } else {
    operand.base = registers[rm | base_extension];
  }
  std::int64_t displacement = 0;
  if (displacement_bytes == 1) displacement = static_cast<std::int8_t>(*operand.end);
  if (displacement_bytes == 4) {
    std::int32_t wide;
    std::memcpy(&wide, operand.end, sizeof(wide));
    displacement = wide;
  }
  operand.end += displacement_bytes;
  if (rip_relative)
    operand.base = reinterpret_cast<std::uint64_t>(
        operand.end);  // no immediate follows: it is the next instruction
  operand.base += static_cast<std::uint64_t>(displacement);
  return operand;
}

enum class Prefix { none, x66, xf3, xf2 };  // as VEX.pp counts them

/// Which instruction an opcode, a prefix and a ModRM byte are, before operands are looked at.
inline std::optional<Op> decode_op(int opcode, Prefix prefix, int modrm) {
  const bool memory = modrm >> 6 != 3;
  const int reg = modrm >> 3 & 7, rm = modrm & 7;
  if (opcode == 0x49) {
    if (prefix == Prefix::none && modrm == 0xc0) return Op::tilerelease;
    if (prefix == Prefix::none && memory && reg == 0) return Op::ldtilecfg;
    if (prefix == Prefix::x66 && memory && reg == 0) return Op::sttilecfg;
    if (prefix == Prefix::xf2 && !memory && rm == 0) return Op::tilezero;
  }
  if (opcode == 0x4b && memory && rm == 4) {  // sibmem is the only form
    if (prefix == Prefix::xf2 || prefix == Prefix::x66) return Op::tileloadd;
    if (prefix == Prefix::xf3) return Op::tilestored;
  }
  if (opcode == 0x5c && !memory && prefix == Prefix::xf3) return Op::tdpbf16ps;
  if (opcode == 0x5e && !memory) {
    constexpr Op by_prefix[] = {Op::tdpbuud, Op::tdpbusd, Op::tdpbsud, Op::tdpbssd};
    return by_prefix[static_cast<int>(prefix)];
  }
  return std::nullopt;
}

/// Reads no byte past the instruction: the next page may not be there.
inline std::optional<Instruction> decode(const std::uint8_t* code, const std::uint64_t* registers) {
  if (code[0] != 0xc4) return std::nullopt;  // map 0F38 needs the three-byte VEX
  if ((code[1] & 0x1f) != 2 || (code[1] & 0x80) == 0)
    return std::nullopt;                           // tmm8 and above do not exist
  if ((code[2] & 0x84) != 0) return std::nullopt;  // W0, 128
  if (code[3] != 0x49 && code[3] != 0x4b && code[3] != 0x5c && code[3] != 0x5e) return std::nullopt;
  const bool extend_index = (code[1] & 0x40) == 0, extend_base = (code[1] & 0x20) == 0;
  const int vvvv = (code[2] >> 3 & 15) ^ 15;
  const int modrm = code[4];
  const auto op = decode_op(code[3], static_cast<Prefix>(code[2] & 3), modrm);
  if (!op) return std::nullopt;
  Instruction instruction{*op, 5, modrm >> 3 & 7, modrm & 7, vvvv, 0, 0};
  const bool product = code[3] >= 0x5c;
  if (product ? (vvvv > 7 || extend_base) : vvvv != 0) return std::nullopt;
  if (modrm >> 6 != 3) {
    const MemoryOperand operand = decode_memory(code + 4, extend_index, extend_base, registers);
    const bool configuration = code[3] == 0x49;
    instruction.address = operand.base + (configuration ? operand.scaled_index : 0);
    instruction.stride = configuration ? 0 : operand.scaled_index;
    instruction.length = static_cast<int>(operand.end - code);
  }
  return instruction;
}

}  // namespace eigenformer_test::amx
