/// \file
/// Members of a JSON object of a model's file, of the type that is expected of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A view; the document outlives it. A member that is null counts as missing. Functions throw
/// ModelFileError naming file and key for a member of another type, and one that is missing where
/// no other value is given.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& object, std::string_view file, std::string path = "")
      : object_(&object), file_(file), path_(std::move(path)) {
    if (!object.is_object()) fail_model(file_, path_, "is not an object");
  }

  std::string_view file() const { return file_; }
  bool has(std::string_view key) const { return find(key) != nullptr; }

  std::int64_t integer(std::string_view key) const { return integer_of(key, at(key)); }
  std::int64_t integer(std::string_view key, std::int64_t otherwise) const {
    const auto* const value = find(key);
    return value == nullptr ? otherwise : integer_of(key, *value);
  }
  double number(std::string_view key) const { return number_of(key, at(key)); }
  double number(std::string_view key, double otherwise) const {
    const auto* const value = find(key);
    return value == nullptr ? otherwise : number_of(key, *value);
  }
  bool boolean(std::string_view key, bool otherwise) const {
    const auto* const value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) refuse(key, "is not true or false");
    return value->get<bool>();
  }
  std::string text(std::string_view key) const { return text_of(key, at(key)); }
  std::string text(std::string_view key, std::string_view otherwise) const {
    const auto* const value = find(key);
    return value == nullptr ? std::string(otherwise) : text_of(key, *value);
  }
  JsonObject object(std::string_view key) const { return {at(key), file_, path_of(key)}; }

  /// Elements of an array; a single value counts as an array of one.
  std::vector<std::int64_t> integers(std::string_view key) const {
    std::vector<std::int64_t> list;
    for_elements(key, [&](const auto& value) { list.push_back(integer_of(key, value)); });
    return list;
  }
  std::vector<double> numbers(std::string_view key) const {
    std::vector<double> list;
    for_elements(key, [&](const auto& value) { list.push_back(number_of(key, value)); });
    return list;
  }
  std::vector<std::string> texts(std::string_view key) const {
    std::vector<std::string> list;
    for_elements(key, [&](const auto& value) { list.push_back(text_of(key, value)); });
    return list;
  }

  [[noreturn]] void refuse(std::string_view key, std::string_view why) const {
    fail_model(file_, path_of(key), why);
  }

 private:
  std::string path_of(std::string_view key) const {
    return path_.empty() ? std::string(key) : path_ + "." + std::string(key);
  }
  const nlohmann::json* find(std::string_view key) const {
    const auto found = object_->find(std::string(key));
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }
  const nlohmann::json& at(std::string_view key) const {
    const auto* const value = find(key);
    if (value == nullptr) refuse(key, "is missing");
    return *value;
  }
  std::int64_t integer_of(std::string_view key, const nlohmann::json& value) const {
    const bool fits = !value.is_number_unsigned() ||
                      value.get<std::uint64_t>() <=
                          static_cast<std::uint64_t>((std::numeric_limits<std::int64_t>::max)());
    if (!value.is_number_integer() || !fits) refuse(key, "is not an integer");
    return value.get<std::int64_t>();
  }
  double number_of(std::string_view key, const nlohmann::json& value) const {
    if (!value.is_number()) refuse(key, "is not a number");
    return value.get<double>();
  }
  std::string text_of(std::string_view key, const nlohmann::json& value) const {
    if (!value.is_string()) refuse(key, "is not a string");
    return value.get<std::string>();
  }
  template <typename F>
  void for_elements(std::string_view key, F&& f) const {
    const auto* const value = find(key);
    if (value == nullptr) return;
    if (!value->is_array()) return f(*value);
    for (const auto& element : *value) f(element);
  }

  const nlohmann::json* object_;
  std::string_view file_;
  std::string path_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
