/// \file
/// Ranks that have a GPU each, over NCCL. Included by communicator.h in CUDA files where
/// EIGENFORMER_NCCL is defined (CMake: -DEIGENFORMER_NCCL=ON). The concept's manual is
/// communicator.h.
///
/// Values may lie in memory of the device or of the host, each on its own. Those of the device are
/// moved by the stream, after the work that it has already: the call returns once NCCL has taken it
/// in, and what the stream gets next sees the result. Those of the host (ids, statistics) are copied
/// to the device and back, and the call waits for them.
///
/// Sums have the order of the ranks, which ncclAllReduce does not promise: every rank receives its
/// slice of all ranks' values, a kernel adds it in rank order, and the slices are gathered. That is
/// 2 B (n - 1) / n bytes each way over the links, as in any ring, in two steps. On 8 GPUs of NVLink
/// 4 some 80% of ncclAllReduce's speed is expected for large B, less where its latency counts.
#pragma once

#if !defined(NCCL_MAJOR)  // tests bring an emulated one
#include <nccl.h>
#endif

#include <algorithm>
#include <array>
#include <chrono>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../communicator.h"
#include "../core/dispatch.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct NcclOptions {
  /// Before each collective ranks compare what they are about to call (40 bytes per rank): a
  /// difference is an error on every rank. The host then waits for the stream in every collective,
  /// some 30 us, and none can be captured into a graph. Without it ranks that call different
  /// collectives wait for each other until the time limit, or get wrong values where only the sizes
  /// differ.
  bool compare_calls = false;
  /// What a call that waits gives the other ranks; then the communicator is aborted. Longer than
  /// the longest work that a stream may have before a collective.
  std::chrono::milliseconds time_limit = std::chrono::minutes(10);
  /// Bytes of the stream's scratch that a sum may take; longer ones go in pieces.
  Index largest_scratch = Index{64} << 20;
};

/// One rank of an NCCL communicator, on the stream of a device, which is CUDA's current device when
/// the communicator is made. The stream outlives it. NcclCommunicator is that of an
/// Eigen::GpuDevice. Movable, not copyable; used by one thread at a time, beside other work for the
/// stream.
///
/// A rank that fails, ends or never comes is a CommunicatorError on the others where they wait: in
/// wait(), in a barrier, with values of the host, while NCCL takes in a call; not in calls that
/// return at once. So a program calls wait() before it waits for its stream by other means, which
/// know no limit. The communicator is then aborted: what the stream still had of it ends with
/// undefined values, and all later calls throw.
///
/// Collectives of values of the device can be captured into a graph.
///
///   Eigen::GpuStreamDevice stream;   // of the current device
///   Eigen::GpuDevice device(&stream);
///   ef::NcclCommunicator communicator(device, mpi);   // mpi: any communicator of the same ranks
///   ef::column_parallel_linear_into(device, y, x, weight, communicator);
///   communicator.wait();
template <Device D>
class BasicNcclCommunicator {
 public:
  /// Whether it moves the memory of a device.
  template <Device E>
  static constexpr bool kReaches = std::same_as<E, D>;

  /// Rank `rank` of `ranks`, all of which got the same id, which one of them made by unique_id().
  /// Collective: waits for all. Throws std::invalid_argument for a rank outside [0, ranks) and
  /// limits below 1, CommunicatorError where NCCL fails or a rank does not come.
  BasicNcclCommunicator(const D& device, const ncclUniqueId& id, int rank, int ranks,
                        const NcclOptions& options = {})
      : device_(device), options_(options), rank_(rank), size_(ranks) {
    constexpr auto name = "NcclCommunicator";
    detail::require_that(ranks >= 1, name, "there are ", ranks, " ranks, expected 1 or more");
    detail::require_that(rank >= 0 && rank < ranks, name, "rank is ", rank, ", expected 0 to ",
                         ranks - 1);
    detail::require_that(options.time_limit.count() >= 1, name, "time_limit is ",
                         options.time_limit.count(), " ms, expected 1 or more");
    detail::require_that(options.largest_scratch >= 1, name, "largest_scratch is ",
                         options.largest_scratch, ", expected 1 or more");
    calls_.resize(static_cast<std::size_t>(ranks));
    slices_.resize(static_cast<std::size_t>(ranks));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // what waits is here, and has a limit
    settle("ncclCommInitRankConfig", ncclCommInitRankConfig(&comm_, ranks, id, rank, &config));
  }

  /// The same ranks as those of another communicator (threads, MPI processes), which brings the id
  /// to all of them and is not used afterwards.
  template <Communicator C>
  BasicNcclCommunicator(const D& device, C& ranks, const NcclOptions& options = {})
      : BasicNcclCommunicator(device, shared_id(ranks), ranks.rank(), ranks.size(), options) {}

  BasicNcclCommunicator(BasicNcclCommunicator&& other) noexcept
      : device_(other.device_),
        options_(other.options_),
        comm_(std::exchange(other.comm_, nullptr)),
        rank_(other.rank_),
        size_(other.size_),
        failure_(std::move(other.failure_)),
        calls_(std::move(other.calls_)),
        slices_(std::move(other.slices_)),
        exceptions_(other.exceptions_) {}
  BasicNcclCommunicator& operator=(BasicNcclCommunicator&&) = delete;

  /// Waits for the collectives that are under way, within the time limit; where an exception ends
  /// the scope it aborts them, since the other ranks may never come to them.
  ~BasicNcclCommunicator() {
    if (comm_ == nullptr) return;
    if (std::uncaught_exceptions() == exceptions_ && finalized())
      ncclCommDestroy(comm_);
    else
      ncclCommAbort(comm_);
  }

  /// For one rank, which gives it to all. Throws CommunicatorError.
  static ncclUniqueId unique_id() {
    ncclUniqueId id;
    const ncclResult_t result = ncclGetUniqueId(&id);
    if (result != ncclSuccess)
      detail::fail<CommunicatorError>(std::string("ncclGetUniqueId: ") +
                                      ncclGetErrorString(result));
    return id;
  }

  int rank() const { return rank_; }
  int size() const { return size_; }

  template <detail::ElementRange Part, detail::ElementRange Whole>
  void all_gather(const Part& part, Whole&& whole, std::span<const Index> counts = {}) {
    using T = std::ranges::range_value_t<Whole>;
    static_assert(std::is_same_v<T, std::ranges::range_value_t<Part>>,
                  "eigenformer: part and whole hold different types");
    const std::span<const T> from(part);
    const std::span<T> to(whole);
    const detail::PartSizes parts{counts, static_cast<Index>(from.size())};
    begin(
        detail::all_gather_call<T>(parts, parts.equal, static_cast<Index>(to.size()), rank_, size_),
        options_.compare_calls);
    in_device_memory(to, [&](T* place) {
      const T* own = from.data();
      if (!from.empty() && !on_device(own)) {
        Index before = 0;
        for (int r = 0; r < rank_; ++r) before += parts[r];
        own = place + before;
        copy_in(place + before, from.data(), from.size_bytes());
      }
      gather(own, place, parts);
    });
  }

  template <detail::ElementRange Values>
  void all_reduce_sum(Values&& values) {
    using T = std::ranges::range_value_t<Values>;
    static_assert(detail::Summable<T>);
    const std::span<T> own(values);
    begin(detail::all_reduce_call<T>(static_cast<Index>(own.size())), options_.compare_calls);
    if (size_ == 1) return;
    in_device_memory(own, [&](T* place) {
      const Index piece = (std::max)(options_.largest_scratch / Index{sizeof(T)}, Index{1});
      const Index count = static_cast<Index>(own.size());
      for (Index offset = 0; offset < count; offset += piece)
        reduce_piece(place + offset, (std::min)(piece, count - offset));
    });
  }

  template <detail::ElementRange Values>
  void broadcast(Values&& values, int root) {
    using T = std::ranges::range_value_t<Values>;
    const std::span<T> own(values);
    begin(detail::broadcast_call<T>(static_cast<Index>(own.size()), root, size_),
          options_.compare_calls);
    in_device_memory(own, [&](T* place) {
      submit([&](auto&& call) {
        call("ncclBroadcast", ncclBroadcast(place, place, own.size_bytes(), ncclInt8, root, comm_,
                                            device_.stream()));
      });
    });
  }

  /// Waits for the stream, and for all ranks.
  void barrier() { begin(detail::kBarrierCall, true); }

  /// Waits for the work of the stream, within the time limit.
  void wait() {
    require_alive();
    until("wait", [&](ncclResult_t) { return finished(detail::gpu_backend(device_), kName); });
  }

  /// Ends what is under way and the communicator, at once: for a rank that cannot go on. The other
  /// ranks hear of it as of one that never comes.
  void abort() noexcept {
    if (comm_ == nullptr) return;
    ncclCommAbort(std::exchange(comm_, nullptr));
    detail::attempt([&] { failure_ = "it was aborted"; }, [](const char*) {});
  }

 private:
  static constexpr const char* kName = "NcclCommunicator";

  template <Communicator C>
  static ncclUniqueId shared_id(C& ranks) {
    struct Made {
      ncclUniqueId id;
      ncclResult_t result;
    };
    std::array<Made, 1> made{};
    if (ranks.rank() == 0) made[0].result = ncclGetUniqueId(&made[0].id);
    ranks.broadcast(made, 0);  // the failure too, so that nobody waits for the id
    if (made[0].result != ncclSuccess)
      detail::fail<CommunicatorError>(std::string("ncclGetUniqueId: ") +
                                      ncclGetErrorString(made[0].result));
    return made[0].id;
  }

  // ---- failures -------------------------------------------------------------------------------

  [[noreturn]] void give_up(std::string_view what, std::string_view why) {
    failure_ = "rank " + std::to_string(rank_) + " of " + std::to_string(size_) + ", " +
               (call_ ? describe(*call_) : "creation") + ", " + std::string(what) + ": " +
               std::string(why);
    if (comm_ != nullptr) ncclCommAbort(std::exchange(comm_, nullptr));
    detail::fail<CommunicatorError>(std::string(kName) + ": " + failure_);
  }
  [[noreturn]] void give_up(std::string_view what, ncclResult_t result) {
    const char* const more = ncclGetLastError(comm_);
    const bool says_more = more != nullptr && *more != '\0';
    give_up(what, ncclGetErrorString(result) + (says_more ? ": " + std::string(more) : ""));
  }
  void require_alive() const {
    if (comm_ == nullptr)
      detail::fail<CommunicatorError>(std::string(kName) + ": the communicator has ended: " +
                                      (failure_.empty() ? "it was moved from" : failure_));
  }

  /// Until done(what NCCL says of itself), within the time limit.
  template <typename Done>
  void until(std::string_view what, Done&& done) {
    const auto limit = std::chrono::steady_clock::now() + options_.time_limit;
    for (;; std::this_thread::yield()) {
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
      if (asked != ncclSuccess) give_up(what, asked);
      if (state != ncclSuccess && state != ncclInProgress) give_up(what, state);
      if (done(state)) return;
      if (std::chrono::steady_clock::now() > limit)
        give_up(what, "no answer within " + std::to_string(options_.time_limit.count()) +
                          " ms: a rank has failed, has ended or calls something else");
    }
  }

  /// Until NCCL has taken in a call.
  void settle(std::string_view what, ncclResult_t result) {
    if (result == ncclInProgress)
      until(what, [](ncclResult_t state) { return state == ncclSuccess; });
    else if (result != ncclSuccess)
      give_up(what, result);
  }

  bool finalized() noexcept {
    const auto limit = std::chrono::steady_clock::now() + options_.time_limit;
    ncclResult_t state = ncclCommFinalize(comm_);
    while (state == ncclInProgress && std::chrono::steady_clock::now() < limit) {
      std::this_thread::yield();
      if (ncclCommGetAsyncError(comm_, &state) != ncclSuccess) return false;
    }
    return state == ncclSuccess;
  }

  // ---- what collectives are made of -----------------------------------------------------------

  void begin(const detail::CollectiveCall& call, bool compare) {
    require_alive();
    call_ = call;
    if (!compare) return;
    auto frame = detail::tensor_frame(device_, thread_workspace());
    auto* const calls = frame.template take<detail::CollectiveCall>(size_);
    copy_in(calls + rank_, &call, sizeof call);
    gather(calls + rank_, calls, {{}, 1});
    copy_out(calls_.data(), calls, calls_.size() * sizeof call);
    detail::require_same_call(size_, [&](int r) -> const detail::CollectiveCall& {
      return calls_[static_cast<std::size_t>(r)];
    });
  }

  bool on_device(const void* data) const {
    return lies_on_device(detail::gpu_backend(device_), data);
  }
  // Before a copy: CUDA waits for the stream where memory of the host is pageable, without a limit.
  void copy_in(void* to, const void* from, std::size_t bytes) {
    wait();
    device_.memcpyHostToDevice(to, from, bytes);
    device_.synchronize();
  }
  void copy_out(void* to, const void* from, std::size_t bytes) {
    wait();
    device_.memcpyDeviceToHost(to, from, bytes);
    device_.synchronize();
  }

  /// run(values in memory of the device): themselves, or a copy that is brought there and back.
  template <typename T, typename Run>
  void in_device_memory(std::span<T> values, Run&& run) {
    if (values.empty()) return;
    if (on_device(values.data())) return run(values.data());
    auto frame = detail::tensor_frame(device_, thread_workspace());
    T* const copy = frame.template take<T>(static_cast<Index>(values.size()));
    copy_in(copy, values.data(), values.size_bytes());
    run(copy);
    copy_out(values.data(), copy, values.size_bytes());
  }

  /// The NCCL calls of calls(call), as one group.
  template <typename Calls>
  void submit(Calls&& calls) {
    std::string_view failed = "ncclGroupStart";
    ncclResult_t first = ncclGroupStart();
    calls([&](std::string_view name, ncclResult_t result) {
      if (first != ncclSuccess || result == ncclInProgress) return;
      first = result;
      failed = name;
    });
    const ncclResult_t end = ncclGroupEnd();
    if (first != ncclSuccess) give_up(failed, first);
    settle("ncclGroupEnd", end);
  }

  /// whole = all ranks' parts, in rank order. `own` is this rank's, at its place or elsewhere.
  template <typename T>
  void gather(const T* own, T* whole, const detail::PartSizes& parts) {
    const auto bytes = [&](int r) { return static_cast<std::size_t>(parts[r]) * sizeof(T); };
    bool equal = true;
    for (int r = 1; r < size_; ++r) equal = equal && parts[r] == parts[0];
    submit([&](auto&& call) {
      if (equal)
        return call("ncclAllGather",
                    ncclAllGather(own, whole, bytes(0), ncclInt8, comm_, device_.stream()));
      for (int r = 0; r < size_; whole += parts[r], ++r)
        if (parts[r] > 0)
          call("ncclBroadcast", ncclBroadcast(r == rank_ ? own : whole, whole, bytes(r), ncclInt8,
                                              r, comm_, device_.stream()));
    });
  }

  template <typename T>
  void reduce_piece(T* values, Index count) {
    constexpr Index kGrain = 64;  // so that slices begin where 16 bytes do
    Index offset = 0, own_begin = 0;
    for (int r = 0; r < size_; ++r) {
      const ShardRange grains = shard_range((count + kGrain - 1) / kGrain, r, size_);
      Index& size = slices_[static_cast<std::size_t>(r)];
      size = (std::min)(grains.size() * kGrain, count - offset);
      if (r == rank_) own_begin = offset;
      offset += size;
    }
    const detail::PartSizes slices{slices_, 0};
    const Index own = slices[rank_], stride = slices[0];  // the longest
    auto frame = detail::tensor_frame(device_, thread_workspace());
    T* const others = frame.template take<T>(own > 0 ? stride * (size_ - 1) : 0);
    submit([&](auto&& call) {
      const auto bytes = [](Index n) { return static_cast<std::size_t>(n) * sizeof(T); };
      Index at = 0, row = 0;
      for (int r = 0; r < size_; at += slices[r], ++r) {
        if (r == rank_) continue;
        if (slices[r] > 0)
          call("ncclSend",
               ncclSend(values + at, bytes(slices[r]), ncclInt8, r, comm_, device_.stream()));
        if (own > 0)
          call("ncclRecv",
               ncclRecv(others + stride * row++, bytes(own), ncclInt8, r, comm_, device_.stream()));
      }
    });
    detail::run(device_,
                problem::RankSum<T>{values + own_begin, others, own, stride, rank_, size_});
    gather(values + own_begin, values, slices);
  }

  D device_;
  NcclOptions options_;
  ncclComm_t comm_ = nullptr;  // null once it has ended
  int rank_, size_;
  std::optional<detail::CollectiveCall> call_;  // the last one
  std::string failure_;                         // why
  std::vector<detail::CollectiveCall> calls_;   // of all ranks
  std::vector<Index> slices_;                   // of a sum, one per rank
  int exceptions_ = std::uncaught_exceptions();
};

#if defined(EIGENFORMER_CUDA_UNIT)
using NcclCommunicator = BasicNcclCommunicator<Eigen::GpuDevice>;
#endif

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
