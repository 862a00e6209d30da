/// \file
/// Tokenizers from the metadata of a GGUF file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../gguf.h"
#include "data.h"
#include "gguf_patterns.h"
#include "settings.h"
#include "unicode.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// The values of tokenizer.ggml.* by their last names. Ids are -1 where a file has none.
struct GgufVocabulary {
  std::string_view model;     ///< "llama" (SentencePiece's BPE), "t5" (its unigram) or "gpt2"
  std::string_view pre = {};  ///< how gpt2 cuts words: "llama-bpe", "qwen2", ...
  std::vector<std::string_view> tokens = {};
  std::vector<float> scores = {};        ///< llama, t5: one for each token
  std::vector<std::int32_t> types = {};  ///< one for each token, or none; see detail::GgufTokenType
  std::vector<std::string_view> merges = {};            ///< gpt2: "left right"
  std::int64_t bos = -1, eos = -1, unk = -1, pad = -1;  ///< X_token_id; pad: padding_token_id
  std::vector<std::int64_t> more_ends = {};             ///< eot_token_id, eom_token_id
  std::optional<bool> add_bos = {}, add_eos = {};       ///< add_X_token
  std::optional<bool> add_space_prefix = {};
  bool remove_extra_whitespaces = false;  ///< t5
  /// White space to the right of special tokens belongs to them, but of <unk>, <s>, <|endoftext|>:
  /// so it is in Phi 3, whose files do not say so.
  bool special_takes_right = false;
  std::string_view chat_template = {};  ///< tokenizer.chat_template
  std::string file = "the GGUF file";   ///< its name, for messages
};

namespace detail {

/// tokenizer.ggml.token_type
enum class GgufTokenType : std::int32_t {
  normal = 1,
  unknown,
  control,
  user_defined,
  unused,
  byte
};

/// Tokens that end a turn in chats of common families. Files name one of them only.
inline constexpr std::string_view kEndsOfTurns[] = {
    "<|eot_id|>",     "<|im_end|>", "<|end|>",  "<end_of_turn>",
    "<|endoftext|>",  "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>",
    "<|end_of_text|>"};

inline GgufTokenType gguf_type(const GgufVocabulary& file, std::size_t id) {
  return file.types.empty() ? GgufTokenType::normal : static_cast<GgufTokenType>(file.types[id]);
}

/// Whether text can mean a token of SentencePiece's; control and bytes it cannot.
inline bool has_text(const GgufVocabulary& file, std::size_t id) {
  const GgufTokenType type = gguf_type(file, id);
  return type == GgufTokenType::normal || type == GgufTokenType::user_defined ||
         type == GgufTokenType::unused;
}

/// Ranks of tokens as merges: equal scores are equal, and the best is 0.
inline std::vector<std::uint32_t> ranks_of_scores(const GgufVocabulary& file) {
  std::vector<float> order = file.scores;
  std::ranges::sort(order, std::greater<float>());
  order.erase(std::unique(order.begin(), order.end()), order.end());
  std::vector<std::uint32_t> ranks;
  for (std::size_t i = 0; i < file.scores.size(); ++i) {
    const auto at = std::ranges::lower_bound(order, file.scores[i], std::greater<float>());
    ranks.push_back(has_text(file, i) ? static_cast<std::uint32_t>(at - order.begin())
                                      : Bpe::kNever);
  }
  return ranks;
}
inline Unigram read_unigram(const GgufVocabulary& file, const TokenizerData& data) {
  std::vector<double> scores;
  bool has_bytes = false;
  for (std::size_t i = 0; i < file.scores.size(); ++i) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    scores.push_back(has_text(file, i) ? static_cast<double>(file.scores[i]) : none);
    has_bytes = has_bytes || gguf_type(file, i) == GgufTokenType::byte;
  }
  return Unigram(data.vocabulary, std::move(scores), data.unk, has_bytes);
}

inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  ///< U+2581

inline void read_sentencepiece(const GgufVocabulary& file, TokenizerData& data) {
  if (file.scores.size() != file.tokens.size())
    fail_model(file.file, "tokenizer.ggml.scores",
               "has " + std::to_string(file.scores.size()) + " values for " +
                   std::to_string(file.tokens.size()) + " tokens");
  for (const float score : file.scores)
    if (!std::isfinite(score))
      fail_model(file.file, "tokenizer.ggml.scores", "holds a value that is not finite");
  if (file.model == "llama")
    data.model = Bpe(data.vocabulary, {.unk = data.unk, .fuse_unk = true, .byte_fallback = true},
                     ranks_of_scores(file));
  else
    data.model = read_unigram(file, data);
  if (file.remove_extra_whitespaces)
    data.normalizers.push_back([ends = Regex(R"(\A +| +\z)", file.file),
                                inside = Regex(" {2,}", file.file)](std::string text) {
      return inside.replace(ends.replace(text, ""), " ");
    });
  const bool adds_space = file.add_space_prefix.value_or(true);
  data.normalizers.push_back([adds_space](std::string text) {
    std::string marked(adds_space && !text.empty() ? kSpaceMark : "");
    for (const char c : text) c == ' ' ? marked += kSpaceMark : marked += c;
    return marked;
  });
  using Kind = DecodeStep::Kind;
  data.decoder = {{.kind = Kind::replace,
                   .content = " ",
                   .pattern = Regex(quoted_pattern(kSpaceMark), file.file, true)},
                  {.kind = Kind::byte_fallback},
                  {.kind = Kind::fuse}};
  if (adds_space) data.decoder.push_back({.kind = Kind::strip, .text = " ", .start = 1});
}

inline void read_byte_level(const GgufVocabulary& file, TokenizerData& data,
                            const GgufWords& words) {
  Bpe bpe(data.vocabulary, {.unk = data.unk, .ignore_merges = words.ignore_merges});
  bpe.reserve_merges(file.merges.size());
  for (const std::string_view merge : file.merges) {
    const std::size_t space = merge.find(' ', 1);
    if (space == merge.npos)
      fail_model(file.file, "tokenizer.ggml.merges",
                 "holds \"" + printable(merge) + "\", which is not two tokens");
    bpe.add_merge(data.vocabulary, merge.substr(0, space), merge.substr(space + 1));
  }
  bpe.finish(data.vocabulary);
  data.model = std::move(bpe);
  if (words.composes)
    data.normalizers.push_back([](std::string text) { return normalized(text, NormalForm::nfc); });
  for (const std::string_view pattern : words.patterns)
    data.splitters.push_back(splitter(Regex(pattern, file.file), SplitBehavior::isolated));
  data.splitters.push_back(to_byte_alphabet());
  data.decoder = {{.kind = DecodeStep::Kind::byte_level}};
}

inline void set_ends(const GgufVocabulary& file, TokenizerData& data) {
  const auto token = [&](std::int64_t id) {
    return data.vocabulary.has(id) ? static_cast<std::int32_t>(id) : -1;
  };
  data.bos = token(file.bos);
  data.pad = token(file.pad);
  data.eos_of_texts = token(file.eos);
  add_end(data, data.eos_of_texts);
  for (const std::int64_t id : file.more_ends) add_end(data, token(id));
  for (const std::string_view text : kEndsOfTurns)
    if (const std::int32_t id = data.vocabulary.find_any(text); data.is_special(id))
      add_end(data, id);
}

inline TokenizerData tokenizer_from_gguf(const GgufVocabulary& file) {
  TokenizerData data{.vocabulary = Vocabulary(file.file)};
  if (!file.types.empty() && file.types.size() != file.tokens.size())
    fail_model(file.file, "tokenizer.ggml.token_type",
               "has " + std::to_string(file.types.size()) + " values for " +
                   std::to_string(file.tokens.size()) + " tokens");
  if (file.tokens.empty()) fail_model(file.file, "tokenizer.ggml.tokens", "is missing or empty");
  const bool is_sentencepiece = file.model == "llama" || file.model == "t5";
  std::vector<AddedToken> added;
  for (std::size_t i = 0; i < file.tokens.size(); ++i) {
    // What is no UTF-8 can be typed by nobody, but keeps its id.
    const std::string text = whole_utf8(file.tokens[i]);
    const GgufTokenType type = gguf_type(file, i);
    const bool control = type == GgufTokenType::control || type == GgufTokenType::unknown;
    const bool is_added = control || type == GgufTokenType::user_defined;
    data.vocabulary.add(text, static_cast<std::int64_t>(i), is_sentencepiece || !is_added);
    if (text.empty() || !is_added) continue;
    added.push_back({.text = text, .id = static_cast<std::int32_t>(i), .special = control});
    added.back().takes_right =
        file.special_takes_right && text != "<unk>" && text != "<s>" && text != "<|endoftext|>";
  }
  data.vocabulary.index();
  data.unk = static_cast<std::int32_t>(data.vocabulary.has(file.unk) ? file.unk : -1);
  bool adds_bos = file.model == "llama";
  if (is_sentencepiece) {
    if (data.unk < 0)
      for (std::size_t i = 0; i < file.types.size(); ++i)
        if (gguf_type(file, i) == GgufTokenType::unknown) data.unk = static_cast<std::int32_t>(i);
    read_sentencepiece(file, data);
  } else if (file.model == "gpt2") {
    const GgufWords* const words = gguf_words(file.pre);
    if (words == nullptr)
      fail_model(file.file, "tokenizer.ggml.pre",
                 "is " + printable(file.pre) + ", which is not supported");
    read_byte_level(file, data, *words);
    adds_bos = words->adds_bos;
  } else {
    fail_model(file.file, "tokenizer.ggml.model",
               "is " + printable(file.model) + "; llama, t5 and gpt2 are supported");
  }
  data.set_added(added);
  set_ends(file, data);
  if (file.add_bos.value_or(adds_bos) && data.bos >= 0) data.before.push_back(data.bos);
  if (file.add_eos.value_or(file.model == "t5") && data.eos_of_texts >= 0)
    data.after.push_back(data.eos_of_texts);
  data.chat_template = whole_utf8(file.chat_template);
  return data;
}

/// What a file says under tokenizer. Texts stay in the file.
inline GgufVocabulary gguf_vocabulary(const Gguf& file) {
  const GgufMetadata& metadata = file.metadata();
  const auto key = [](const char* name) { return std::string("tokenizer.ggml.") + name; };
  const auto text = [&](const std::string& name) {
    return metadata.contains(name) ? metadata.text(name) : std::string_view();
  };
  const auto integer = [&](const char* name, std::int64_t otherwise) {
    return metadata.contains(key(name)) ? metadata.integer(key(name)) : otherwise;
  };
  const auto flag = [&](const char* name) {
    return metadata.contains(key(name)) ? std::optional(metadata.boolean(key(name))) : std::nullopt;
  };
  GgufVocabulary vocabulary{.model = metadata.text(key("model")),
                            .pre = text(key("pre")),
                            .tokens = metadata.texts(key("tokens")),
                            .add_bos = flag("add_bos_token"),
                            .add_eos = flag("add_eos_token"),
                            .add_space_prefix = flag("add_space_prefix"),
                            .chat_template = text("tokenizer.chat_template"),
                            .file = file.tensors().file()};
  if (metadata.contains(key("scores")))
    for (const double score : metadata.numbers(key("scores")))
      vocabulary.scores.push_back(static_cast<float>(score));
  if (metadata.contains(key("token_type")))
    for (const std::int64_t type : metadata.integers(key("token_type")))
      vocabulary.types.push_back(type > 0 && type < 7 ? static_cast<std::int32_t>(type) : 1);
  if (metadata.contains(key("merges"))) vocabulary.merges = metadata.texts(key("merges"));
  if (metadata.contains(key("precompiled_charsmap")))
    fail_model(vocabulary.file, key("precompiled_charsmap"), "is there, and is not supported");
  vocabulary.remove_extra_whitespaces = flag("remove_extra_whitespaces").value_or(false);
  const bool is_llama = vocabulary.model == "llama";  // whose files may leave these out
  vocabulary.bos = integer("bos_token_id", is_llama ? 1 : -1);
  vocabulary.eos = integer("eos_token_id", is_llama ? 2 : -1);
  vocabulary.unk = integer("unknown_token_id", is_llama ? 0 : -1);
  vocabulary.pad = integer("padding_token_id", -1);
  const std::string name_of_model = lowercase(text("general.name"));
  vocabulary.special_takes_right = name_of_model.find("phi-3") != std::string::npos ||
                                   name_of_model.find("phi3") != std::string::npos;
  for (const char* name : {"eot_token_id", "eom_token_id"})
    vocabulary.more_ends.push_back(integer(name, -1));
  return vocabulary;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
