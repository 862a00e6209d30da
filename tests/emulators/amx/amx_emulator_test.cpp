// The emulated AMX instructions against scalar arithmetic, and the decoder and the signal handler
// against the plain functions. Where the CPU has AMX, the same programs run in hardware, so the
// plain functions are compared with it bit by bit.
#include "amx_emulator.h"

#include <gtest/gtest.h>

#if !defined(EIGENFORMER_TEST_AMX_EMULATOR)

TEST(Amx, NeedsLinuxOnX86) {
  GTEST_SKIP() << "the AMX emulator decodes x86-64 instructions in a Linux signal handler";
}

#else

#include <sys/mman.h>

#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "amx_test_programs.h"

using namespace eigenformer_test;

namespace {

struct Amx : testing::Test {
  void SetUp() override {
    if (!amx_in_hardware()) emulator.emplace();
  }
  std::optional<AmxEmulator> emulator;
};
struct AmxDeathTest : Amx {};

std::mt19937 generator(7);

Bytes random_bytes(std::size_t count) {
  Bytes bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(generator());
  return bytes;
}

/// bfloat16 patterns of any sign and fraction with exponents in [lowest, highest]: 0 is denormal,
/// 127 is one, 255 is infinite or NaN.
Bytes random_bfloat16(std::size_t count, unsigned lowest, unsigned highest) {
  Bytes bytes;
  for (std::size_t i = 0; i < count; ++i) {
    const auto random = static_cast<std::uint32_t>(generator());
    const std::uint32_t bits =
        (random & 0x807f) | (lowest + (random >> 16) % (highest - lowest + 1)) << 7;
    bytes.push_back(static_cast<std::uint8_t>(bits));
    bytes.push_back(static_cast<std::uint8_t>(bits >> 8));
  }
  return bytes;
}

/// Any NaN becomes one NaN: its payload is not the manual's.
Bytes one_nan(Bytes bytes) {
  for (std::size_t i = 0; i + 4 <= bytes.size(); i += 4)
    if (std::isnan(at<float>(bytes, i / 4))) std::memcpy(bytes.data() + i, "\0\0\xc0\x7f", 4);
  return bytes;
}

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

/// The manual's formula for one element, flushing by hand. It differs from the hardware's flush
/// only for results that round up to the smallest normal number, which the seeds here do not meet.
float expected_bfloat16(const Operands& x, Shape s, std::size_t m, std::size_t n) {
  float chain[2] = {0, 0};
  for (std::size_t k = 0; k < s.k; ++k)
    for (std::size_t i = 0; i < 2; ++i)
      chain[i] =
          flush(std::fma(flush(amx::widen_bfloat16(&x.a[4 * (m * s.k + k) + 2 * i])),
                         flush(amx::widen_bfloat16(&x.b[4 * (k * s.n + n) + 2 * i])), chain[i]));
  return flush(flush(at<float>(x.c, m * s.n + n)) + flush(chain[0] + chain[1]));
}

template <typename A, typename B>
std::int32_t expected_bytes(const Operands& x, Shape s, std::size_t m, std::size_t n) {
  std::int64_t sum = at<std::int32_t>(x.c, m * s.n + n);
  for (std::size_t k = 0; k < 4 * s.k; ++k) {
    const std::int64_t a = at<A>(x.a, 4 * m * s.k + k),
                       b = at<B>(x.b, 4 * (k / 4 * s.n + n) + k % 4);
    sum += a * b;
  }
  return static_cast<std::int32_t>(sum);  // modulo 2^32 since C++20
}

/// Runs the product as an instruction and as a plain function; both must be the formula.
template <amx::Op op, typename Expected>
void check_product(const Operands& x, Shape s, Expected expected) {
  SCOPED_TRACE(testing::Message() << "m " << s.m << " n " << s.n << " k " << s.k);
  Instructions instructions;
  Functions functions;
  const Bytes result = one_nan(multiply<op>(instructions, x, s));
  EXPECT_EQ(result, one_nan(multiply<op>(functions, x, s)));
  Bytes formula(4 * s.m * s.n);
  for (std::size_t m = 0; m < s.m; ++m)
    for (std::size_t n = 0; n < s.n; ++n) {
      const auto value = expected(x, s, m, n);
      std::memcpy(&formula[4 * (m * s.n + n)], &value, 4);
    }
  EXPECT_EQ(result, one_nan(formula));
}

template <typename F>
void for_each_shape(F&& f) {
  for (std::size_t m : {1, 2, 7, 16})
    for (std::size_t n : {1, 3, 15, 16})
      for (std::size_t k : {1, 5, 16}) f(Shape{m, n, k});
}

TEST_F(Amx, ProductsOfBytesWrapAround) {
  for_each_shape([](Shape s) {
    for (const bool overflow : {false, true}) {
      Operands x{random_bytes(4 * s.m * s.k), random_bytes(4 * s.k * s.n),
                 random_bytes(4 * s.m * s.n)};
      if (overflow) {  // every sum leaves the range of int32
        x = {Bytes(x.a.size(), 0x80), Bytes(x.b.size(), 0x80), {}};
        for (std::size_t i = 0; i < s.m * s.n; ++i) x.c.insert(x.c.end(), {0xff, 0xff, 0xff, 0x7f});
      }
      check_product<amx::Op::tdpbssd>(x, s, expected_bytes<std::int8_t, std::int8_t>);
      check_product<amx::Op::tdpbsud>(x, s, expected_bytes<std::int8_t, std::uint8_t>);
      check_product<amx::Op::tdpbusd>(x, s, expected_bytes<std::uint8_t, std::int8_t>);
      check_product<amx::Op::tdpbuud>(x, s, expected_bytes<std::uint8_t, std::uint8_t>);
    }
  });
}

TEST_F(Amx, ProductOfBfloat16IsTwoChains) {
  struct Range {
    unsigned lowest, highest;
  };
  // Around one; products and operands around the smallest normal number; the largest numbers; every
  // pattern there is.
  for (const Range range :
       {Range{120, 134}, Range{58, 68}, Range{0, 3}, Range{186, 254}, Range{0, 255}})
    for_each_shape([&](Shape s) {
      const bool tiny = range.highest <= 68;
      Operands x{random_bfloat16(2 * s.m * s.k, range.lowest, range.highest),
                 random_bfloat16(2 * s.k * s.n, range.lowest, range.highest),
                 random_bfloat16(2 * s.m * s.n, tiny ? 0 : range.lowest, tiny ? 3 : range.highest)};
      check_product<amx::Op::tdpbf16ps>(x, s, expected_bfloat16);
    });
}

TEST_F(Amx, DenormalsAreZeroAndNanStays) {
  const std::uint16_t one = 0x3f80, denormal = 0x0040, smallest = 0x0080, half = 0x3f00,
                      infinity = 0x7f80, nan = 0x7fc0;
  const auto product = [](std::uint16_t a, std::uint16_t b, std::uint32_t c) {
    Operands x{Bytes(4), Bytes(4), Bytes(4)};
    std::memcpy(x.a.data(), &a, 2);
    std::memcpy(x.b.data(), &b, 2);
    std::memcpy(x.c.data(), &c, 4);
    Instructions backend;
    return at<std::uint32_t>(one_nan(multiply<amx::Op::tdpbf16ps>(backend, x, {1, 1, 1})), 0);
  };
  EXPECT_EQ(product(one, denormal, 0), 0u);
  EXPECT_EQ(product(denormal, infinity, 0), 0x7fc00000u);  // zero times infinity
  EXPECT_EQ(product(smallest, half, 0), 0u);
  EXPECT_EQ(product(smallest, one, 0), 0x00800000u);
  EXPECT_EQ(product(0, 0, 0x00400000u), 0u);  // a denormal accumulator
  // 2^-126 - 1.5 * 2^-126 is denormal: minus zero
  EXPECT_EQ(product(smallest, one, 0x80c00000u), 0x80000000u);
  EXPECT_EQ(product(nan, one, 0), 0x7fc00000u);
  EXPECT_EQ(product(one, one, 0x7f800001u), 0x7fc00000u);
  EXPECT_EQ(product(one, infinity, 0xff800000u), 0x7fc00000u);
}

TEST_F(Amx, LoadsAndStoresTouchTheTileAlone) {
  const Bytes source = random_bytes(16 * 100);
  for (int rows = 1; rows <= 16; ++rows)
    for (int row_bytes = 4; row_bytes <= 64; row_bytes += 4) {
      const auto program = [&](auto& backend) {
        Bytes target(16 * 80, 0xee);
        backend.ldtilecfg(Config(
            {{16, 64}, {static_cast<std::uint8_t>(rows), static_cast<std::uint16_t>(row_bytes)}}));
        backend.template tileloadd<1>(source.data(), 100);
        backend.template tilestored<1>(target.data(), 80);
        backend.tilerelease();
        return target;
      };
      Bytes expected(16 * 80, 0xee);
      for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row)
        std::copy_n(source.begin() + static_cast<std::ptrdiff_t>(100 * row), row_bytes,
                    expected.begin() + static_cast<std::ptrdiff_t>(80 * row));
      Instructions instructions;
      Functions functions;
      EXPECT_EQ(program(instructions), expected);
      EXPECT_EQ(program(functions), expected);
    }
}

TEST_F(Amx, RestOfATileIsZero) {
  const Bytes source = random_bytes(1024);
  Functions functions;
  functions.ldtilecfg(Config({{5, 12}}));
  std::memset(functions.tiles.data[0], 0xee, 1024);
  functions.tileloadd<0>(source.data(), 64);
  for (std::size_t row = 0; row < 16; ++row)
    for (std::size_t i = 0; i < 64; ++i)
      EXPECT_EQ(functions.tiles.data[0][row][i], row < 5 && i < 12 ? source[64 * row + i] : 0)
          << row << ' ' << i;
}

TEST_F(Amx, EveryAddressingFormReachesTheSameMemory) {
  constexpr std::size_t
      kStride = 72,
      kMargin =
          0x200;  // data is kMargin bytes into the buffer, displacements reach both sides of it
  const Bytes source = random_bytes(kMargin + 16 * kStride);
  const Bytes rows(source.begin() + kMargin, source.end());
  Instructions backend;
  backend.ldtilecfg(full_tiles());
  for (const AddressingForm& form : addressing_forms()) {
    SCOPED_TRACE(form.text);
    Bytes seen(1024), stored(kMargin + 16 * kStride, 0xee), expected = stored;
    form.load(source.data() + kMargin - form.displacement,
              kStride / static_cast<std::size_t>(form.scale));
    backend.tilestored<0>(seen.data(), 64);
    form.store(stored.data() + kMargin - form.displacement,
               kStride / static_cast<std::size_t>(form.scale));
    for (std::size_t row = 0; row < 16; ++row) {
      EXPECT_TRUE(std::equal(seen.begin() + static_cast<std::ptrdiff_t>(64 * row),
                             seen.begin() + static_cast<std::ptrdiff_t>(64 * row + 64),
                             rows.begin() + static_cast<std::ptrdiff_t>(kStride * row)));
      std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(kStride * row), 64,
                  expected.begin() + static_cast<std::ptrdiff_t>(kMargin + kStride * row));
    }
    EXPECT_EQ(stored, expected);
  }
  backend.tilerelease();
}

TEST_F(Amx, StackIsABaseAndNoIndexIsStrideZero) {
  const Bytes source = random_bytes(1024);
  Bytes seen(1024);
  Instructions backend;
  backend.ldtilecfg(full_tiles());
  load_from_stack(source.data());
  backend.tilestored<0>(seen.data(), 64);
  EXPECT_EQ(seen, source);
  load_without_index(source.data());
  backend.tilestored<0>(seen.data(), 64);
  for (std::size_t i = 0; i < 1024; ++i) EXPECT_EQ(seen[i], source[i % 64]);
  backend.tilerelease();
}

constexpr Config kStaticConfig({{3, 8}, {16, 64}, {1, 4}});

TEST_F(Amx, ConfigurationComesBackFromEveryAddress) {
  const auto stored = [] {
    Config config;
    asm volatile("sttilecfg %0" : "=m"(config)::"memory");
    return config;
  };
  Instructions backend;
  const auto clear = [&] { backend.tilerelease(); };
  clear();
  EXPECT_EQ(stored(), Config({}, 0));
  asm volatile(
      "ldtilecfg %0" ::"m"(kStaticConfig));  // relative to rip in position-independent code
  EXPECT_EQ(stored(), kStaticConfig);
  std::vector<Config> configs(3, Config({}, 0));
  configs[2] = kStaticConfig;
  configs[2].rows[7] = 9;
  configs[2].row_bytes[7] = 20;
  clear();
  asm volatile("mov %0, %%r13\n\tldtilecfg 128(%%r13)" ::"r"(configs.data()) : "r13", "memory");
  EXPECT_EQ(stored(), configs[2]);
  clear();
  asm volatile("mov %0, %%r12\n\tmov $16, %%r9\n\tldtilecfg (%%r12,%%r9,8)" ::"r"(configs.data())
               : "r9", "r12", "memory");
  EXPECT_EQ(stored(), configs[2]);
  asm volatile(
      "mov %0, %%r12\n\tmov $8, %%r15\n\tsttilecfg 64(%%r12,%%r15,8)" ::"r"(configs.data() - 1)
      : "r12", "r15", "memory");
  EXPECT_EQ(configs[1], configs[2]);
  backend.ldtilecfg(Config({}, 0));  // palette 0 releases
  EXPECT_EQ(stored(), Config({}, 0));
}

TEST_F(Amx, ConfigurationZeroesTheTiles) {
  const Bytes source = random_bytes(1024);
  Bytes seen(1024, 0xee);
  Instructions backend;
  backend.ldtilecfg(full_tiles());
  backend.tileloadd<5>(source.data(), 64);
  backend.ldtilecfg(full_tiles());
  backend.tilestored<5>(seen.data(), 64);
  EXPECT_EQ(seen, Bytes(1024));
  backend.tileloadd<5>(source.data(), 64);
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm6" ::"r"(source.data()), "r"(std::uint64_t{64})
               : "memory");
  backend.tilezero<5>();
  backend.tilestored<5>(seen.data(), 64);
  EXPECT_EQ(seen, Bytes(1024));
  backend.tilestored<6>(seen.data(), 64);
  EXPECT_EQ(seen, source);
  backend.tilerelease();
}

TEST_F(Amx, AllEightTilesAreApart) {
  const Bytes source = random_bytes(8 * 1024);
  const auto program = [&](auto& backend) {
    Bytes target(8 * 1024);
    backend.ldtilecfg(full_tiles());
    for_each_tile([&]<int T>() { backend.template tileloadd<T>(source.data() + 1024 * T, 64); });
    backend.template product<amx::Op::tdpbssd, 0, 1, 2>();
    backend.template product<amx::Op::tdpbuud, 7, 3, 5>();
    backend.template product<amx::Op::tdpbsud, 4, 0, 7>();
    backend.template product<amx::Op::tdpbf16ps, 6, 5, 1>();
    backend.template product<amx::Op::tdpbusd, 3, 2, 4>();
    for_each_tile([&]<int T>() { backend.template tilestored<T>(target.data() + 1024 * T, 64); });
    backend.tilerelease();
    return target;
  };
  Instructions instructions;
  Functions functions;
  EXPECT_EQ(one_nan(program(instructions)), one_nan(program(functions)));
}

TEST_F(Amx, ThreadsHaveTilesOfTheirOwn) {
  const auto work = [](Shape s, Operands x) {
    Functions functions;
    const Bytes expected = multiply<amx::Op::tdpbssd>(functions, x, s);
    int wrong = 0;
    for (int i = 0; i < 300; ++i) {
      Instructions instructions;
      wrong += multiply<amx::Op::tdpbssd>(instructions, x, s) != expected;
    }
    EXPECT_EQ(wrong, 0);
  };
  std::vector<std::thread> threads;
  for (const Shape s : {Shape{16, 16, 16}, Shape{3, 9, 7}})
    threads.emplace_back(work, s,
                         Operands{random_bytes(4 * s.m * s.k), random_bytes(4 * s.k * s.n),
                                  random_bytes(4 * s.m * s.n)});
  for (auto& thread : threads) thread.join();
}

TEST_F(Amx, RegistersFlagsAndRedZoneSurvive) {
  Instructions backend;
  backend.ldtilecfg(full_tiles());
  for (const bool wide : {false, true}) {
    if (wide && !__builtin_cpu_supports("avx512f")) {
      std::printf("[ SKIPPED  ] 512-bit registers: this machine has none\n");
      continue;
    }
    const Bytes before = random_bytes(1024 + 64);
    Bytes after = before;
    const Survivors survivors = multiply_with_full_registers(after.data(), wide);
    EXPECT_EQ(after, before);
    EXPECT_TRUE(survivors.carry);
    EXPECT_EQ(survivors.mxcsr, 0x7f80u);
    EXPECT_EQ(survivors.red_zone, 0x123456789abcdefu);
  }
  backend.tilerelease();
}

TEST_F(Amx, InstructionsAreCounted) {
  const std::uint64_t before = amx_emulated_instructions();
  Instructions backend;
  multiply<amx::Op::tdpbssd>(backend, Operands{Bytes(4), Bytes(4), Bytes(4)}, {1, 1, 1});
  EXPECT_EQ(amx_emulated_instructions() - before, amx_in_hardware() ? 0u : 7u);
}

TEST(AmxEmulation, EndsWithTheLastEmulator) {
  const auto flags_now = [] {
    struct sigaction now {};
    sigaction(SIGILL, nullptr, &now);
    return now.sa_flags & SA_SIGINFO ? reinterpret_cast<void*>(now.sa_sigaction)
                                     : reinterpret_cast<void*>(now.sa_handler);
  };
  void* const before = flags_now();
  {
    const AmxEmulator first;
    {
      const AmxEmulator second;
      EXPECT_EQ(flags_now(), reinterpret_cast<void*>(amx::on_illegal_instruction));
    }
    EXPECT_EQ(flags_now(), reinterpret_cast<void*>(amx::on_illegal_instruction));
  }
  EXPECT_EQ(flags_now(), before);
}

TEST_F(AmxDeathTest, OtherSignalsDieAsBefore) {
  const AmxEmulator here;  // in hardware too
  EXPECT_EXIT(asm volatile("ud2"), testing::KilledBySignal(SIGILL), "");
  EXPECT_EXIT(asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, 0xd9"), testing::KilledBySignal(SIGILL),
              "");  // tilezero with rm 1
  EXPECT_EXIT(raise(SIGILL), testing::KilledBySignal(SIGILL), "");
}

TEST_F(AmxDeathTest, ProvidedOnceForTheProcess) {
  const auto use = [] {
    provide_amx();
    provide_amx();
    Instructions().ldtilecfg(full_tiles());
    std::exit(amx_in_hardware() || amx_emulated_instructions() > 0 ? 0 : 1);
  };
  EXPECT_EXIT(use(), testing::ExitedWithCode(0), "");
}

TEST_F(AmxDeathTest, WhatHardwareRefusesIsNamed) {
  Functions x;
  const auto configured = [&](const Config& config) -> Functions& {
    x.ldtilecfg(config);
    return x;
  };
  Config reserved = full_tiles();
  reserved.reserved_rows[3] = 1;
  EXPECT_DEATH(x.ldtilecfg(reserved), "reserved byte 59 is 1");
  EXPECT_DEATH(x.ldtilecfg(Config({}, 2)), "palette 2");
  EXPECT_DEATH(x.ldtilecfg(Config({{17, 64}})), "tmm0 of 17 rows x 64 bytes");
  EXPECT_DEATH(x.ldtilecfg(Config({{16, 64}, {16, 65}})), "tmm1 of 16 rows x 65 bytes");
  EXPECT_DEATH(x.ldtilecfg(Config({{0, 64}})), "tmm0 of 0 rows");
  EXPECT_DEATH((Functions().product<amx::Op::tdpbssd, 0, 1, 2>()),
               "tdpbssd .*no tile is configured");
  EXPECT_DEATH(Functions().tilezero<3>(), "tilezero tmm3: no tile is configured");
  EXPECT_DEATH(configured(Config({{16, 64}})).tilezero<3>(),
               "tilezero tmm3: this tile has no rows");
  EXPECT_DEATH(configured(Config({{16, 62}})).tileloadd<0>(nullptr, 64),
               "tileloadd tmm0: 16 rows x 62 bytes");
  EXPECT_DEATH(configured(Config({{16, 62}})).tilestored<0>(nullptr, 64),
               "tilestored tmm0: 16 rows x 62 bytes");
  const auto product = [&](std::initializer_list<TileShape> shapes) {
    configured(Config(shapes)).product<amx::Op::tdpbf16ps, 0, 1, 2>();
  };
  EXPECT_DEATH(product({{16, 64}, {15, 64}, {16, 64}}),
               "tdpbf16ps tmm0 .16 rows x 64 bytes.*tmm1 .15 x 64.*rows of the first");
  EXPECT_DEATH(product({{16, 64}, {16, 64}, {16, 60}}), "columns of the first and the third");
  EXPECT_DEATH(product({{16, 64}, {16, 60}, {16, 64}}), "not the third tile's rows");
  EXPECT_DEATH(product({{16, 62}, {16, 64}, {16, 62}}), "multiple of 4");
  EXPECT_DEATH(product({{16, 64}, {16, 64}}), "has no rows");
  EXPECT_DEATH((configured(full_tiles()).product<amx::Op::tdpbssd, 1, 1, 2>()), "must differ");
  // Once through the instruction: a kernel's mistake ends the program, in hardware by a signal
  // without words.
  const auto in_a_kernel = [] {
    Instructions backend;
    backend.ldtilecfg(Config({{16, 64}, {16, 60}, {16, 64}}));
    backend.product<amx::Op::tdpbssd, 0, 1, 2>();
  };
  EXPECT_DEATH(in_a_kernel(), amx_in_hardware() ? "" : "tdpbssd tmm0 .16 rows x 64 bytes");
}

#if defined(__SANITIZE_ADDRESS__)  // g++ says so
TEST_F(AmxDeathTest, AddressSanitizerSeesTileLoads) {
  if (amx_in_hardware()) GTEST_SKIP() << "hardware loads are not instrumented";
  Instructions backend;
  backend.ldtilecfg(full_tiles());
  const Bytes short_by_one(1023);
  EXPECT_DEATH(backend.tileloadd<0>(short_by_one.data(), 64), "heap-buffer-overflow");
}
#endif

}  // namespace

#endif
