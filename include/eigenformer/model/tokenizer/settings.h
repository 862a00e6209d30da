/// \file
/// Which tokens begin and end texts, and the chat template: from the files beside tokenizer.json.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "data.h"
#include "json_value.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// -1 where no token has this text or id: files name tokens that were never added.
inline std::int32_t named_token(const JsonValue& name, const Vocabulary& vocabulary) {
  return vocabulary.find_any(name.is_object() ? name["content"].text() : name.text());
}
inline std::int32_t numbered_token(const JsonValue& number, const Vocabulary& vocabulary) {
  const std::int64_t id = number.integer();
  return vocabulary.has(id) ? static_cast<std::int32_t>(id) : -1;
}
inline void set_unless_set(std::int32_t& to, std::int32_t id) {
  if (to < 0) to = id;
}
inline void add_end(TokenizerData& data, std::int32_t id) {
  if (id >= 0 && std::ranges::find(data.eos, id) == data.eos.end()) data.eos.push_back(id);
}

/// tokenizer_config.json, special_tokens_map.json: tokens by their texts.
inline void read_token_names(const JsonValue& file, TokenizerData& data) {
  const auto token = [&](const char* name) {
    return file.has(name) ? named_token(file[name], data.vocabulary) : -1;
  };
  set_unless_set(data.bos, token("bos_token"));
  set_unless_set(data.unk, token("unk_token"));
  set_unless_set(data.pad, token("pad_token"));
  set_unless_set(data.eos_of_texts, token("eos_token"));
  add_end(data, token("eos_token"));
  if (!file.has("chat_template") || !data.chat_template.empty()) return;
  const JsonValue chat = file["chat_template"];
  if (chat.is_text()) {
    data.chat_template = chat.text();
    return;
  }
  for (std::size_t i = 0; i < chat.size(); ++i)
    if (chat.at(i)["name"].text() == "default") data.chat_template = chat.at(i)["template"].text();
}

/// generation_config.json, config.json: tokens by their ids, of the language model inside where a
/// model is more than that.
inline void read_token_numbers(const JsonValue& file, TokenizerData& data) {
  const auto token = [&](const char* name) {
    return file.has(name) ? numbered_token(file[name], data.vocabulary) : -1;
  };
  set_unless_set(data.bos, token("bos_token_id"));
  set_unless_set(data.pad, token("pad_token_id"));
  if (file.has("eos_token_id")) {
    const JsonValue ends = file["eos_token_id"];
    if (!ends.is_list()) add_end(data, numbered_token(ends, data.vocabulary));
    for (std::size_t i = 0; ends.is_list() && i < ends.size(); ++i)
      add_end(data, numbered_token(ends.at(i), data.vocabulary));
  }
  if (file.has("text_config")) read_token_numbers(file["text_config"], data);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
