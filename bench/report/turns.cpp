#include "turns.h"

#include <eigenformer/parallel_region.h>

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>

extern char** environ;

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kShortestSample = 50e-6;  // seconds; the clock and its calls take some 50 ns

constexpr double kSettling = 0.03;  // seconds

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Reads up to the next newline. False at the end of the stream.
bool read_line(int socket, std::string& unread, std::string& line) {
  for (;;) {
    const auto end = unread.find('\n');
    if (end != std::string::npos) {
      line = unread.substr(0, end);
      unread.erase(0, end + 1);
      return true;
    }
    char buffer[4096];
    const ssize_t count = recv(socket, buffer, sizeof buffer, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    unread.append(buffer, static_cast<std::size_t>(count));
  }
}

bool write_line(int socket, std::string line) {
  std::replace(line.begin(), line.end(), '\n', ' ');
  line += '\n';
  for (std::size_t sent = 0; sent < line.size();) {
    const ssize_t count = send(socket, line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    sent += static_cast<std::size_t>(count);
  }
  return true;
}

std::string answer(Timer& timer, const std::string& question) {
  std::istringstream words(question);
  std::string verb;
  words >> verb;
  std::ostringstream reply;
  reply.precision(17);
  if (verb == "open") {
    std::size_t index = 0;
    words >> index;
    timer.open(index);
  } else if (verb == "mismatch") {
    std::size_t row = 0, call = 0;
    words >> row >> call;
    reply << timer.mismatch(row, call);
  } else {
    Turn turn;
    words >> turn.row >> turn.call >> turn.threads >> turn.samples >> turn.seconds;
    for (double seconds : timer.take(turn)) reply << seconds << ' ';
  }
  return reply.str();
}

}  // namespace

void Timer::open(std::size_t index) {
  suite_.reset();  // first, so that two suites are never in memory together
  suite_ = std::make_unique<Suite>();
  registered_cases().at(index).function(*suite_);
}

std::string Timer::mismatch(std::size_t row, std::size_t call) {
  const auto& judge = suite_->rows.at(row)->calls.at(call).mismatch;
  return judge ? judge() : std::string{};
}

const Eigen::ThreadPoolDevice& Timer::device(int threads) {
  auto& [pool, pool_device] = pools_[threads];
  if (!pool) {
    pool = std::make_unique<Eigen::ThreadPool>(threads);
    pool_device = std::make_unique<Eigen::ThreadPoolDevice>(pool.get(), threads);
  }
  return *pool_device;
}

void Timer::run(const Call& call, int threads, int times) {
  if (threads == 1) {
    for (int i = 0; i < times; ++i) call.one_thread(Eigen::DefaultDevice{});
  } else {
    const Eigen::ThreadPoolDevice& pool_device = device(threads);
    for (int i = 0; i < times; ++i) call.pool(pool_device);
  }
}

std::vector<double> Timer::take(const Turn& turn) {
  const Call& call = suite_->rows.at(turn.row)->calls.at(turn.call);
  // As a program that calls operator after operator would: threads stay awake, as those of the
  // peers' OpenMP do.
  std::optional<eigenformer::ParallelRegion<Eigen::ThreadPoolDevice>> region;
  if (turn.threads > 1 && call.family.empty()) region.emplace(device(turn.threads));
  // After idleness Linux wakes a thread on the core of its waker and moves it to a free one some
  // milliseconds later (2 virtual cores): until then both halves of a product take turns on one
  // core, ours and the peers'.
  for (const auto warm = Clock::now(); turn.threads > 1 && since(warm) < kSettling;)
    run(call, turn.threads, 1);
  const auto start = Clock::now();
  run(call, turn.threads, 1);
  const auto second = Clock::now();
  // The first may have packed, allocated and woken threads; this one tells how long a call is.
  run(call, turn.threads, 1);
  const double once = since(second);
  if (since(start) > turn.seconds) return {once};
  const int times =
      static_cast<int>(std::clamp(std::ceil(kShortestSample / std::max(once, 1e-9)), 1.0, 1e5));
  std::vector<double> samples;
  do {
    const auto begin = Clock::now();
    run(call, turn.threads, times);
    samples.push_back(since(begin) / times);
  } while (static_cast<int>(samples.size()) < turn.samples && since(start) < turn.seconds);
  return samples;
}

RemoteTimer::RemoteTimer() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    throw std::runtime_error(std::string("no socket for a peer's process: ") +
                             std::strerror(errno));
  socket_ = ends[0];
  // Duplicated onto 3, the child's end stays open across exec; everything else of ours closes.
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  // dup2 onto itself would keep close-on-exec
  const int spare = ends[1] == 3 ? fcntl(ends[1], F_DUPFD_CLOEXEC, 10) : ends[1];
  posix_spawn_file_actions_adddup2(&actions, spare, 3);
  char program[] = "report", option[] = "--serve", descriptor[] = "3";
  char* arguments[] = {program, option, descriptor, nullptr};
  const int error = posix_spawn(&process_, "/proc/self/exe", &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (spare != ends[1]) close(spare);
  if (error != 0) {
    close(socket_);
    throw std::runtime_error(std::string("cannot start a peer's process: ") + std::strerror(error));
  }
}

RemoteTimer::~RemoteTimer() {
  if (socket_ >= 0) close(socket_);
  if (process_ > 0) {
    kill(process_, SIGTERM);  // it may be in the middle of a long call
    waitpid(process_, nullptr, 0);
  }
}

void RemoteTimer::fail() {
  int status = 0;
  waitpid(process_, &status, 0);
  process_ = -1;
  throw std::runtime_error(
      WIFSIGNALED(status)
          ? std::string("its process was ended by signal ") + strsignal(WTERMSIG(status))
          : "its process ended with status " + std::to_string(WEXITSTATUS(status)));
}

std::string RemoteTimer::ask(const std::string& question) {
  if (process_ < 0) throw std::runtime_error("its process has ended");
  std::string reply;
  if (!write_line(socket_, question) || !read_line(socket_, unread_, reply)) fail();
  if (reply.rfind("error ", 0) == 0) throw std::runtime_error(reply.substr(6));
  return reply.substr(std::min<std::size_t>(reply.size(), 3));  // after "ok "
}

void RemoteTimer::open(std::size_t index) { ask("open " + std::to_string(index)); }

std::string RemoteTimer::mismatch(std::size_t row, std::size_t call) {
  return ask("mismatch " + std::to_string(row) + " " + std::to_string(call));
}

std::vector<double> RemoteTimer::take(const Turn& turn) {
  std::ostringstream question;
  question << "take " << turn.row << ' ' << turn.call << ' ' << turn.threads << ' ' << turn.samples
           << ' ' << turn.seconds;
  std::istringstream reply(ask(question.str()));
  std::vector<double> samples;
  for (double seconds = 0; reply >> seconds;) samples.push_back(seconds);
  return samples;
}

void serve(int socket) {
  Timer timer;
  std::string unread, question;
  while (read_line(socket, unread, question)) {
    std::string reply;
    try {
      reply = "ok " + answer(timer, question);
    } catch (const std::exception& error) {
      reply = std::string("error ") + error.what();
    }
    if (!write_line(socket, reply)) return;
  }
}

}  // namespace bench
