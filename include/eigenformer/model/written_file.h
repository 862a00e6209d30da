/// \file
/// Files that appear whole or not at all, whatever happens to the program or the machine.
#pragma once

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>
#include <system_error>

#include "mapped_file.h"  // and the system's headers

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Whether what was written to a file, or to a folder's list of names, is on the disk.
inline bool flush_to_disk(const std::filesystem::path& path) {
#if defined(_WIN32)
  const HANDLE file = ::CreateFileW(path.c_str(), GENERIC_WRITE, FILE_SHARE_READ, nullptr,
                                    OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) return false;
  const bool done = ::FlushFileBuffers(file) != 0;
  ::CloseHandle(file);
  return done;
#else
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  // A file system that cannot (EINVAL) has promised nothing.
  const bool done = ::fsync(file) == 0 || errno == EINVAL;
  ::close(file);
  return done;
#endif
}

inline std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

[[noreturn]] inline void fail_to_write(const std::filesystem::path& path) {
  std::error_code problem;
  const auto folder = folder_of(path);
  std::string reason = "is the disk full, or the folder not writable?";
  if (std::filesystem::is_directory(path, problem))
    reason = "a folder has this name";
  else if (!std::filesystem::is_directory(folder, problem))
    reason = "there is no folder " + printable(folder.string());
  fail_model(path.string(), "", "cannot be written: " + reason);
}

/// Programs that start together may all write a file: each beside it, under a name of its own.
inline std::string partial_ending() {
  return "." + std::to_string(std::random_device{}()) + ".partial";
}

/// write(stream) puts the bytes into a file beside `path`, whose name ends with `ending` besides;
/// when they are on the disk it takes the place of `path`. Throws ModelFileError where the disk
/// refuses: what was there stays, and the other file goes.
template <typename Write>
void write_whole(const std::filesystem::path& path, std::string_view ending, Write&& write) {
  const auto partial = std::filesystem::path(path).concat(ending);
  std::ofstream stream(partial, std::ios::binary);
  write(stream);
  stream.close();
  std::error_code problem, ignored;
  const bool written = stream && flush_to_disk(partial);
  if (written) std::filesystem::rename(partial, path, problem);
  if (!written || problem) {
    std::filesystem::remove(partial, ignored);
    fail_to_write(path);
  }
#if !defined(_WIN32)
  flush_to_disk(folder_of(path));  // the name; without it an old file is there, whole too
#endif
}

/// Before hours of work for a file: throws ModelFileError where none can be made in its folder.
inline void require_writable(const std::filesystem::path& path) {
  const auto probe = std::filesystem::path(path).concat(partial_ending());
  const bool made = std::ofstream(probe, std::ios::binary).is_open();
  std::error_code ignored;
  std::filesystem::remove(probe, ignored);
  if (!made || std::filesystem::is_directory(path, ignored)) fail_to_write(path);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
