/// \file
/// How errors leave the library: as exceptions, or, in a unit built with -fno-exceptions, through a
/// handler of the user's.
///
///   ef::set_error_handler([](const char* message) { my_log(message); std::quick_exit(1); });
///
/// Only builds without exceptions have `set_error_handler`. The handler gets the text that the
/// exception would have had, on the thread that made the error, and must not return: the program
/// is aborted where it does. Without a handler the text is printed to stderr before that. There is
/// one handler for the whole program, whatever ISAs its units are built for. Memory that runs out
/// ends in std::terminate, as operator new itself does in such a build.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "isa.h"

namespace eigenformer {

#if !defined(EIGENFORMER_HAS_EXCEPTIONS)
/// Gets the message of an error and does not return.
using ErrorHandler = void (*)(const char* message);

// Outside the namespace of the ISA, and so not in `detail`, which lives there.
namespace without_exceptions {
inline std::atomic<ErrorHandler>& error_handler() {
  static std::atomic<ErrorHandler> handler{nullptr};
  return handler;
}
}  // namespace without_exceptions

/// Takes the place of printing the message; null goes back to that. Returns the handler before.
inline ErrorHandler set_error_handler(ErrorHandler handler) {
  return without_exceptions::error_handler().exchange(handler);
}
#endif

inline namespace EIGENFORMER_ABI {
namespace detail {

/// Throws Error(arguments...): the only way in which the library does.
template <typename Error, typename... Arguments>
[[noreturn]] void fail(Arguments&&... arguments) {
#if defined(EIGENFORMER_HAS_EXCEPTIONS)
  throw Error(std::forward<Arguments>(arguments)...);
#else
  const Error error(std::forward<Arguments>(arguments)...);
  if (const ErrorHandler handler = without_exceptions::error_handler().load()) {
    handler(error.what());
  } else {
    std::fprintf(stderr, "eigenformer: %s\n", error.what());
  }
  std::abort();
#endif
}

/// body(); where it throws, on_error(text of the exception) while the exception is the current one.
template <typename Body, typename OnError>
void attempt(Body&& body, [[maybe_unused]] OnError&& on_error) {
#if defined(EIGENFORMER_HAS_EXCEPTIONS)
  try {
    body();
  } catch (const std::exception& error) {
    on_error(error.what());
  } catch (...) {
    on_error("an exception that is no std::exception");
  }
#else
  body();
#endif
}

/// body(); where it throws, undo() before the exception goes on.
template <typename Body, typename Undo>
void attempt_or_undo(Body&& body, [[maybe_unused]] Undo&& undo) {
#if defined(EIGENFORMER_HAS_EXCEPTIONS)
  try {
    body();
  } catch (...) {
    undo();
    throw;
  }
#else
  body();
#endif
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
