/// \file
/// Tokenizers from Hugging Face's tokenizer.json. What a file asks for and is not known here is
/// refused by its name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../json.h"
#include "data.h"
#include "json_steps.h"
#include "json_value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline void read_bpe_vocabulary(const JsonValue& vocab, Vocabulary& vocabulary) {
  for (const auto& [text, id] : vocab.object())
    vocabulary.add(text, id.is_number_integer() ? JsonValue(id, vocab.file()).integer() : -1);
}

inline Bpe read_bpe(const JsonValue& model, const Vocabulary& vocabulary, std::int32_t unk) {
  if (model.has("dropout") && model["dropout"].number() != 0)
    model["dropout"].refuse("is not 0, and random merges are not supported");
  Bpe bpe(vocabulary, {.unk = unk,
                       .fuse_unk = model.flag("fuse_unk", false),
                       .byte_fallback = model.flag("byte_fallback", false),
                       .ignore_merges = model.flag("ignore_merges", false),
                       .prefix = model.text("continuing_subword_prefix", ""),
                       .suffix = model.text("end_of_word_suffix", "")});
  const JsonValue merges = model["merges"];
  bpe.reserve_merges(merges.size());
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const nlohmann::json& merge = merges.list()[i];
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      bpe.add_merge(vocabulary, merge[0].get_ref<const std::string&>(),
                    merge[1].get_ref<const std::string&>());
      continue;
    }
    const std::string_view line =
        merge.is_string() ? merge.get_ref<const std::string&>() : merges.at(i).text();
    if (line.starts_with("#version")) continue;
    const std::size_t space = line.find(' ');
    if (space == line.npos || line.find(' ', space + 1) != line.npos)
      merges.at(i).refuse("is not two tokens with a space between");
    bpe.add_merge(vocabulary, line.substr(0, space), line.substr(space + 1));
  }
  bpe.finish(vocabulary);
  return bpe;
}

inline std::vector<double> read_unigram_vocabulary(const JsonValue& vocab, Vocabulary& vocabulary) {
  std::vector<double> scores;
  for (std::size_t i = 0; i < vocab.size(); ++i) {
    const JsonValue entry = vocab.at(i);
    if (entry.size() != 2) entry.refuse("is not a token and its score");
    vocabulary.add(entry.at(0).text(), static_cast<std::int64_t>(i));
    scores.push_back(entry.at(1).number());
  }
  if (scores.empty()) vocab.refuse("is empty");
  return scores;
}

inline std::vector<AddedToken> read_added_tokens(const JsonValue& file, Vocabulary& vocabulary) {
  std::vector<AddedToken> tokens;
  if (!file.has("added_tokens")) return tokens;
  const JsonValue list = file["added_tokens"];
  for (std::size_t i = 0; i < list.size(); ++i) {
    const JsonValue entry = list.at(i);
    const std::string& text = entry["content"].text();
    vocabulary.add(text, entry["id"].integer(), false);
    if (text.empty()) continue;  // found nowhere
    tokens.push_back({text, static_cast<std::int32_t>(entry["id"].integer()),
                      entry.flag("special", false), entry.flag("normalized", false),
                      entry.flag("lstrip", false), entry.flag("rstrip", false),
                      entry.flag("single_word", false)});
  }
  return tokens;
}

/// The kind of model; files of old name none.
inline std::string model_type(const JsonValue& model) {
  if (model.has("type")) return model.type();
  if (model.has("merges")) return "BPE";
  return model["vocab"].is_list() ? "Unigram" : "WordLevel";
}

/// `text`: the file's; `file`: its name, for messages.
inline TokenizerData tokenizer_from_json(std::string_view text, const std::string& file) {
  const nlohmann::json document = parse_json(text, file);
  const JsonValue root(document, file);
  const JsonValue model = root["model"];
  const std::string type = model_type(model);
  TokenizerData data{.vocabulary = Vocabulary(file)};
  std::vector<double> scores;
  if (type == "BPE")
    read_bpe_vocabulary(model["vocab"], data.vocabulary);
  else if (type == "Unigram")
    scores = read_unigram_vocabulary(model["vocab"], data.vocabulary);
  else
    model.refuse("is of type " + printable(type) + "; BPE and Unigram are supported");
  const std::vector<AddedToken> added = read_added_tokens(root, data.vocabulary);
  data.vocabulary.index();
  if (type == "BPE") {
    if (model.has("unk_token")) {
      data.unk = data.vocabulary.find(model["unk_token"].text());
      if (data.unk < 0) model["unk_token"].refuse("is no token");
    }
    data.model = read_bpe(model, data.vocabulary, data.unk);
  } else {
    if (model.has("unk_id")) {
      const std::int64_t unk = model["unk_id"].integer();
      if (unk < 0 || std::cmp_greater_equal(unk, scores.size()))
        model["unk_id"].refuse("is not the index of a token");
      data.unk = static_cast<std::int32_t>(unk);
    }
    data.model =
        Unigram(data.vocabulary, std::move(scores), data.unk, model.flag("byte_fallback", false));
  }
  if (root.has("normalizer")) read_normalizer(root["normalizer"], data.normalizers);
  if (root.has("pre_tokenizer")) read_splitter(root["pre_tokenizer"], data.splitters);
  if (root.has("post_processor"))
    read_post_processor(root["post_processor"], data.vocabulary, data.before, data.after);
  if (root.has("decoder")) read_decoder(root["decoder"], data.decoder);
  data.set_added(added);
  return data;
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
