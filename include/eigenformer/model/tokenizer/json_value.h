/// \file
/// A value of a JSON file that knows where it stands, so that what is wrong with it can be said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "../error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// A view: the file's value and name outlive it. Everything throws ModelFileError where the file
/// holds another kind of value than is asked for.
class JsonValue {
 public:
  JsonValue(const nlohmann::json& value, std::string_view file, std::string path = {})
      : value_(&value), file_(file), path_(std::move(path)) {}

  [[noreturn]] void refuse(std::string_view reason) const {
    fail_model(file_, path_.empty() ? "the file" : path_, reason);
  }
  std::string_view file() const { return file_; }
  const nlohmann::json& value() const { return *value_; }

  bool is_text() const { return value_->is_string(); }
  bool is_list() const { return value_->is_array(); }
  bool is_object() const { return value_->is_object(); }

  /// Whether an object has this member, null not counted.
  bool has(const char* name) const {
    const auto at = object().find(name);
    return at != object().end() && !at->second.is_null();
  }
  JsonValue operator[](const char* name) const {
    const auto at = object().find(name);
    std::string path = path_.empty() ? name : path_ + "." + name;
    if (at == object().end()) fail_model(file_, path, "is missing");
    return {at->second, file_, std::move(path)};
  }
  JsonValue at(std::size_t index) const {
    return {list()[index], file_, path_ + "[" + std::to_string(index) + "]"};
  }
  std::size_t size() const { return list().size(); }

  const std::string& text() const {
    if (!value_->is_string()) refuse("is not a string");
    return value_->get_ref<const std::string&>();
  }
  std::int64_t integer() const {
    if (!value_->is_number_integer() ||
        (value_->is_number_unsigned() && value_->get<std::uint64_t>() > INT64_MAX))
      refuse("is not an integer of 64 bits");
    return value_->get<std::int64_t>();
  }
  double number() const {
    if (!value_->is_number()) refuse("is not a number");
    return value_->get<double>();
  }
  bool flag() const {
    if (!value_->is_boolean()) refuse("is not true or false");
    return value_->get<bool>();
  }
  const nlohmann::json::object_t& object() const {
    if (!value_->is_object()) refuse("is not an object");
    return value_->get_ref<const nlohmann::json::object_t&>();
  }
  const nlohmann::json::array_t& list() const {
    if (!value_->is_array()) refuse("is not a list");
    return value_->get_ref<const nlohmann::json::array_t&>();
  }

  /// Of a member; what is given where there is none.
  bool flag(const char* name, bool otherwise) const {
    return has(name) ? (*this)[name].flag() : otherwise;
  }
  std::string text(const char* name, std::string otherwise) const {
    return has(name) ? (*this)[name].text() : otherwise;
  }
  const std::string& type() const { return (*this)["type"].text(); }

 private:
  const nlohmann::json* value_;
  std::string_view file_;
  std::string path_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
