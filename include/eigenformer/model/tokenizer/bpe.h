/// \file
/// Byte-pair encoding (Sennrich et al., 2016): a word begins as its characters, and of all
/// neighbours that may merge those of the lowest rank do, the leftmost first, until none may.
///
/// Candidates lie in a heap, so a word of n characters takes O(n log n), whatever it holds. Long
/// words, such as whole texts of SentencePiece, are cut where no merge can cross: between two
/// characters that stand next to each other in no token that is merged. Parts come again and again,
/// and their ids are kept. On 4 MB of program text, vocabulary 32,000, that took 0.32 s in place of
/// 2.1 s (Zen 5).
///
/// Two rules say who may merge: a list of pairs (tokenizer.json, GGUF's gpt2), or, as in
/// SentencePiece, any neighbours whose joined text is a token, ranked by its score (GGUF's llama).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "text.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Pairs of characters: those of byte alphabets and Latin scripts, which come most, in a table.
class CharacterPairs {
 public:
  void insert(char32_t left, char32_t right) {
    if (!in_table(left, right))
      others_.insert(pair_of(left, right));
    else
      table_[std::size_t{left} * kTable + right] = true;
  }
  bool contains(char32_t left, char32_t right) const {
    return in_table(left, right) ? table_[std::size_t{left} * kTable + right]
                                 : others_.contains(pair_of(left, right));
  }

 private:
  static constexpr char32_t kTable = 512;
  static bool in_table(char32_t left, char32_t right) { return left < kTable && right < kTable; }
  static std::uint64_t pair_of(char32_t left, char32_t right) {
    return std::uint64_t{left} << 32 | right;
  }
  std::vector<bool> table_ = std::vector<bool>(std::size_t{kTable} * kTable);
  std::unordered_set<std::uint64_t> others_;
};

class Bpe {
 public:
  struct Options {
    std::int32_t unk = -1;  ///< -1: what no token spells is left out
    bool fuse_unk = false;  ///< one unk for neighbours that no token spells
    bool byte_fallback = false;
    bool ignore_merges = false;  ///< a word that is a token stays whole
    std::string prefix = {};     ///< of characters inside a word
    std::string suffix = {};     ///< of the last character of a word
  };
  struct Merge {
    std::uint32_t rank;
    std::int32_t id;
  };
  struct Symbol {
    std::int32_t id;           ///< -1: no token
    std::size_t begin;         ///< in the word
    std::size_t bytes;         ///< 0: merged into its neighbour to the left
    std::int64_t left, right;  ///< -1: none
  };
  /// Memory that calls reuse, one for each thread.
  struct Scratch {
    struct Candidate {
      std::uint32_t rank;
      std::int32_t id;
      std::size_t at;     // symbol
      std::size_t bytes;  // of both: they differ once one of them has merged
      bool operator>(const Candidate& other) const {
        return rank != other.rank ? rank > other.rank : at > other.at;
      }
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  /// Who may merge is told by add_merge(), the lowest rank first.
  Bpe(const Vocabulary& vocabulary, Options options) : options_(std::move(options)) {
    find_bytes(vocabulary);
  }
  /// Who may merge is told by `ranks` of tokens; UINT32_MAX: the token comes from no merge.
  Bpe(const Vocabulary& vocabulary, Options options, std::vector<std::uint32_t> ranks)
      : options_(std::move(options)), by_text_(true), ranks_(std::move(ranks)) {
    find_bytes(vocabulary);
    for (std::size_t i = 0; i < ranks_.size(); ++i)
      if (ranks_[i] != kNever)
        longest_ = (std::max)(longest_, vocabulary.text(static_cast<std::int64_t>(i)).size());
    finish(vocabulary);
  }
  static constexpr std::uint32_t kNever = 0xFFFFFFFF;

  void reserve_merges(std::size_t count) { merges_.reserve(count); }
  /// Throws ModelFileError where one of the tokens, or what they merge to, is none. Of the same
  /// pair twice the later rank holds.
  void add_merge(const Vocabulary& vocabulary, std::string_view left, std::string_view right) {
    const std::int32_t a = vocabulary.find(left), b = vocabulary.find(right);
    const std::size_t cut = right.starts_with(options_.prefix) ? options_.prefix.size() : 0;
    const std::string joined = std::string(left) + std::string(right.substr(cut));
    const std::int32_t both = vocabulary.find(joined);
    for (const auto& [id, text] :
         {std::pair{a, left}, {b, right}, {both, std::string_view(joined)}})
      if (id < 0)
        fail_model(vocabulary.file(), "merge " + std::to_string(next_rank_),
                   "of or into \"" + printable(text) + "\", which is no token");
    merges_.insert_or_assign(key(a, b), Merge{next_rank_++, both});
  }

  /// After the last merge.
  void finish(const Vocabulary& vocabulary) {
    const auto add = [&](std::int64_t id) {
      char32_t before = 0;
      std::string_view rest = vocabulary.text(id);
      for (bool first = true; !rest.empty(); first = false) {
        const Utf8Front front = utf8_front(rest);
        if (!first) neighbours_.insert(before, front.code_point);
        before = front.code_point;
        rest.remove_prefix(front.bytes);
      }
    };
    std::vector<bool> added(vocabulary.size());
    for (const auto& [pair, merge] : merges_) {
      if (!added[static_cast<std::size_t>(merge.id)]) add(merge.id);
      added[static_cast<std::size_t>(merge.id)] = true;
    }
    for (std::size_t i = 0; i < ranks_.size(); ++i)
      if (ranks_[i] != kNever) add(static_cast<std::int64_t>(i));
  }

  /// each(part, is_whole) for parts of a word that merge on their own.
  template <typename Each>
  void each_part(const Vocabulary& vocabulary, std::string_view word, Each&& each) const {
    constexpr std::size_t kShort = 64;  // bytes: cutting would cost more than it saves
    std::size_t begin = 0;
    const bool is_token = options_.ignore_merges && vocabulary.find(word) >= 0;
    if (word.size() > kShort && !dresses() && !is_token) {
      Utf8Front left = utf8_front(word);
      for (std::size_t at = left.bytes; at < word.size();) {
        const Utf8Front right = utf8_front(word.substr(at));
        // What is no token becomes unk or bytes, which merge by other texts than their own.
        if (!neighbours_.contains(left.code_point, right.code_point) &&
            vocabulary.find(word.substr(at - left.bytes, left.bytes)) >= 0 &&
            vocabulary.find(word.substr(at, right.bytes)) >= 0) {
          each(word.substr(begin, at - begin), false);
          begin = at;
        }
        left = right;
        at += right.bytes;
      }
    }
    each(word.substr(begin), begin == 0);
  }

  /// Appends the ids of a word, which is whole UTF-8, or of a part of one.
  void encode(const Vocabulary& vocabulary, std::string_view word, bool is_whole, Scratch& scratch,
              std::vector<std::int32_t>& ids) const {
    if (options_.ignore_merges && is_whole) {
      if (const std::int32_t id = vocabulary.find(word); id >= 0) return ids.push_back(id);
    }
    if (by_text_) {
      split_characters(word, scratch.symbols,
                       [&](std::string_view c) { return vocabulary.find(c); });
      merge_all(scratch, [&](const Symbol& left, const Symbol& right) {
        const std::size_t bytes = left.bytes + right.bytes;
        const std::int32_t id =
            bytes > longest_ ? -1 : vocabulary.find(word.substr(left.begin, bytes));
        return id < 0 ? Merge{kNever, -1} : Merge{ranks_[static_cast<std::size_t>(id)], id};
      });
      spell(word, scratch.symbols, ids);
    } else {
      spell_characters(vocabulary, word, scratch.symbols);
      merge_all(scratch, [&](const Symbol& left, const Symbol& right) {
        const auto at = merges_.find(key(left.id, right.id));
        return at == merges_.end() ? Merge{kNever, -1} : at->second;
      });
      for (const Symbol& symbol : scratch.symbols)
        if (symbol.bytes > 0) ids.push_back(symbol.id);
    }
  }

 private:
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 |
           static_cast<std::uint32_t>(right);
  }
  bool dresses() const { return !options_.prefix.empty() || !options_.suffix.empty(); }
  void find_bytes(const Vocabulary& vocabulary) {
    for (std::size_t b = 0; b < bytes_.size(); ++b)
      bytes_[b] = vocabulary.find(byte_token(static_cast<unsigned char>(b)));
  }
  bool spells_bytes(std::string_view text) const {
    return options_.byte_fallback &&
           std::ranges::all_of(text, [&](char c) { return byte_id(c) >= 0; });
  }
  std::int32_t byte_id(char c) const { return bytes_[static_cast<unsigned char>(c)]; }

  static void append(std::vector<Symbol>& symbols, std::int32_t id, std::size_t begin,
                     std::size_t bytes) {
    const auto at = static_cast<std::int64_t>(symbols.size());
    if (at > 0) symbols.back().right = at;
    symbols.push_back({id, begin, bytes, at - 1, -1});
  }

  template <typename Find>
  static void split_characters(std::string_view word, std::vector<Symbol>& symbols, Find&& find) {
    symbols.clear();
    for (std::size_t at = 0; at < word.size();) {
      const std::string_view character = word.substr(at, character_bytes(word.substr(at)));
      append(symbols, find(character), at, character.size());
      at += character.size();
    }
  }
  /// SentencePiece merges first and spells what is no token afterwards.
  void spell(std::string_view word, const std::vector<Symbol>& symbols,
             std::vector<std::int32_t>& ids) const {
    bool after_unk = false;
    for (const Symbol& symbol : symbols) {
      if (symbol.bytes == 0) continue;
      const std::string_view text = word.substr(symbol.begin, symbol.bytes);
      const bool is_unk = symbol.id < 0 && !spells_bytes(text);
      if (symbol.id >= 0) {
        ids.push_back(symbol.id);
      } else if (!is_unk) {
        for (const char c : text) ids.push_back(byte_id(c));
      } else if (options_.unk >= 0 && !(after_unk && options_.fuse_unk)) {
        ids.push_back(options_.unk);
      }
      after_unk = is_unk;
    }
  }
  /// tokenizers spells first, so that bytes and unk may merge as well. An unk waits for the next
  /// token of the vocabulary, and so comes after bytes that follow it.
  void spell_characters(const Vocabulary& vocabulary, std::string_view word,
                        std::vector<Symbol>& symbols) const {
    symbols.clear();
    std::size_t unk_begin = 0, unk_bytes = 0;
    const auto put_unk = [&] {
      if (unk_bytes > 0) append(symbols, options_.unk, unk_begin, unk_bytes);
      unk_bytes = 0;
    };
    std::string dressed;
    for (std::size_t at = 0; at < word.size();) {
      std::string_view character = word.substr(at, character_bytes(word.substr(at)));
      const std::size_t begin = at, bytes = character.size();
      at += bytes;
      if (dresses()) {
        dressed = (begin > 0 ? options_.prefix : "") + std::string(character) +
                  (at == word.size() ? options_.suffix : "");
        character = dressed;
      }
      if (const std::int32_t id = vocabulary.find(character); id >= 0) {
        put_unk();
        append(symbols, id, begin, bytes);
      } else if (spells_bytes(character)) {
        for (const char c : character) append(symbols, byte_id(c), begin, 1);
      } else if (options_.unk >= 0) {
        if (!options_.fuse_unk) put_unk();
        if (unk_bytes == 0) unk_begin = begin;
        unk_bytes += bytes;
      }
    }
    put_unk();
  }

  /// lookup(left, right): the merge of two neighbours, rank kNever where there is none.
  template <typename Lookup>
  static void merge_all(Scratch& scratch, Lookup&& lookup) {
    auto& [symbols, heap] = scratch;
    const auto worse = std::greater<Scratch::Candidate>();
    const auto propose = [&](std::int64_t left, std::int64_t right) {
      if (left < 0 || right < 0) return;
      const auto at = static_cast<std::size_t>(left);
      const Symbol &a = symbols[at], &b = symbols[static_cast<std::size_t>(right)];
      const Merge merge = lookup(a, b);
      if (merge.rank != kNever) heap.push_back({merge.rank, merge.id, at, a.bytes + b.bytes});
    };
    heap.clear();
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i)
      propose(static_cast<std::int64_t>(i), static_cast<std::int64_t>(i + 1));
    std::make_heap(heap.begin(), heap.end(), worse);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), worse);
      const Scratch::Candidate best = heap.back();
      heap.pop_back();
      Symbol& left = symbols[best.at];
      if (left.bytes == 0 || left.right < 0) continue;
      Symbol& right = symbols[static_cast<std::size_t>(left.right)];
      if (left.bytes + right.bytes != best.bytes) continue;  // one of them has merged since
      left.id = best.id;
      left.bytes = best.bytes;
      left.right = right.right;
      right.bytes = 0;
      const auto at = static_cast<std::int64_t>(best.at);
      if (left.right >= 0) symbols[static_cast<std::size_t>(left.right)].left = at;
      for (const auto& [a, b] : {std::pair{left.left, at}, {at, left.right}}) {
        const std::size_t before = heap.size();
        propose(a, b);
        if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), worse);
      }
    }
  }

  Options options_;
  bool by_text_ = false;
  std::vector<std::uint32_t> ranks_;
  std::size_t longest_ = 0;
  std::unordered_map<std::uint64_t, Merge> merges_;
  CharacterPairs neighbours_;
  std::uint32_t next_rank_ = 0;
  std::array<std::int32_t, 256> bytes_{};
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
