// The decoder of AMX instructions by itself: what it refuses, and that it reads no byte too many.
#include "amx_emulator.h"

#include <gtest/gtest.h>

#if !defined(EIGENFORMER_TEST_AMX_EMULATOR)

TEST(AmxDecoder, NeedsLinuxOnX86) { GTEST_SKIP() << "the decoder reads x86-64 instructions"; }

#else

#include <sys/mman.h>

#include <array>

#include "amx_test_programs.h"

using namespace eigenformer_test;

namespace {

TEST(AmxDecoder, RefusesWhatIsNoAmxInstruction) {
  const std::uint64_t registers[16] = {0x1000, 0x40};
  using Code = std::array<std::uint8_t, 6>;
  const Code load{0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x08};  // tileloadd (%rax,%rcx,1), %tmm3
  const auto decoded = amx::decode(load.data(), registers);
  ASSERT_TRUE(decoded);
  EXPECT_TRUE(decoded->op == amx::Op::tileloadd && decoded->c == 3 && decoded->length == 6);
  EXPECT_TRUE(decoded->address == 0x1000 && decoded->stride == 0x40);
  const auto refused = [&](Code code, std::size_t byte, std::uint8_t value) {
    code[byte] = value;
    return !amx::decode(code.data(), registers);
  };
  EXPECT_TRUE(refused(load, 0, 0xc5));  // two-byte VEX
  EXPECT_TRUE(refused(load, 1, 0x62));  // R: tmm11
  EXPECT_TRUE(refused(load, 1, 0xe1));  // map 0F
  EXPECT_TRUE(refused(load, 2, 0xfb));  // W1
  EXPECT_TRUE(refused(load, 2, 0x7f));  // 256 bits
  EXPECT_TRUE(refused(load, 2, 0x73));  // vvvv
  EXPECT_TRUE(refused(load, 2, 0x78));  // no prefix
  EXPECT_TRUE(refused(load, 3, 0x4a));
  EXPECT_TRUE(refused(load, 4, 0x18));                 // no SIB
  EXPECT_TRUE(refused(load, 4, 0xdc));                 // a register
  const Code dot{0xc4, 0xe2, 0x6b, 0x5e, 0xc1, 0x00};  // tdpbssd %tmm2, %tmm1, %tmm0
  ASSERT_TRUE(amx::decode(dot.data(), registers));
  EXPECT_TRUE(refused(dot, 1, 0xc2));  // B: tmm9
  EXPECT_TRUE(refused(dot, 2, 0x2b));  // vvvv: tmm10
  EXPECT_TRUE(refused(dot, 3, 0x5c));  // tdpfp16ps
  EXPECT_TRUE(refused(dot, 4, 0x01));  // memory
}

TEST(AmxDecoder, ReadsNoByteBehindTheInstruction) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  auto* const pages = static_cast<std::uint8_t*>(
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(static_cast<void*>(pages), MAP_FAILED);
  ASSERT_EQ(mprotect(pages + page, page, PROT_NONE), 0);
  const std::uint64_t registers[16] = {};
  for (const Bytes& code :
       {Bytes{0xc4, 0xe2, 0x78, 0x49, 0xc0}, Bytes{0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x08}, Bytes{0xf4},
        Bytes{0xc4, 0xe2, 0x78, 0x49, 0x05, 0x10, 0, 0, 0}}) {
    std::uint8_t* const start =
        std::copy(code.begin(), code.end(), pages + page - code.size()) - code.size();
    const auto decoded = amx::decode(start, registers);
    EXPECT_EQ(decoded.has_value(), code.size() > 1);
    if (code.size() == 9) {  // ldtilecfg 16(%rip)
      EXPECT_EQ(decoded->address, reinterpret_cast<std::uint64_t>(pages + page + 16));
    }
  }
  munmap(pages, 2 * page);
}

}  // namespace

#endif
