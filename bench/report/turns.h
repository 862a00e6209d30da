/// \file
/// Who times what where. Ours and the peers take turns, so that a change of clock or a noisy
/// neighbour meets all of them alike. A turn is a warm-up call and a few samples of one call. Peers
/// with thread pools of their own run in a process each: idle pools of OpenMP, OpenBLAS and Eigen
/// spin, and were seen to stall each other for 8 to 20 ms.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "harness.h"

namespace bench {

struct Turn {
  std::size_t row = 0, call = 0;  ///< in the open suite
  int threads = 1;
  int samples = 5;     ///< at most
  double seconds = 1;  ///< stops after the sample that exceeds this
};

/// Times the calls of one benchmark file's suite, in this process.
class Timer {
 public:
  /// Builds the suite of registered_cases()[index], instead of the one before it.
  void open(std::size_t index);
  Suite& suite() { return *suite_; }
  /// What is wrong with the call's result, empty where it is right or cannot be judged.
  std::string mismatch(std::size_t row, std::size_t call);
  /// Seconds of each sample. A call much shorter than the clock's noise is repeated within a
  /// sample.
  std::vector<double> take(const Turn& turn);

 private:
  void run(const Call& call, int threads, int times);
  const Eigen::ThreadPoolDevice& device(int threads);

  std::unique_ptr<Suite> suite_;
  std::map<int,
           std::pair<std::unique_ptr<Eigen::ThreadPool>, std::unique_ptr<Eigen::ThreadPoolDevice>>>
      pools_;
};

/// The same, in a process of its own: `report --serve FD`, which answers one line for each line it
/// gets. Throws std::runtime_error with the reason where the process fails; where it ended, alive()
/// is false.
class RemoteTimer {
 public:
  RemoteTimer();
  RemoteTimer(const RemoteTimer&) = delete;
  RemoteTimer& operator=(const RemoteTimer&) = delete;
  ~RemoteTimer();
  void open(std::size_t index);
  std::string mismatch(std::size_t row, std::size_t call);
  std::vector<double> take(const Turn& turn);
  bool alive() const { return process_ > 0; }

 private:
  std::string ask(const std::string& question);
  [[noreturn]] void fail();

  int socket_ = -1;
  pid_t process_ = -1;
  std::string unread_;
};

/// The other end of RemoteTimer; returns when the socket closes.
void serve(int socket);

}  // namespace bench
