/// \file
/// From the dot product of a query and a key to a score: the one definition that attention on every
/// device shares, forward and backward.
///
///   score = scale * q . k
///   score = softcap * tanh(score / softcap)     where softcap > 0
///   score += slope[head] * (key - position)     where there are slopes
///   score += bias[sequence, head, row, key]     where there is a bias
///   score = function(score, position)           where there is a function
///   -infinity, whatever it was, where the row does not see the key
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "visibility.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

/// What a function of scores is told (attention.h), in 32 bits: they fill lanes like floats.
struct ScorePosition {
  std::int32_t batch, head;
  std::int32_t query, key;  ///< absolute positions in the sequence
};

namespace problem {

/// A row of scores. `row` counts the rows of the query tensor, those of all sequences one after the
/// other, padding included.
struct ScoreRow {
  Index sequence, head, row, position;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr ScorePosition at(Index key) const {
    return {static_cast<std::int32_t>(sequence), static_cast<std::int32_t>(head),
            static_cast<std::int32_t>(position), static_cast<std::int32_t>(key)};
  }
};

/// One element for each score: at data[sequence * sequence_stride + head * head_stride + row *
/// row_stride + key * key_stride], key counting from the first of its sequence. A stride is 0 where
/// one element serves all, and may be negative.
template <typename T>
struct ScoreTensor {
  const T* data = nullptr;
  Index sequence_stride = 0, head_stride = 0, row_stride = 0, key_stride = 0;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool present() const {
    return data != nullptr;
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr const T& at(const ScoreRow& r,
                                                                   Index key) const {
    return data[r.sequence * sequence_stride + r.head * head_stride + r.row * row_stride +
                key * key_stride];
  }
};

/// Bit j of a row's words, from the lowest of the first on, says whether it sees key first_keys[
/// sequence] + j. Keys before that are not its concern, keys beyond its words are not seen.
struct BitMask {
  const std::uint64_t* words = nullptr;  // (rows, words_per_row)
  Index words_per_row = 0;
  const Index* first_keys = nullptr;  // (batch), host memory

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool present() const {
    return words != nullptr;
  }
  /// Bits of the keys [key, key + 64).
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr std::uint64_t at(const ScoreRow& r,
                                                                        Index key) const {
    const Index bit = key - first_keys[r.sequence];
    if (bit <= -64) return ~std::uint64_t{0};
    if (bit < 0) return word(r, 0) << -bit | ~(~std::uint64_t{0} << -bit);
    const std::uint64_t low = word(r, bit / 64) >> bit % 64;
    return bit % 64 == 0 ? low : low | word(r, bit / 64 + 1) << (64 - bit % 64);
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr std::uint64_t word(const ScoreRow& r,
                                                                          Index i) const {
    return i < words_per_row ? words[r.row * words_per_row + i] : 0;
  }
};

/// C is the compute type. Tensors and words are memory of the backend, the rest is host memory.
template <typename C>
struct ScoreRule {
  Visibility visibility = {};
  C scale = 1, softcap = 0;             // softcap 0: none
  const float* alibi_slopes = nullptr;  // (heads) or nullptr
  ScoreTensor<float> bias = {};         // -infinity: not seen
  ScoreTensor<std::uint8_t> mask = {};  // 0: not seen
  BitMask bit_mask = {};

  /// Whether something beside the position says what a row sees.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool masked() const {
    return bias.present() || mask.present() || bit_mask.present();
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool masks_differ_by_head() const {
    return bias.head_stride != 0 || mask.head_stride != 0;
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool sees(const ScoreRow& r,
                                                                 Index key) const {
    return visibility.visible(r.position, key) && unmasked(r, key);
  }
  /// Whether masks and bias let row r see a key that its position sees.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr bool unmasked(const ScoreRow& r,
                                                                     Index key) const {
    if (mask.present() && mask.at(r, key) == 0) return false;
    if (bit_mask.present() && (bit_mask.at(r, key) & 1) == 0) return false;
    return !bias.present() || bias.at(r, key) != -std::numeric_limits<float>::infinity();
  }
};

/// A problem without a function of scores.
struct NoScoreFunction {};

template <typename Function>
inline constexpr bool is_score_function = !std::is_same_v<Function, NoScoreFunction>;

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
