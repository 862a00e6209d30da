/// \file
/// Files read through the memory map of the operating system.
///
///   ef::MappedFile file("model.gguf");
///   std::span<const std::byte> bytes = file.bytes();
///
/// Opening costs a few system calls whatever the size; a byte costs a read of the disk where it is
/// first looked at, and memory that the system takes back when it is short. Who shortens a file
/// while it is mapped ends the program (SIGBUS): programs that replace a model write a new file and
/// rename it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "error.h"

#if defined(_WIN32)
#if !defined(WIN32_LEAN_AND_MEAN)
#define WIN32_LEAN_AND_MEAN
#endif
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cerrno>
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What is about to happen to bytes of a mapped file. A hint: no call's result depends on it.
enum class FileAdvice {
  sequential,  ///< they are read once, from front to back: the system reads ahead
  soon,        ///< they are needed: reading starts now, in the background
  done         ///< they are not needed again soon: their memory may go
};

/// A whole file, mapped to be read. Throws ModelFileError where it is no regular file, cannot be
/// opened, or does not fit the address space. Bytes stay where they are until the object that holds
/// them in the end, after all moves, is gone.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::filesystem::path& path) {
    const std::u8string text = path.u8string();
    name_.assign(text.begin(), text.end());
    open(path);
  }
  MappedFile(MappedFile&& other) noexcept
      : name_(std::move(other.name_)), bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { close(); }

  std::span<const std::byte> bytes() const { return bytes_; }
  std::string_view text() const {
    return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
  }
  /// The path as it was given, in UTF-8: for messages.
  const std::string& name() const { return name_; }

  /// Bytes outside the file are left out; of systems other than POSIX's all are.
  void advise(std::span<const std::byte> part, FileAdvice advice) const noexcept;

 private:
  void open(const std::filesystem::path& path);
  void close() noexcept;
  [[noreturn]] void fail_to(const char* what, int code) const {
    detail::fail_model(name_, "",
                       std::string("cannot be ") + what + ": " +
                           std::error_code(code, std::system_category()).message());
  }

  std::string name_;
  std::span<const std::byte> bytes_;
};

#if defined(_WIN32)

inline void MappedFile::open(const std::filesystem::path& path) {
  const HANDLE file = ::CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr,
                                    OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) fail_to("opened", static_cast<int>(::GetLastError()));
  LARGE_INTEGER size{};
  const bool regular = ::GetFileType(file) == FILE_TYPE_DISK && ::GetFileSizeEx(file, &size) != 0;
  const auto length = static_cast<std::uint64_t>(size.QuadPart);
  const void* address = nullptr;
  DWORD code = 0;
  if (regular && length > 0 && length <= PTRDIFF_MAX) {
    // A view keeps its mapping and its file open.
    const HANDLE mapping = ::CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
    if (mapping != nullptr) {
      address = ::MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
      code = ::GetLastError();
      ::CloseHandle(mapping);
    } else {
      code = ::GetLastError();
    }
  }
  ::CloseHandle(file);
  if (!regular) detail::fail_model(name_, "", "is not a regular file");
  if (length == 0) return;
  if (length > PTRDIFF_MAX) detail::fail_model(name_, "", "is larger than the address space");
  if (address == nullptr) fail_to("mapped", static_cast<int>(code));
  bytes_ = {static_cast<const std::byte*>(address), static_cast<std::size_t>(length)};
}

inline void MappedFile::close() noexcept {
  if (!bytes_.empty()) ::UnmapViewOfFile(bytes_.data());
}

inline void MappedFile::advise(std::span<const std::byte>, FileAdvice) const noexcept {}

#else

inline void MappedFile::open(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a pipe would wait for a writer.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) fail_to("opened", errno);
  struct stat status {};
  const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  const auto length = static_cast<std::uint64_t>(status.st_size);
  void* address = MAP_FAILED;
  int code = 0;
  if (regular && length > 0 && length <= PTRDIFF_MAX) {
    address = ::mmap(nullptr, static_cast<std::size_t>(length), PROT_READ, MAP_PRIVATE, file, 0);
    code = errno;
  }
  ::close(file);  // the map stays
  if (!regular) detail::fail_model(name_, "", "is not a regular file");
  if (length == 0) return;
  if (length > PTRDIFF_MAX) detail::fail_model(name_, "", "is larger than the address space");
  if (address == MAP_FAILED) fail_to("mapped", code);
  bytes_ = {static_cast<const std::byte*>(address), static_cast<std::size_t>(length)};
}

inline void MappedFile::close() noexcept {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

inline void MappedFile::advise(std::span<const std::byte> part, FileAdvice advice) const noexcept {
  const auto base = reinterpret_cast<std::uintptr_t>(bytes_.data()),
             begin = reinterpret_cast<std::uintptr_t>(part.data());
  const long page = ::sysconf(_SC_PAGESIZE);
  if (part.empty() || begin < base || begin - base > bytes_.size() ||
      part.size() > bytes_.size() - (begin - base) || page <= 0)
    return;
  // Pages that the part touches; what a neighbour loses by `done` is read again.
  const std::uintptr_t skip =
      (begin - base) / static_cast<std::uintptr_t>(page) * static_cast<std::uintptr_t>(page);
  auto* const address = const_cast<std::byte*>(bytes_.data()) + skip;
  const std::size_t length = begin - base - skip + part.size();
  ::madvise(address, length,
            advice == FileAdvice::sequential ? MADV_SEQUENTIAL
            : advice == FileAdvice::soon     ? MADV_WILLNEED
                                             : MADV_DONTNEED);
}

#endif

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
