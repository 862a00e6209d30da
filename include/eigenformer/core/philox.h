/// \file
/// Philox4x32-10, the counter-based random generator of Salmon, Moraes, Dror and Shaw, "Parallel
/// Random Numbers: As Easy as 1, 2, 3" (SC11). Tested against the known-answer vectors of
/// Random123.
#pragma once

#include <array>
#include <cstdint>

#include "compiler.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// The bijection itself: 128 bits of counter and 64 bits of key give 128 random bits.
EIGENFORMER_HOST_DEVICE constexpr std::array<std::uint32_t, 4> philox4x32_10(
    std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  std::uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI

inline namespace EIGENFORMER_VERSION_NAMESPACE {

/// Random numbers that are a function of (seed, position, row, purpose, index): what one row draws
/// does not depend on the rows beside it, on threads or on the device. An operator that draws
/// advances the position by one, whatever the number of rows. Also a uniform random bit generator
/// for <random>.
///
/// The law, which makes every use a stream of its own: generators of one seed at one position may
/// draft, verify, shuffle and initialise, and no number is used twice.
///
///   key        words 0, 1: seed
///   counter    word 0: index (28 bits), purpose above it (4 bits); word 1: row (32 bits);
///              words 2, 3: position (64 bits)
///
///   purpose           row              index            what is drawn
///   sampling          row of the batch 0                the token, in sample and its like
///   acceptance        row of the batch draft            verify_speculative: is it accepted?
///   last_token        row of the batch 0                verify_speculative: the token after drafts
///   initialisation    n / 2^28         n % 2^28         number n of a weight; position: which one
///   engine            0                0                operator()
///   exclusion         row of the batch 0                sample: does XTC exclude?
///   user              any              any              what you like: the library never does
///
/// A row that has a generator of its own draws at row 0 of it, wherever it stands in the batch.
/// The counter of two draws that differ in any of these differs, and Philox is a bijection of the
/// counter.
class Philox {
 public:
  using result_type = std::uint32_t;

  enum class Purpose : std::uint32_t {
    sampling = 0,
    acceptance = 1,
    last_token = 2,
    initialisation = 3,
    engine = 4,
    exclusion = 5,
    user = 15
  };
  static constexpr std::uint64_t kRows = std::uint64_t{1} << 32;     ///< a row is less
  static constexpr std::uint64_t kIndices = std::uint64_t{1} << 28;  ///< an index is less

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE explicit constexpr Philox(std::uint64_t seed = 0,
                                                                       std::uint64_t position = 0)
      : seed_(seed), position_(position) {}

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr std::uint64_t seed() const { return seed_; }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr std::uint64_t position() const {
    return position_;
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr void advance(std::uint64_t steps = 1) {
    position_ += steps;
  }

  /// 128 random bits for (row, index, purpose) at the current position; leaves the position. index
  /// < 2^28.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr std::array<std::uint32_t, 4> bits(
      std::uint32_t row, std::uint32_t index = 0, Purpose purpose = Purpose::sampling) const {
    return detail::philox4x32_10(
        {index ^ static_cast<std::uint32_t>(purpose) << 28, row,
         static_cast<std::uint32_t>(position_), static_cast<std::uint32_t>(position_ >> 32)},
        {static_cast<std::uint32_t>(seed_), static_cast<std::uint32_t>(seed_ >> 32)});
  }

  /// A double in (0, 1), both ends excluded, with 52 random bits for (row, index, purpose) at the
  /// current position; leaves the position. index < 2^28. uniform(row) is the number that `sample`
  /// draws the row with.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr double uniform(
      std::uint32_t row, std::uint32_t index = 0, Purpose purpose = Purpose::sampling) const {
    const auto words = bits(row, index, purpose);
    const std::uint64_t mantissa = ((std::uint64_t{words[0]} << 32) | words[1]) >> 12;
    return (static_cast<double>(mantissa) + 0.5) * 0x1p-52;
  }

  static EIGENFORMER_INLINE constexpr result_type(min)() { return 0; }
  static EIGENFORMER_INLINE constexpr result_type(max)() { return 0xFFFFFFFFu; }
  /// 32 random bits; advances by one.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr result_type operator()() {
    const auto words = bits(0, 0, Purpose::engine);
    advance();
    return words[0];
  }

 private:
  std::uint64_t seed_;
  std::uint64_t position_;
};

}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
