/// \file
/// NCCL for machines without a GPU: the calls that communicator/nccl.h makes, over streams of the
/// emulated device (emulators/block/device.h); ranks are threads. Included before
/// communicator/nccl.h, it stands where <nccl.h> does.
///
/// As NCCL's do, calls of a group start together, work begins when the stream comes to it, and all
/// ranks' groups meet in the order in which their streams come to them. What does not fit together
/// (ranks that call different collectives, a send that nobody receives, a rank that never comes)
/// never ends, until the communicator is aborted. Communicators are non-blocking: a call is under
/// way until ncclCommGetAsyncError has been asked a few times.
///
///   // what this thread's next ncclSend returns, and what it hears when it asks
///   emulated::nccl_failures = {.call = "ncclSend", .result = ncclSystemError};
///   emulated::nccl_failures = {.asynchronous = ncclRemoteError};
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "../block/device.h"

#define NCCL_MAJOR 2
#define NCCL_CONFIG_INITIALIZER \
  { 1 }

enum ncclResult_t {
  ncclSuccess,
  ncclUnhandledCudaError,
  ncclSystemError,
  ncclInternalError,
  ncclInvalidArgument,
  ncclInvalidUsage,
  ncclRemoteError,
  ncclInProgress
};
enum ncclDataType_t { ncclInt8 };
struct ncclUniqueId {
  char internal[128];
};
struct ncclConfig_t {
  int blocking;
};
struct ncclComm;
using ncclComm_t = ncclComm*;

namespace eigenformer_test::emulated {

/// One call of a group: what it moves, and between whom.
struct NcclCall {
  enum class Kind { all_gather, broadcast, send, receive } kind;
  const std::byte* from;  // nullptr: nothing is sent
  std::byte* to;          // nullptr: nothing is received
  std::size_t bytes;
  int peer;  // or the root
};
using NcclGroup = std::vector<NcclCall>;

/// The ranks of one id, and what each of them has under way.
class NcclClique {
 public:
  explicit NcclClique(int ranks) : groups_(static_cast<std::size_t>(ranks)) {}

  int ranks() const { return static_cast<int>(groups_.size()); }
  void join() {
    const std::lock_guard lock(mutex_);
    ++joined_;
  }
  bool complete() {
    const std::lock_guard lock(mutex_);
    return joined_ == ranks();
  }

  /// The stream of a rank has come to a group; which round it waits for.
  std::uint64_t post(int rank, const NcclGroup& group) {
    const std::lock_guard lock(mutex_);
    groups_[static_cast<std::size_t>(rank)] = &group;
    const std::uint64_t round = rounds_ + 1;
    if (std::find(groups_.begin(), groups_.end(), nullptr) == groups_.end() && fit()) move_all();
    return round;
  }
  bool done(std::uint64_t round) {
    const std::lock_guard lock(mutex_);
    return rounds_ >= round;
  }
  void withdraw(int rank) {
    const std::lock_guard lock(mutex_);
    groups_[static_cast<std::size_t>(rank)] = nullptr;
  }

 private:
  using Kind = NcclCall::Kind;

  const NcclGroup& group(int rank) const { return *groups_[static_cast<std::size_t>(rank)]; }
  static bool collective(const NcclCall& call) {
    return call.kind == Kind::all_gather || call.kind == Kind::broadcast;
  }
  static NcclGroup collectives(const NcclGroup& group) {
    NcclGroup result;
    std::copy_if(group.begin(), group.end(), std::back_inserter(result), collective);
    return result;
  }
  /// Calls of a kind with a peer, in order.
  static NcclGroup between(const NcclGroup& group, Kind kind, int peer) {
    NcclGroup result;
    for (const NcclCall& call : group)
      if (call.kind == kind && call.peer == peer) result.push_back(call);
    return result;
  }

  bool fit() const {
    constexpr auto same = [](const NcclCall& a, const NcclCall& b) {
      return a.kind == b.kind && a.bytes == b.bytes && a.peer == b.peer;
    };
    constexpr auto as_long = [](const NcclCall& a, const NcclCall& b) {
      return a.bytes == b.bytes;
    };
    const NcclGroup first = collectives(group(0));
    for (int a = 0; a < ranks(); ++a) {
      const NcclGroup other = collectives(group(a));
      if (!std::equal(first.begin(), first.end(), other.begin(), other.end(), same)) return false;
      for (int b = 0; b < ranks(); ++b) {
        const NcclGroup sent = between(group(a), Kind::send, b),
                        received = between(group(b), Kind::receive, a);
        if (!std::equal(sent.begin(), sent.end(), received.begin(), received.end(), as_long))
          return false;
      }
    }
    return true;
  }

  /// The last who comes moves the memory of all.
  void move_all() {
    const DeviceMemory::Opened opened;
    const auto move = [](const NcclCall& from, const NcclCall& to, std::size_t offset) {
      if (from.bytes > 0 && to.to + offset != from.from)
        std::memcpy(to.to + offset, from.from, from.bytes);
    };
    for (int a = 0; a < ranks(); ++a) {
      const NcclGroup own = collectives(group(a));
      for (std::size_t i = 0; i < own.size(); ++i)
        for (int b = 0; b < ranks(); ++b) {
          const NcclCall from = collectives(group(b))[i];
          if (from.kind == Kind::all_gather)
            move(from, own[i], static_cast<std::size_t>(b) * from.bytes);
          else if (b == from.peer)
            move(from, own[i], 0);
        }
      for (int b = 0; b < ranks(); ++b) {
        const NcclGroup sent = between(group(b), Kind::send, a),
                        received = between(group(a), Kind::receive, b);
        for (std::size_t i = 0; i < sent.size(); ++i) move(sent[i], received[i], 0);
      }
    }
    std::fill(groups_.begin(), groups_.end(), nullptr);
    ++rounds_;
  }

  std::mutex mutex_;
  std::vector<const NcclGroup*> groups_;  // under way, one for each rank
  std::uint64_t rounds_ = 0;
  int joined_ = 0;
};

/// What a rank shares with its work in the stream.
struct NcclRank {
  std::shared_ptr<NcclClique> clique;
  int rank;
  std::atomic<bool> aborted = false;
};

/// A failure of the calling thread's NCCL, once (see above).
struct NcclFailures {
  std::string_view call = {};
  ncclResult_t result = ncclSuccess;
  ncclResult_t asynchronous = ncclSuccess;
};
inline thread_local NcclFailures nccl_failures;

inline ncclResult_t nccl_result(std::string_view call) {
  if (nccl_failures.call != call) return ncclSuccess;
  return std::exchange(nccl_failures, {}).result;
}

/// Communicators that live: a test sees that none is lost.
inline std::atomic<int> nccl_communicators = 0;

/// The group that the calling thread has open.
struct OpenNcclGroup {
  int depth = 0;
  NcclGroup calls;
  ncclComm_t communicator = nullptr;
  Stream* stream = nullptr;
};
inline thread_local OpenNcclGroup open_nccl_group;

}  // namespace eigenformer_test::emulated

struct ncclComm {
  std::shared_ptr<eigenformer_test::emulated::NcclRank> rank;
  int polls = 0;  // until the last call is taken in
};

inline const char* ncclGetErrorString(ncclResult_t result) {
  constexpr std::array texts{"no error",       "unhandled cuda error", "unhandled system error",
                             "internal error", "invalid argument",     "invalid usage",
                             "remote error",   "in progress"};
  return texts[result];
}
inline const char* ncclGetLastError(ncclComm_t) { return ""; }

inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> next = 0;
  const int number = ++next;
  std::memcpy(id->internal, &number, sizeof number);
  return eigenformer_test::emulated::nccl_result("ncclGetUniqueId");
}

inline ncclResult_t ncclCommInitRankConfig(ncclComm_t* communicator, int ranks, ncclUniqueId id,
                                           int rank, ncclConfig_t* config) {
  using namespace eigenformer_test::emulated;
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<NcclClique>> cliques;
  if (const ncclResult_t result = nccl_result("ncclCommInitRankConfig"); result != ncclSuccess)
    return result;
  if (config->blocking != 0) return ncclInvalidUsage;  // whose waits have no limit
  int number = 0;
  std::memcpy(&number, id.internal, sizeof number);
  const std::lock_guard lock(mutex);
  std::shared_ptr<NcclClique> clique = cliques[number].lock();
  if (clique == nullptr) cliques[number] = clique = std::make_shared<NcclClique>(ranks);
  if (clique->ranks() != ranks || rank < 0 || rank >= ranks) return ncclInvalidArgument;
  clique->join();
  *communicator = new ncclComm{std::make_shared<NcclRank>(clique, rank), 3};
  ++nccl_communicators;
  return ncclInProgress;
}

inline ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* result) {
  using namespace eigenformer_test::emulated;
  if (communicator == nullptr) return ncclInvalidArgument;
  *result = ncclSuccess;
  if (nccl_failures.asynchronous != ncclSuccess)
    *result = std::exchange(nccl_failures, {}).asynchronous;
  else if (!communicator->rank->clique->complete() || communicator->polls-- > 0)
    *result = ncclInProgress;
  return ncclSuccess;
}

inline ncclResult_t ncclCommFinalize(ncclComm_t communicator) {
  communicator->polls = 3;
  return ncclInProgress;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  delete communicator;
  --eigenformer_test::emulated::nccl_communicators;
  return ncclSuccess;
}
inline ncclResult_t ncclCommAbort(ncclComm_t communicator) {
  communicator->rank->aborted = true;
  communicator->rank->clique->withdraw(communicator->rank->rank);
  return ncclCommDestroy(communicator);
}

inline ncclResult_t ncclGroupStart() {
  ++eigenformer_test::emulated::open_nccl_group.depth;
  return ncclSuccess;
}

/// The calls of the group go to the stream as one piece of work.
inline ncclResult_t ncclGroupEnd() {
  using namespace eigenformer_test::emulated;
  OpenNcclGroup& open = open_nccl_group;
  if (--open.depth > 0) return ncclSuccess;
  OpenNcclGroup group = std::exchange(open, {});
  if (const ncclResult_t result = nccl_result("ncclGroupEnd"); result != ncclSuccess) return result;
  if (group.calls.empty()) return ncclSuccess;
  group.communicator->polls = 3;
  struct Work {
    std::shared_ptr<NcclRank> rank;
    NcclGroup calls;
    std::uint64_t round = 0;  // 0: not begun
  };
  const auto work = std::make_shared<Work>(group.communicator->rank, std::move(group.calls));
  group.stream->submit({[] {},
                        [work] {
                          if (work->rank->aborted) return true;
                          NcclClique& clique = *work->rank->clique;
                          if (work->round == 0)
                            work->round = clique.post(work->rank->rank, work->calls);
                          if (!clique.done(work->round)) return false;
                          work->round = 0;  // a graph may run it again
                          return true;
                        }});
  return ncclInProgress;
}

namespace eigenformer_test::emulated {

inline ncclResult_t nccl_call(std::string_view name, ncclComm_t communicator, Stream& stream,
                              const NcclCall& call, std::size_t received) {
  if (const ncclResult_t result = nccl_result(name); result != ncclSuccess) return result;
  DeviceMemory& memory = DeviceMemory::instance();
  if ((call.from != nullptr && !memory.holds(call.from, call.bytes)) ||
      (call.to != nullptr && !memory.holds(call.to, received)) ||
      call.peer >= communicator->rank->clique->ranks())
    return ncclInvalidArgument;
  ncclGroupStart();
  open_nccl_group.calls.push_back(call);
  open_nccl_group.communicator = communicator;
  open_nccl_group.stream = &stream;
  return ncclGroupEnd();
}

}  // namespace eigenformer_test::emulated

inline ncclResult_t ncclAllGather(const void* from, void* to, std::size_t count, ncclDataType_t,
                                  ncclComm_t communicator,
                                  eigenformer_test::emulated::Stream& stream) {
  using namespace eigenformer_test::emulated;
  return nccl_call("ncclAllGather", communicator, stream,
                   {NcclCall::Kind::all_gather, static_cast<const std::byte*>(from),
                    static_cast<std::byte*>(to), count, 0},
                   count * static_cast<std::size_t>(communicator->rank->clique->ranks()));
}
inline ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t,
                                  int root, ncclComm_t communicator,
                                  eigenformer_test::emulated::Stream& stream) {
  using namespace eigenformer_test::emulated;
  return nccl_call("ncclBroadcast", communicator, stream,
                   {NcclCall::Kind::broadcast, static_cast<const std::byte*>(from),
                    static_cast<std::byte*>(to), count, root},
                   count);
}
inline ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t, int peer,
                             ncclComm_t communicator, eigenformer_test::emulated::Stream& stream) {
  using namespace eigenformer_test::emulated;
  return nccl_call(
      "ncclSend", communicator, stream,
      {NcclCall::Kind::send, static_cast<const std::byte*>(from), nullptr, count, peer}, 0);
}
inline ncclResult_t ncclRecv(void* to, std::size_t count, ncclDataType_t, int peer,
                             ncclComm_t communicator, eigenformer_test::emulated::Stream& stream) {
  using namespace eigenformer_test::emulated;
  return nccl_call("ncclRecv", communicator, stream,
                   {NcclCall::Kind::receive, nullptr, static_cast<std::byte*>(to), count, peer},
                   count);
}
