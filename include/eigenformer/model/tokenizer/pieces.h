/// \file
/// Steps of a tokenizer before its model: normalizers rewrite text, splitters cut it into pieces.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "regex.h"
#include "text.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A part of a text on its way to the model.
struct Piece {
  std::string text;         ///< whole UTF-8, not empty
  bool at_front = false;    ///< the text as it came begins here
  std::int32_t token = -1;  ///< an added token, which no step looks into
};

using Normalizer = std::function<std::string(std::string)>;
/// Appends what a piece becomes.
using Splitter = std::function<void(Piece, std::vector<Piece>&)>;

/// What becomes of a match, in tokenizers' words: a piece of its own; nothing; one piece with the
/// matches, or the text, beside it; the end of the piece before; the beginning of the one after.
enum class SplitBehavior { isolated, removed, contiguous, merged_with_previous, merged_with_next };

inline std::optional<SplitBehavior> split_behavior(std::string_view name) {
  constexpr std::pair<std::string_view, SplitBehavior> kNames[] = {
      {"Isolated", SplitBehavior::isolated},
      {"Removed", SplitBehavior::removed},
      {"Contiguous", SplitBehavior::contiguous},
      {"MergedWithPrevious", SplitBehavior::merged_with_previous},
      {"MergedWithNext", SplitBehavior::merged_with_next}};
  for (const auto& [known, behavior] : kNames)
    if (known == name) return behavior;
  return std::nullopt;
}

/// A text cut at matches and between them.
struct Cut {
  std::size_t begin, end;
  bool is_match;
};

inline std::vector<Cut> cut_at_matches(const Regex& regex, std::string_view text, bool invert) {
  std::vector<Cut> cuts;
  std::size_t done = 0;
  Regex::Matches matches = regex.matches(text);
  while (const auto match = matches.next()) {
    if (match->first > done) cuts.push_back({done, match->first, invert});
    cuts.push_back({match->first, match->second, !invert});
    done = match->second;
  }
  if (done < text.size()) cuts.push_back({done, text.size(), invert});
  return cuts;
}

/// Joins cuts as the behaviour says. `removed` takes no part: see split_at().
inline std::vector<Cut> joined_cuts(const std::vector<Cut>& cuts, SplitBehavior behavior) {
  std::vector<Cut> joined;
  const std::size_t count = cuts.size();
  bool matched = false;  // the cut before
  for (std::size_t i = 0; i < count; ++i) {
    const bool backward = behavior == SplitBehavior::merged_with_next;
    const Cut& cut = cuts[backward ? count - 1 - i : i];
    const bool joins =
        behavior == SplitBehavior::contiguous ? cut.is_match == matched : cut.is_match && !matched;
    matched = cut.is_match;
    if (!joins || joined.empty())
      joined.push_back(cut);
    else if (backward)
      joined.back().begin = cut.begin;
    else
      joined.back().end = cut.end;
  }
  if (behavior == SplitBehavior::merged_with_next) std::reverse(joined.begin(), joined.end());
  return joined;
}

inline void split_at(const Regex& regex, SplitBehavior behavior, bool invert, Piece piece,
                     std::vector<Piece>& pieces) {
  std::vector<Cut> cuts = cut_at_matches(regex, piece.text, invert);
  if (behavior != SplitBehavior::isolated && behavior != SplitBehavior::removed)
    cuts = joined_cuts(cuts, behavior);
  for (const Cut& cut : cuts) {
    if (cut.begin == cut.end || (cut.is_match && behavior == SplitBehavior::removed)) continue;
    if (cut.begin == 0 && cut.end == piece.text.size()) return pieces.push_back(std::move(piece));
    pieces.push_back(
        {piece.text.substr(cut.begin, cut.end - cut.begin), piece.at_front && cut.begin == 0});
  }
}

inline Splitter splitter(Regex regex, SplitBehavior behavior, bool invert = false) {
  return [regex = std::move(regex), behavior, invert](Piece piece, std::vector<Piece>& pieces) {
    split_at(regex, behavior, invert, std::move(piece), pieces);
  };
}

/// Puts a space before text that has none.
inline Splitter space_prepender() {
  return [](Piece piece, std::vector<Piece>& pieces) {
    pieces.push_back(std::move(piece));
    std::string& text = pieces.back().text;
    if (!text.starts_with(' ')) text.insert(0, 1, ' ');
  };
}
/// Text in GPT-2's alphabet of bytes.
inline Splitter to_byte_alphabet() {
  return [](Piece piece, std::vector<Piece>& pieces) {
    piece.text = ByteAlphabet::instance().encode(piece.text);
    pieces.push_back(std::move(piece));
  };
}

/// GPT-2's words.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class PrependScheme { never, first, always };

/// SentencePiece's spaces: each becomes `mark`, and a mark is put before the text.
inline Splitter metaspace_splitter(std::string mark, PrependScheme scheme, bool splits,
                                   std::string_view file) {
  const Regex at_mark(quoted_pattern(mark), file, true);
  return [mark, scheme, splits, at_mark](Piece piece, std::vector<Piece>& pieces) {
    std::string text;
    for (const char c : piece.text) c == ' ' ? text += mark : text += c;
    const bool prepends =
        scheme == PrependScheme::always || (scheme == PrependScheme::first && piece.at_front);
    if (prepends && !text.starts_with(mark)) text.insert(0, mark);
    piece.text = std::move(text);
    if (splits)
      split_at(at_mark, SplitBehavior::merged_with_next, false, std::move(piece), pieces);
    else
      pieces.push_back(std::move(piece));
  };
}

/// Runs one step over all pieces but added tokens.
inline void split_pieces(const Splitter& step, std::vector<Piece>& pieces) {
  std::vector<Piece> next;
  next.reserve(pieces.size());
  for (Piece& piece : pieces) {
    if (piece.token >= 0)
      next.push_back(std::move(piece));
    else
      step(std::move(piece), next);
  }
  pieces = std::move(next);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
