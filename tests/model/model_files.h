/// \file
/// Folders and files that the tests of readers make.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <eigenformer/model/error.h>

namespace eigenformer_test {

/// A folder of this test's own, gone with the object.
class Folder {
 public:
  Folder() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    path_ = std::filesystem::temp_directory_path() / ("eigenformer_" + std::to_string(now));
    std::filesystem::create_directory(path_);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  /// Writes a file into the folder.
  std::filesystem::path write(const std::string& name, std::string_view text) const {
    const auto file = path_ / name;
    std::ofstream(file, std::ios::binary).write(text.data(), static_cast<long>(text.size()));
    return file;
  }

 private:
  std::filesystem::path path_;
};

inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

/// A trained model that lies outside the repository: a folder of that name in the environment's
/// EIGENFORMER_MODELS, else in shared/models beside the repository. It may not be there.
inline std::filesystem::path shared_model(const std::string& name) {
  const char* const folder = std::getenv("EIGENFORMER_MODELS");
  return std::filesystem::path(
             folder != nullptr ? folder : EIGENFORMER_GOLDEN_DIR "/../../../shared/models") /
         name;
}

/// Calls read(text) for `trials` damaged copies of a file and counts those that it accepts: all
/// others must throw ModelFileError. A copy lies in memory of exactly its size, so that the address
/// sanitizer sees each byte that is read beyond.
template <typename Read>
int accepted_of_damaged(std::string_view good, int trials, unsigned seed, Read&& read) {
  constexpr unsigned char edges[] = {0, 1, 2, 7, 8, 9, 31, 32, 127, 128, 255};
  std::mt19937 generator(seed);
  int accepted = 0;
  for (int trial = 0; trial < trials; ++trial) {
    std::size_t size = good.size();
    if (generator() % 4 == 0) size = generator() % (size + 1);
    std::vector<char> text(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
    text.shrink_to_fit();
    for (unsigned change = generator() % 5; change > 0 && size > 0; --change) {
      // Half of them where the headers are.
      const std::size_t reach = generator() % 2 == 0 ? size : (std::min)(size, std::size_t{256});
      text[generator() % reach] =
          static_cast<char>(generator() % 2 == 0 ? generator() : edges[generator() % 11]);
    }
    try {
      read(std::string_view(text.data(), text.size()));
      ++accepted;
    } catch (const eigenformer::ModelFileError&) {
    }
  }
  return accepted;
}

}  // namespace eigenformer_test
