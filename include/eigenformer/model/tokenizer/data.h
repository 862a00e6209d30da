/// \file
/// What a tokenizer is, from whatever file, and how text passes through it:
///
///   text -> added tokens cut out -> normalizers -> added tokens of normalized text cut out
///        -> splitters -> model (BPE or unigram), piece by piece -> ids before and after
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "added_tokens.h"
#include "bpe.h"
#include "decoder.h"
#include "pieces.h"
#include "unigram.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

struct TokenizerData {
  Vocabulary vocabulary;
  std::variant<std::monostate, Bpe, Unigram> model = {};
  std::vector<Normalizer> normalizers = {};
  std::vector<Splitter> splitters = {};
  AddedTokenFinder added = {}, added_normalized = {};
  std::vector<bool> special = {};                                       ///< by id
  std::unordered_map<std::int32_t, std::string> normalized_texts = {};  ///< of added tokens
  std::vector<std::int32_t> before = {}, after = {};                    ///< ids around a text
  std::vector<DecodeStep> decoder = {};
  std::int32_t bos = -1, unk = -1, pad = -1, eos_of_texts = -1;  ///< -1: none
  std::vector<std::int32_t> eos = {};
  std::string chat_template = {};

  bool is_special(std::int64_t id) const {
    return id >= 0 && std::cmp_less(id, special.size()) && special[static_cast<std::size_t>(id)];
  }
  /// What the decoder gets: added tokens of normalized text come as they were looked for.
  const std::string& decoding_text(std::int32_t id) const {
    const auto at = normalized_texts.find(id);
    return at == normalized_texts.end() ? vocabulary.text(id) : at->second;
  }
  std::string normalize(std::string text) const {
    for (const Normalizer& step : normalizers) text = step(std::move(text));
    return text;
  }
  /// After the vocabulary and the normalizers.
  void set_added(const std::vector<AddedToken>& tokens) {
    std::vector<AddedToken> kinds[2];
    std::vector<std::string> texts[2];
    special.assign(vocabulary.size(), false);
    for (const AddedToken& token : tokens) {
      kinds[token.normalized].push_back(token);
      texts[token.normalized].push_back(token.normalized ? normalize(token.text) : token.text);
      if (token.normalized) normalized_texts.emplace(token.id, texts[1].back());
      if (token.special) special[static_cast<std::size_t>(token.id)] = true;
    }
    added = AddedTokenFinder(std::move(kinds[0]), texts[0], vocabulary.file());
    added_normalized = AddedTokenFinder(std::move(kinds[1]), texts[1], vocabulary.file());
  }
};

inline std::vector<Piece> pieces_of(const TokenizerData& data, std::string text,
                                    bool parse_special) {
  std::vector<Piece> pieces;
  if (text.empty()) return pieces;
  pieces.push_back({std::move(text), true});
  if (!data.added.empty())
    split_pieces(
        [&](Piece piece, std::vector<Piece>& to) {
          data.added.split(std::move(piece), parse_special, to);
        },
        pieces);
  split_pieces(
      [&](Piece piece, std::vector<Piece>& to) {
        piece.text = data.normalize(std::move(piece.text));
        if (piece.text.empty()) return;
        if (data.added_normalized.empty()) return to.push_back(std::move(piece));
        data.added_normalized.split(std::move(piece), parse_special, to);
      },
      pieces);
  for (const Splitter& step : data.splitters) split_pieces(step, pieces);
  return pieces;
}

/// Ids of text, by the model. Words come again and again in a text, so their ids are kept.
template <typename Model>
void encode_pieces(const Model& model, const Vocabulary& vocabulary,
                   const std::vector<Piece>& pieces, std::vector<std::int32_t>& ids) {
  constexpr std::size_t kLongestWord = 64;  // bytes; longer ones hardly come again
  struct Place {
    std::size_t begin, count;
  };
  std::unordered_map<std::string_view, Place> seen[2];  // parts, whole words
  typename Model::Scratch scratch;
  const auto encode = [&](std::string_view word, bool is_whole) {
    if (word.size() > kLongestWord) return model.encode(vocabulary, word, is_whole, scratch, ids);
    const std::size_t begin = ids.size();
    const auto [at, fresh] = seen[is_whole].try_emplace(word, Place{begin, 0});
    if (fresh) {
      model.encode(vocabulary, word, is_whole, scratch, ids);
      at->second.count = ids.size() - begin;
      return;
    }
    const auto [from, count] = at->second;
    for (std::size_t i = 0; i < count; ++i) ids.push_back(ids[from + i]);
  };
  for (const Piece& piece : pieces) {
    if (piece.token >= 0)
      ids.push_back(piece.token);
    else
      model.each_part(vocabulary, piece.text, encode);
  }
}

inline std::vector<std::int32_t> encoded(const TokenizerData& data, std::string_view text,
                                         bool add_special, bool parse_special) {
  if (text.size() > (std::size_t{1} << 30)) [[unlikely]]
    fail<std::invalid_argument>("tokenizer: text has " + std::to_string(text.size()) +
                                " bytes, at most 2^30 are encoded at once");
  const std::vector<Piece> pieces = pieces_of(data, whole_utf8(text), parse_special);
  std::vector<std::int32_t> ids;
  if (add_special) ids = data.before;
  std::visit(
      [&](const auto& model) {
        if constexpr (!std::is_same_v<std::decay_t<decltype(model)>, std::monostate>)
          encode_pieces(model, data.vocabulary, pieces, ids);
      },
      data.model);
  if (add_special) ids.insert(ids.end(), data.after.begin(), data.after.end());
  return ids;
}

/// Texts of the ids that have one, special ones left out where they are to be.
inline std::vector<std::string> texts_of(const TokenizerData& data,
                                         std::span<const std::int32_t> ids, bool skip_special) {
  std::vector<std::string> texts;
  for (const std::int32_t id : ids)
    if (data.vocabulary.has(id) && !(skip_special && data.is_special(id)))
      texts.push_back(data.decoding_text(id));
  return texts;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
