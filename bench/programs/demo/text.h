/// \file
/// The text as bytes, training batches cut from it, and the prompts that test what was learned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include <eigenformer/core/philox.h>
#include <eigenformer/core/tensor.h>

namespace demo {

namespace ef = eigenformer;
using ef::Index;

inline constexpr Index kPromptLength = 64;
inline constexpr Index kContinuation = 200;
inline constexpr Index kPrompts = 10;

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream)
    throw std::runtime_error("cannot open " + path.string() + "; give a readable file with --text");
  std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (text.size() < 1000)
    throw std::runtime_error(path.string() + " has " + std::to_string(text.size()) +
                             " bytes; the job needs at least 1000");
  return text;
}

struct TrainingBatch {
  ef::Tensor<std::int32_t, 2> inputs;   // (batch, length)
  ef::Tensor<std::int32_t, 1> targets;  // (batch * length): the byte that follows
};

/// Windows of the text at random places: the same for a seed. Places are drawn half a window beyond
/// both ends and moved inside, so that the first and last characters are seen as often as the
/// others.
class Windows {
 public:
  Windows(const std::string& text, Index batch, Index length, std::uint64_t seed)
      : text_(text), batch_(batch), length_(length), random_(seed) {}

  TrainingBatch next() {
    TrainingBatch result{ef::Tensor<std::int32_t, 2>(batch_, length_),
                         ef::Tensor<std::int32_t, 1>(batch_ * length_)};
    const Index last = static_cast<Index>(text_.size()) - length_ - 1;
    for (Index b = 0; b < batch_; ++b) {
      const Index place =
          static_cast<Index>(random_() % static_cast<std::uint32_t>(last + length_)) - length_ / 2;
      const Index start = std::clamp<Index>(place, 0, last);
      for (Index i = 0; i < length_; ++i) {
        result.inputs(b, i) =
            static_cast<unsigned char>(text_[static_cast<std::size_t>(start + i)]);
        result.targets(b * length_ + i) =
            static_cast<unsigned char>(text_[static_cast<std::size_t>(start + i + 1)]);
      }
    }
    return result;
  }

 private:
  const std::string& text_;
  Index batch_, length_;
  ef::Philox random_;
};

/// Start of the p-th of the prompts, which are spread evenly over the text.
inline Index prompt_start(const std::string& text, Index p) {
  const Index room = static_cast<Index>(text.size()) - kPromptLength - kContinuation;
  return room * p / (kPrompts - 1);
}

}  // namespace demo
