/// \file
/// Programs that run beside this one, each with a file for what it prints and a time after which it
/// is stopped.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpu_day {

using Time = std::chrono::steady_clock;

inline double seconds_since(Time::time_point start) {
  return std::chrono::duration<double>(Time::now() - start).count();
}

/// A program under way, in a process group of its own.
class Process {
 public:
  Process(const std::vector<std::string>& command, const std::filesystem::path& log, double limit)
      : limit_(limit) {
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    const int output = open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (output < 0) throw std::runtime_error("cannot write " + log.string());
    id_ = fork();
    if (id_ == 0) {
      setpgid(0, 0);
      dup2(output, STDOUT_FILENO);
      dup2(output, STDERR_FILENO);
      execvp(arguments[0], arguments.data());
      _exit(127);
    }
    close(output);
    if (id_ < 0) throw std::runtime_error("cannot start " + command[0]);
    setpgid(id_, id_);  // whichever of the two comes first
  }

  /// Whether it is over; stops it where its time is.
  bool over() {
    int status = 0;
    const pid_t ended = waitpid(id_, &status, WNOHANG);
    if (ended == 0 && seconds() < limit_) return false;
    if (ended == 0) {
      kill(-id_, SIGKILL);
      waitpid(id_, &status, 0);
      stopped_ = true;
    }
    exit_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return true;
  }

  double seconds() const { return seconds_since(start_); }
  bool stopped() const { return stopped_; }
  int exit_status() const { return exit_; }

 private:
  pid_t id_ = -1;
  Time::time_point start_ = Time::now();
  double limit_;
  bool stopped_ = false;
  int exit_ = -1;
};

}  // namespace gpu_day
