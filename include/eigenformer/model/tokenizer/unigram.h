/// \file
/// The unigram language model (Kudo, 2018): of all ways to cut a word into tokens, the one of the
/// largest sum of scores (Viterbi). O(n * longest token) for n bytes.
///
/// A character that no token begins and ends with costs 10 more than the worst token, as in
/// SentencePiece; neighbours of this kind become one unk, or their bytes where these are tokens.
///
/// Scores add up in double, as in tokenizers. SentencePiece adds in float and so, rarely, takes
/// another of two ways that are equally good: 8 of 10,000 strings of make_tokenizers.py.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "text.h"
#include "trie.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class Unigram {
 public:
  static constexpr double kUnkPenalty = 10;
  /// Work follows the longest token, so files may not have any.
  static constexpr std::size_t kLongest = 4096;

  /// scores[id] of each token, NaN where no text means it; unk: -1 where there is none.
  /// `fallback`: unk as bytes.
  Unigram(const Vocabulary& vocabulary, std::vector<double> scores, std::int32_t unk, bool fallback)
      : scores_(std::move(scores)), unk_(unk) {
    std::vector<Trie::Entry> entries;
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      const auto id = static_cast<std::int32_t>(i);
      if (!vocabulary.has(id) || std::isnan(scores_[i])) continue;
      const std::string_view text = vocabulary.text(id);
      if (text.size() > kLongest)
        fail_model(vocabulary.file(), Vocabulary::token_name(text),
                   "has more than " + std::to_string(kLongest) + " bytes");
      entries.emplace_back(text, id);
      lowest_ = (std::min)(lowest_, scores_[i]);
    }
    trie_ = Trie(std::move(entries));
    for (std::size_t b = 0; b < bytes_.size(); ++b)
      bytes_[b] = fallback ? vocabulary.find(byte_token(static_cast<unsigned char>(b))) : -1;
  }

  struct Scratch {
    struct Node {
      double score = 0;       // of the best way that ends here
      std::size_t begin = 0;  // of its last token
      std::int32_t id = -1;   // of its last token; -1: unk
      bool reached = false;
    };
    std::vector<Node> nodes;
    std::vector<std::size_t> ends;
  };

  /// A word is not cut: its best way takes time in its length.
  template <typename Each>
  void each_part(const Vocabulary&, std::string_view word, Each&& each) const {
    each(word, true);
  }

  /// Appends the ids of a word, which is whole UTF-8. Throws ModelFileError where it needs an unk
  /// and there is none.
  void encode(const Vocabulary& vocabulary, std::string_view word, bool, Scratch& scratch,
              std::vector<std::int32_t>& ids) const {
    auto& [nodes, ends] = scratch;
    nodes.assign(word.size() + 1, {});
    for (std::size_t at = 0; at < word.size();) {
      const std::size_t bytes = character_bytes(word.substr(at));
      const double score = nodes[at].score;
      const auto offer = [&](std::size_t end, double with, std::int32_t id) {
        if (nodes[end].reached && with <= nodes[end].score) return;
        nodes[end] = {with, at, id, true};
      };
      bool has_one = false;
      trie_.prefixes(word.substr(at), [&](std::int32_t id, std::size_t length) {
        offer(at + length, score + scores_[static_cast<std::size_t>(id)], id);
        has_one = has_one || length == bytes;
      });
      if (!has_one) offer(at + bytes, score + (lowest_ - kUnkPenalty), -1);
      at += bytes;
    }
    ends.clear();
    for (std::size_t at = word.size(); at > 0; at = nodes[at].begin) ends.push_back(at);
    for (std::size_t i = ends.size(); i-- > 0;) {
      const auto is_unk = [&](std::size_t end) {
        return nodes[end].id < 0 || nodes[end].id == unk_;
      };
      if (!is_unk(ends[i])) {
        ids.push_back(nodes[ends[i]].id);
        continue;
      }
      const std::size_t begin = nodes[ends[i]].begin;
      while (i > 0 && is_unk(ends[i - 1])) --i;
      spell(vocabulary, word.substr(begin, ends[i] - begin), ids);
    }
  }

 private:
  void spell(const Vocabulary& vocabulary, std::string_view text,
             std::vector<std::int32_t>& ids) const {
    if (const std::int32_t id = vocabulary.find(text); id >= 0) {
      ids.push_back(id);  // unk's own text, or several of them that are a token
    } else if (std::ranges::all_of(text, [&](char c) { return byte_id(c) >= 0; })) {
      for (const char c : text) ids.push_back(byte_id(c));
    } else if (unk_ >= 0) {
      ids.push_back(unk_);
    } else {
      fail_model(vocabulary.file(), "model.unk_id", "is missing, and a text needs it");
    }
  }

  std::int32_t byte_id(char c) const { return bytes_[static_cast<unsigned char>(c)]; }

  std::vector<double> scores_;
  std::int32_t unk_;
  double lowest_ = std::numeric_limits<double>::infinity();
  Trie trie_;
  std::array<std::int32_t, 256> bytes_{};
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
