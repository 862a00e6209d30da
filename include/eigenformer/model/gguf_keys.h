/// \file
/// The keys of one architecture in the metadata of a GGUF file, read so that a key that nobody
/// asked for is noticed: it may change what the model computes.
#pragma once

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "gguf.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

class GgufKeys {
 public:
  explicit GgufKeys(const GgufMetadata& metadata)
      : metadata_(metadata), architecture_(metadata.text("general.architecture")) {}

  const std::string& architecture() const { return architecture_; }
  /// The whole key of a name without the architecture. It counts as understood.
  std::string key(std::string_view name) const {
    std::string whole = architecture_ + "." + std::string(name);
    asked_.insert(whole);
    return whole;
  }
  bool contains(std::string_view name) const { return metadata_.contains(key(name)); }
  std::int64_t integer(std::string_view name) const { return metadata_.integer(key(name)); }
  std::int64_t integer(std::string_view name, std::int64_t otherwise) const {
    return contains(name) ? integer(name) : otherwise;
  }
  double number(std::string_view name, double otherwise) const {
    return contains(name) ? metadata_.number(key(name)) : otherwise;
  }
  bool boolean(std::string_view name, bool otherwise) const {
    return contains(name) ? metadata_.boolean(key(name)) : otherwise;
  }
  std::string text(std::string_view name, std::string_view otherwise) const {
    return std::string(contains(name) ? metadata_.text(key(name)) : otherwise);
  }
  /// One number, or one for each layer as booleans or integers: the latter, or nothing.
  std::vector<std::int64_t> list(std::string_view name) const {
    std::vector<std::int64_t> values;
    if (!contains(name) || metadata_.at(key(name)).type != GgufType::array) return values;
    if (metadata_.at(key(name)).element_type != GgufType::boolean)
      return metadata_.integers(key(name));
    for (const GgufValue& value : metadata_.elements(key(name)))
      values.push_back(std::to_integer<std::int64_t>(value.bytes[0]));
    return values;
  }

  /// Calls refuse(key, reason) for the keys of the architecture that were not asked for, but for
  /// those that change nothing and for zeros, which say that something is not there.
  template <typename Refuse>
  void require_all_asked(Refuse&& refuse) const {
    constexpr std::string_view harmless[] = {"vocab_size",
                                             "pooling_type",
                                             "tensor_data_layout",
                                             "expert_used_count",
                                             "rope.scaling.finetuned",
                                             "attention.layer_norm_epsilon",
                                             "attention.layer_norm_rms_epsilon"};
    const std::string prefix = architecture_ + ".";
    for (auto at = metadata_.map().lower_bound(prefix);
         at != metadata_.map().end() && at->first.starts_with(prefix); ++at) {
      const std::string_view name = std::string_view(at->first).substr(prefix.size());
      if (!asked_.contains(at->first) && !is_zero(at->second) &&
          std::find(std::begin(harmless), std::end(harmless), name) == std::end(harmless))
        refuse(at->first, "is a key that is not supported");
    }
  }

 private:
  static bool is_zero(const GgufValue& value) {
    return value.type != GgufType::string && value.type != GgufType::array &&
           std::all_of(value.bytes.begin(), value.bytes.end(),
                       [](std::byte byte) { return byte == std::byte{0}; });
  }

  const GgufMetadata& metadata_;
  std::string architecture_;
  mutable std::set<std::string, std::less<>> asked_;
};

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
