/// \file
/// JSON of model files, parsed under limits: whatever the text, neither the stack nor memory beyond
/// about 40 times the text's length is used up, and nobody's entry is lost to a second one of the
/// same name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Builds the value that nlohmann's parser reads. The parser itself keeps its state on the heap.
class JsonBuilder : public nlohmann::json_sax<nlohmann::json> {
 public:
  using Json = nlohmann::json;
  explicit JsonBuilder(std::size_t deepest) : deepest_(deepest) {}

  Json root;
  std::string problem;  ///< why a handler returned false

  bool null() override { return put(nullptr) != nullptr; }
  bool boolean(bool value) override { return put(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return put(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return put(value) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    return put(value) != nullptr;
  }
  bool string(string_t& value) override { return put(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return refuse("holds binary data"); }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    auto& members = open_.back()->get_ref<Json::object_t&>();
    const std::size_t before = members.size();
    // At the end, without a search, where names are sorted.
    const auto entry = members.emplace_hint(members.end(), name, nullptr);
    if (members.size() == before)
      return refuse("has \"" + printable(name) + "\" twice in one object");
    entry_ = &entry->second;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return refuse("is not JSON, seen at byte " + std::to_string(position));
  }

 private:
  bool refuse(std::string why) {
    problem = std::move(why);
    return false;
  }
  Json* put(Json value) {
    Json* place = &root;
    if (!open_.empty()) {
      if (open_.back()->is_object()) {
        place = entry_;
      } else {
        auto& array = open_.back()->get_ref<Json::array_t&>();
        array.emplace_back();
        place = &array.back();
      }
    }
    *place = std::move(value);
    return place;
  }
  bool open(Json value) {
    if (open_.size() == deepest_)
      return refuse("is nested more than " + std::to_string(deepest_) + " deep");
    open_.push_back(put(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::size_t deepest_;
  std::vector<Json*> open_;  ///< containers around the place of the next value
  Json* entry_ = nullptr;    ///< of the innermost object, the one whose key was read last
};

/// The value that a text is. Throws ModelFileError where it is no JSON (RFC 8259, in UTF-8), is
/// nested more than `deepest` deep or has one key twice in an object.
inline nlohmann::json parse_json(std::string_view text, std::string_view file,
                                 std::string_view part = "", std::size_t deepest = 64) {
  JsonBuilder builder(deepest);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder))
    fail_model(file, part, builder.problem);
  return std::move(builder.root);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
