/// \file
/// Texts of tokens by id and ids by text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class Vocabulary {
 public:
  /// Ids lie below this: four times what the largest vocabularies in use have. Memory follows the
  /// largest id, and files are not believed.
  static constexpr std::int64_t kMostIds = std::int64_t{1} << 22;
  /// A token has at most so many bytes.
  static constexpr std::size_t kLongest = 1 << 16;

  explicit Vocabulary(std::string file = "tokenizer") : file_(std::move(file)) {}
  Vocabulary(Vocabulary&&) = default;  // moves no text, so the views stay
  Vocabulary& operator=(Vocabulary&&) = default;

  /// Throws ModelFileError where the id is out of range or has another text. May come twice. Those
  /// not `of_model` are added tokens: the model does not know them.
  void add(std::string_view text, std::int64_t id, bool of_model = true) {
    if (id < 0 || id >= kMostIds)
      fail_model(file_, token_name(text),
                 "has the id " + std::to_string(id) + ", which is not in [0, " +
                     std::to_string(kMostIds) + ")");
    if (text.size() > kLongest)
      fail_model(file_, token_name(text), "has more than " + std::to_string(kLongest) + " bytes");
    const auto at = static_cast<std::size_t>(id);
    if (at >= tokens_.size()) tokens_.resize(at + 1);
    Token& token = tokens_[at];
    if (token.known && token.text != text)
      fail_model(file_, token_name(text),
                 "has the id " + std::to_string(id) + " of token " + printable(token.text));
    token.text = text;
    token.known = true;
    token.of_model = token.of_model || of_model;
  }
  /// After the last add(). Of equal texts the lowest id is found.
  void index() {
    for (auto* const ids : {&ids_, &added_ids_}) ids->clear();
    ids_.reserve(tokens_.size());
    for (std::size_t i = 0; i < tokens_.size(); ++i)
      if (tokens_[i].known)
        (tokens_[i].of_model ? ids_ : added_ids_)
            .emplace(tokens_[i].text, static_cast<std::int32_t>(i));
  }

  /// The highest id and one.
  std::size_t size() const { return tokens_.size(); }
  bool has(std::int64_t id) const {
    return id >= 0 && std::cmp_less(id, tokens_.size()) &&
           tokens_[static_cast<std::size_t>(id)].known;
  }
  /// Empty where no token has this id.
  const std::string& text(std::int64_t id) const {
    static const std::string none;
    return has(id) ? tokens_[static_cast<std::size_t>(id)].text : none;
  }
  /// Of the model's tokens; -1: none has this text.
  std::int32_t find(std::string_view text) const { return find_in(ids_, text); }
  std::int32_t find_any(std::string_view text) const {
    const std::int32_t id = find(text);
    return id >= 0 ? id : find_in(added_ids_, text);
  }
  const std::string& file() const { return file_; }

  static std::string token_name(std::string_view text) {
    return "token " + std::string(text.substr(0, 80));
  }

 private:
  struct Token {
    std::string text;
    bool known = false, of_model = false;
  };
  using Ids = std::unordered_map<std::string_view, std::int32_t>;  // views of tokens_
  static std::int32_t find_in(const Ids& ids, std::string_view text) {
    const auto at = ids.find(text);
    return at == ids.end() ? -1 : at->second;
  }

  std::string file_;
  std::vector<Token> tokens_;
  Ids ids_, added_ids_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
