// Collectives over thread ranks. Limit: the copies they must make. Peer: one memcpy of the same
// bytes, which needs no meeting.
#include <eigenformer/communicator.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "report/harness.h"

namespace ef = eigenformer;

namespace {

/// Two long-lived ranks: rank 1 repeats what rank 0, on the timed thread, asks for.
class Pair {
 public:
  explicit Pair(Eigen::Index elements)
      : part_{make(elements), make(elements)}, whole_{make(2 * elements), make(2 * elements)} {
    own_.emplace_back(group_.communicator(0));
    other_ = std::thread([this, communicator = group_.communicator(1)]() mutable {
      try {
        for (;;) step(communicator);
      } catch (const ef::CommunicatorError&) {
        // The group was stopped.
      }
    });
  }
  ~Pair() {
    group_.stop("end of the benchmark");
    other_.join();
  }

  void all_gather() { request(1); }
  void all_reduce_sum() { request(2); }
  void barrier() { request(3); }
  void copy() { std::memcpy(whole_[0].data(), whole_[1].data(), whole_[0].size() * sizeof(float)); }

 private:
  static std::vector<float> make(Eigen::Index elements) {
    return std::vector<float>(static_cast<std::size_t>(elements), 1e-20f);
  }

  void request(std::int32_t work) {
    work_ = work;
    step(own_.front());
  }
  void step(ef::ThreadCommunicator& communicator) {
    std::int32_t work[1] = {work_.load()};
    communicator.broadcast(work, 0);
    const auto rank = static_cast<std::size_t>(communicator.rank());
    if (work[0] == 1) communicator.all_gather(part_[rank], whole_[rank]);
    if (work[0] == 2) communicator.all_reduce_sum(part_[rank]);
    if (work[0] == 3) communicator.barrier();
  }

  ef::ThreadCommunicatorGroup group_{2};
  std::vector<float> part_[2], whole_[2];
  std::atomic<std::int32_t> work_{0};
  std::vector<ef::ThreadCommunicator> own_;
  std::thread other_;
};

void communicator_cases(bench::Suite& suite) {
  for (Eigen::Index elements : {Eigen::Index{4096} / 8, Eigen::Index{1} << 17}) {
    auto pair = std::make_shared<Pair>(elements);
    const double bytes = 2.0 * static_cast<double>(elements) * sizeof(float);
    const std::string size =
        std::to_string(static_cast<Eigen::Index>(bytes) / 1024) + " KiB over 2 thread ranks";
    auto& gather = suite.row("all_gather " + size, bench::Limit::copy_bytes(bytes, bytes));
    gather.calls.push_back(
        {"eigenformer", [=](const Eigen::DefaultDevice&) { pair->all_gather(); }, {}});
    gather.peer_one_thread("memcpy", [=] { pair->copy(); });
    auto& reduce =
        suite.row("all_reduce_sum " + std::to_string(static_cast<Eigen::Index>(bytes) / 2048) +
                      " KiB over 2 thread ranks",
                  bench::Limit::copy_bytes(bytes / 2, bytes / 2));
    reduce.calls.push_back(
        {"eigenformer", [=](const Eigen::DefaultDevice&) { pair->all_reduce_sum(); }, {}});
    reduce.peer_one_thread("memcpy of twice the bytes", [=] { pair->copy(); });
  }
  auto pair = std::make_shared<Pair>(1);
  suite.row("barrier over 2 thread ranks (and the broadcast that asks for it)", {})
      .calls.push_back({"eigenformer", [=](const Eigen::DefaultDevice&) { pair->barrier(); }, {}});
}

}  // namespace

EIGENFORMER_BENCHMARK(communicator_cases)
