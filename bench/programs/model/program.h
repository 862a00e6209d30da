/// \file
/// What main() of each program is: errors become one line and a status, and Ctrl-C asks once.
#pragma once

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <new>
#include <stdexcept>

namespace programs {

/// Set by Ctrl-C where stop_on_interrupt() was called.
inline volatile std::sig_atomic_t stopped = 0;

/// Ctrl-C asks a program to stop where it can; once more before that has come about it ends it.
inline void stop_on_interrupt() {
  struct sigaction action {};
  action.sa_handler = [](int) {
    if (stopped != 0) std::_Exit(128 + SIGINT);
    stopped = 1;
  };
  sigaction(SIGINT, &action, nullptr);
}

/// The status of body(), which returns one; 1 where it throws or its output could not be written.
template <typename Body>
int run_program(const char* name, Body&& body) {
  try {
    const int status = body();
    if (std::fflush(stdout) != 0 || !std::cout.flush())
      throw std::runtime_error("the output cannot be written");
    return status;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s: there is not enough memory for this\n", name);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
  }
  return 1;
}

}  // namespace programs
