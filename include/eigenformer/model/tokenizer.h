/// \file
/// Text to ids of tokens and back, as the files of a model say.
///
///   const ef::Tokenizer tokenizer = ef::Tokenizer::from_folder("Llama-3.2-1B-Instruct");
///   std::vector<std::int32_t> ids = tokenizer.encode("Once upon a time");  // begins with bos, if
///   std::string text = tokenizer.decode(ids);                              // the files say so
///
///   ef::TextStream stream = tokenizer.stream();    // text of tokens as they come
///   std::cout << stream.push(id) << std::flush;    // whole characters only
///   std::cout << stream.finish();
///
/// Ids equal those of PyPI's tokenizers 0.23 (tests/golden/make_tokenizers.py). What is read of
/// tokenizer.json:
///
///   models           BPE: byte-level (Sennrich et al., 2016; GPT-2) and SentencePiece's, with byte
///                    fallback; Unigram (Kudo, 2018)
///   normalizers      NFC, NFD, NFKC, NFKD, Nmt, StripAccents, Lowercase, Prepend, Replace, Strip,
///                    ByteLevel
///   pre-tokenizers   ByteLevel, Split, Digits, Metaspace, Whitespace, WhitespaceSplit,
///                    Punctuation, BertPreTokenizer
///   post-processors  TemplateProcessing (of one text), ByteLevel, BertProcessing,
///                    RobertaProcessing
///   decoders         ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip
///
/// and Sequences of them; from GGUF the models llama, t5 (unigram) and gpt2. Anything else
/// (WordPiece, Precompiled, BPE dropout, ...) is refused by its name. Truncation and padding are
/// not read.
///
/// Text is UTF-8. What is not well formed is read as Python's errors="replace" reads it: U+FFFD for
/// every longest part that could have begun a character. Patterns run on PCRE2 and know the
/// characters of its Unicode version, normal forms those of unicode_tables.h.
///
/// Cost: O(n log n) for n bytes of text, whatever it holds, but for patterns that backtrack: their
/// steps are bounded (tokenizer/regex.h), past which encode() throws ModelFileError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model_texts.h"
#include "tokenizer/data.h"
#include "tokenizer/gguf.h"
#include "tokenizer/json.h"
#include "tokenizer/settings.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct EncodeOptions {
  bool add_special = true;    ///< begin- and end-of-sequence, where the files put them
  bool parse_special = true;  ///< special tokens in the text count as such; false for text of users
};
struct DecodeOptions {
  bool skip_special = true;  ///< special tokens give no text
};

/// The text of tokens that come one by one, in whole characters: what is given out is final. All of
/// it together is decode() of the tokens, but where they spell bytes that are no UTF-8: decode()
/// then follows tokenizers and writes one U+FFFD for each byte of such a run.
class TextStream {
 public:
  /// The text that this token completes, perhaps none.
  std::string push(std::int32_t id) {
    if (!data_->vocabulary.has(id) || (options_.skip_special && data_->is_special(id))) return {};
    return decoder_.push(data_->decoding_text(id));
  }
  /// What is left when no more tokens come.
  std::string finish() { return decoder_.finish(); }

 private:
  friend class Tokenizer;
  TextStream(std::shared_ptr<const detail::TokenizerData> data, DecodeOptions options)
      : data_(std::move(data)), options_(options), decoder_(data_->decoder) {}

  std::shared_ptr<const detail::TokenizerData> data_;
  DecodeOptions options_;
  detail::StreamDecoder decoder_;
};

/// Copies share everything; const calls from many threads are safe.
class Tokenizer {
 public:
  /// A tokenizer without tokens.
  Tokenizer() : Tokenizer(detail::TokenizerData()) {}

  /// From tokenizer.json, and what else of tokenizer_config.json, special_tokens_map.json,
  /// generation_config.json, config.json, chat_template.json and chat_template.jinja a folder has.
  /// Throws ModelFileError naming file, place and reason.
  static Tokenizer from_folder(const std::filesystem::path& folder) {
    return from_texts(detail::FolderTexts(folder));
  }
  /// From texts of these files, wherever they lie: model/model_texts.h.
  template <typename Texts>
  static Tokenizer from_texts(Texts texts) {
    constexpr auto json = "tokenizer.json", jinja = "chat_template.jinja";
    detail::TokenizerData data = detail::tokenizer_from_json(texts.text(json), texts.name(json));
    const auto read_beside = [&](const char* name, auto&& read) {
      if (!texts.has(name)) return;
      const nlohmann::json document = detail::parse_json(texts.text(name), texts.name(name));
      read(detail::JsonValue(document, texts.name(name)), data);
    };
    read_beside("generation_config.json", detail::read_token_numbers);
    read_beside("tokenizer_config.json", detail::read_token_names);
    read_beside("special_tokens_map.json", detail::read_token_names);
    read_beside("chat_template.json", detail::read_token_names);
    read_beside("config.json", detail::read_token_numbers);
    if (texts.has(jinja)) data.chat_template = detail::whole_utf8(texts.text(jinja));
    return Tokenizer(std::move(data));
  }
  /// From the text of a tokenizer.json alone. `name` is for messages.
  static Tokenizer from_json(std::string_view text, const std::string& name = "tokenizer.json") {
    return Tokenizer(detail::tokenizer_from_json(text, name));
  }
  static Tokenizer from_gguf(const Gguf& file) { return from_gguf(detail::gguf_vocabulary(file)); }
  static Tokenizer from_gguf(const GgufVocabulary& vocabulary) {
    return Tokenizer(detail::tokenizer_from_gguf(vocabulary));
  }

  /// Throws std::invalid_argument for more than 2^30 bytes.
  std::vector<std::int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const {
    return detail::encoded(*data_, text, options.add_special, options.parse_special);
  }
  /// Ids without a token, such as those of rows that pad an embedding, give no text.
  std::string decode(std::span<const std::int32_t> ids, const DecodeOptions& options = {}) const {
    return detail::decoded(data_->decoder, detail::texts_of(*data_, ids, options.skip_special));
  }
  TextStream stream(const DecodeOptions& options = {}) const { return {data_, options}; }

  /// The highest id and one.
  std::size_t vocabulary_size() const { return data_->vocabulary.size(); }
  /// A token as the vocabulary spells it; empty: none.
  const std::string& token(std::int32_t id) const { return data_->vocabulary.text(id); }
  std::optional<std::int32_t> find(std::string_view token) const {
    return known(data_->vocabulary.find_any(token));
  }
  bool is_special(std::int32_t id) const { return data_->is_special(id); }

  std::optional<std::int32_t> bos() const { return known(data_->bos); }
  std::optional<std::int32_t> unk() const { return known(data_->unk); }
  std::optional<std::int32_t> pad() const { return known(data_->pad); }
  /// Every token that ends a text: of generation_config.json, tokenizer_config.json and config.json
  /// together; of GGUF, also the special tokens that end turns in the common families.
  const std::vector<std::int32_t>& eos() const { return data_->eos; }
  /// The one that tokenizer_config.json or GGUF names, which templates call eos_token.
  std::optional<std::int32_t> eos_of_texts() const { return known(data_->eos_of_texts); }
  /// In Jinja; empty: none. See chat_template.h.
  const std::string& chat_template() const { return data_->chat_template; }

 private:
  explicit Tokenizer(detail::TokenizerData data)
      : data_(std::make_shared<const detail::TokenizerData>(std::move(data))) {}
  static std::optional<std::int32_t> known(std::int32_t id) {
    return id < 0 ? std::nullopt : std::optional(id);
  }
  std::shared_ptr<const detail::TokenizerData> data_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
