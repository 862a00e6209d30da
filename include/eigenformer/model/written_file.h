/// \file
/// Files that appear whole or not at all.
#pragma once

#include <filesystem>
#include <fstream>
#include <string_view>
#include <system_error>

#include "error.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// write(stream) puts the bytes into a file beside `path`, whose name ends with `ending` besides;
/// it then takes the place of `path`. Throws ModelFileError where the disk refuses: what was there
/// stays, and the other file goes.
template <typename Write>
void write_whole(const std::filesystem::path& path, std::string_view ending, Write&& write) {
  const auto partial = std::filesystem::path(path).concat(ending);
  std::ofstream stream(partial, std::ios::binary);
  write(stream);
  stream.close();
  std::error_code problem, ignored;
  if (stream) std::filesystem::rename(partial, path, problem);
  if (stream && !problem) return;
  std::filesystem::remove(partial, ignored);
  fail_model(path.string(), "", "cannot be written: is the disk full, or the folder not writable?");
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
