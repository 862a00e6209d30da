/// \file
/// Added tokens: texts that are one token wherever they stand, found before the model sees them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pieces.h"
#include "regex.h"
#include "trie.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

struct AddedToken {
  /// Searching looks at so many bytes from every place of a text.
  static constexpr std::size_t kLongest = 4096;

  std::string text;
  std::int32_t id = -1;
  bool special = false;      ///< control: left out of decoded text; typed text need not mean it
  bool normalized = false;   ///< looked for in normalized text, itself normalized
  bool takes_left = false;   ///< white space to its left belongs to it (lstrip)
  bool takes_right = false;  ///< ... to its right (rstrip)
  bool single_word = false;  ///< only where no letter, digit or mark is beside it
};

/// Finds those of one kind, plain or normalized.
class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  /// `texts`: what to look for, one for each token.
  AddedTokenFinder(std::vector<AddedToken> tokens, const std::vector<std::string>& texts,
                   std::string_view file)
      : tokens_(std::move(tokens)) {
    std::vector<Trie::Entry> entries;
    bool words = false;
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      if ((std::max)(texts[i].size(), tokens_[i].text.size()) > AddedToken::kLongest)
        fail_model(file, Vocabulary::token_name(tokens_[i].text),
                   "is added and has more than " + std::to_string(AddedToken::kLongest) + " bytes");
      entries.emplace_back(texts[i], static_cast<std::int32_t>(i));
      if (!texts[i].empty()) begins_[static_cast<unsigned char>(texts[i][0])] = true;
      words = words || tokens_[i].single_word;
    }
    trie_ = Trie(std::move(entries));
    if (words) {
      const std::string word = "[" + std::string(kUnicodeWord) + "]";
      ends_in_word_ = Regex(word + "\\z", file, true);
      begins_with_word_ = Regex("\\A" + word, file, true);
    }
    space_ = Regex(R"(\s)", file);
  }
  bool empty() const { return tokens_.empty(); }

  /// Cuts a piece at the tokens in it: the longest at the leftmost place. Special ones stay text
  /// where `parse_special` is false.
  void split(Piece piece, bool parse_special, std::vector<Piece>& pieces) const {
    const std::string_view text = piece.text;
    std::size_t done = 0;
    for (std::size_t at = 0; at < text.size();) {
      if (!begins_[static_cast<unsigned char>(text[at])]) {
        ++at;
        continue;
      }
      const auto [index, bytes] = trie_.longest(text.substr(at));
      if (index < 0) {
        ++at;
        continue;
      }
      const AddedToken& token = tokens_[static_cast<std::size_t>(index)];
      std::size_t begin = at, end = at + bytes;
      at = end;
      if ((token.special && !parse_special) ||
          (token.single_word && !stands_alone(text, begin, end)))
        continue;
      if (token.takes_left) begin = spaces_before(text, begin, done);
      if (token.takes_right) end = spaces_after(text, end);
      begin = (std::max)(begin, done);
      if (begin > done)
        pieces.push_back(
            {std::string(text.substr(done, begin - done)), piece.at_front && done == 0});
      pieces.push_back({std::string(text.substr(begin, end - begin)), false, token.id});
      done = (std::max)(done, end);
    }
    if (done == 0) return pieces.push_back(std::move(piece));
    if (done < text.size()) pieces.push_back({std::string(text.substr(done)), false});
  }

 private:
  bool is_space(std::string_view character) const {
    return space_->matches(character).next().has_value();
  }
  static std::size_t last_character(std::string_view text) {
    std::size_t at = text.size() - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    return at;
  }
  bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) const {
    if (begin > 0) {
      const std::string_view left = text.substr(0, begin);
      if (ends_in_word_->matches(left.substr(last_character(left))).next()) return false;
    }
    const std::string_view right = text.substr(end);
    return right.empty() ||
           !begins_with_word_->matches(right.substr(0, character_bytes(right))).next();
  }
  std::size_t spaces_before(std::string_view text, std::size_t end, std::size_t floor) const {
    while (end > floor) {
      const std::size_t begin = last_character(text.substr(0, end));
      if (!is_space(text.substr(begin, end - begin))) break;
      end = begin;
    }
    return end;
  }
  std::size_t spaces_after(std::string_view text, std::size_t at) const {
    while (at < text.size()) {
      const std::size_t bytes = character_bytes(text.substr(at));
      if (!is_space(text.substr(at, bytes))) break;
      at += bytes;
    }
    return at;
  }

  std::vector<AddedToken> tokens_;
  Trie trie_;
  std::array<bool, 256> begins_{};
  std::optional<Regex> space_, begins_with_word_, ends_in_word_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
