/// \file
/// What readers of model files throw.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "../core/error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A file of a model is not what it claims to be, or cannot be read. The text names the file, what
/// in it is wrong (a tensor, a key; left out where it is the file itself) and the reason:
/// "model.safetensors: lm_head.weight: has 12 bytes, its shape needs 16".
class ModelFileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

/// A name that comes from a file, fit for a message: at most 96 bytes, control characters as '?'.
inline std::string printable(std::string_view name) {
  constexpr std::size_t kLongest = 96;
  std::string text(name.substr(0, kLongest));
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = '?';
  if (name.size() > kLongest) text += "...";
  return text;
}

[[noreturn]] inline void fail_model(std::string_view file, std::string_view part,
                                    std::string_view reason) {
  std::string text(file);
  text += ": ";
  if (!part.empty()) text += printable(part) + ": ";
  text += reason;
  fail<ModelFileError>(text);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
