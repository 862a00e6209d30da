/// \file
/// Ranks that are MPI processes. Included by communicator.h where EIGENFORMER_MPI is defined
/// (CMake: -DEIGENFORMER_MPI=ON). The concept's manual is communicator.h.
///
/// MPI knows neither bfloat16 nor half and promises no order of summation (MPI_Allreduce), so data
/// travels as bytes and sums are ours: every rank receives its slice of all ranks' values, adds it
/// in rank order, and the slices are gathered.
#pragma once

// The C++ bindings were removed from MPI in 2012; their headers only warn.
#if !defined(OMPI_SKIP_MPICXX)
#define OMPI_SKIP_MPICXX 1
#endif
#if !defined(MPICH_SKIP_MPICXX)
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>

#include <utility>
#include <vector>

#include "collective.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct MpiOptions {
  /// The MPI_Comm given is freed with the communicator; otherwise it stays the caller's.
  bool take_ownership = false;
  /// Before each collective ranks compare what they are about to call (40 bytes per rank): a
  /// difference is an error on every rank instead of undefined behaviour.
  bool compare_calls = true;
  /// Bytes of the largest single message, below MPI's limit of INT_MAX; longer ones travel in
  /// pieces.
  Index largest_message = Index{1} << 30;
};

/// One rank of an MPI communicator, on a duplicate of it whose errors come back as
/// CommunicatorError. MPI must be initialised before and finalised after. A rank that dies leaves
/// the others waiting: that is MPI's way, MPI_Abort is its answer. Movable, not copyable.
///
///   MPI_Init(&argc, &argv);
///   {
///     ef::MpiCommunicator communicator(MPI_COMM_WORLD);
///     y = ef::column_parallel_linear(x, weight, communicator);
///   }
///   MPI_Finalize();
class MpiCommunicator {
 public:
  /// Collective over `communicator`. Throws CommunicatorError where MPI is not running or fails,
  /// std::invalid_argument for a largest_message outside [1, INT_MAX].
  explicit MpiCommunicator(MPI_Comm communicator = MPI_COMM_WORLD, const MpiOptions& options = {})
      : options_(options) {
    detail::require_that(options.largest_message >= 1 &&
                             options.largest_message <= (std::numeric_limits<int>::max)(),
                         "MpiCommunicator", "largest_message is ", options.largest_message,
                         ", expected 1 to ", (std::numeric_limits<int>::max)());
    if (!running())
      detail::fail<CommunicatorError>("MpiCommunicator: MPI is not initialised, or is finalised");
    succeed(MPI_Comm_dup(communicator, &own_), "MPI_Comm_dup");
    MPI_Comm_set_errhandler(own_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(own_, &rank_);
    MPI_Comm_size(own_, &size_);
    const auto ranks = static_cast<std::size_t>(size_);
    calls_.resize(ranks);
    for (auto* sizes : {&bytes_, &offsets_, &other_bytes_, &other_offsets_}) sizes->resize(ranks);
    if (options.take_ownership) given_ = communicator;
  }
  MpiCommunicator(MpiCommunicator&& other) noexcept
      : options_(other.options_),
        own_(std::exchange(other.own_, MPI_COMM_NULL)),
        given_(std::exchange(other.given_, MPI_COMM_NULL)),
        rank_(other.rank_),
        size_(other.size_),
        calls_(std::move(other.calls_)),
        bytes_(std::move(other.bytes_)),
        offsets_(std::move(other.offsets_)),
        other_bytes_(std::move(other.other_bytes_)),
        other_offsets_(std::move(other.other_offsets_)),
        scratch_(std::move(other.scratch_)) {}
  MpiCommunicator& operator=(MpiCommunicator&&) = delete;
  ~MpiCommunicator() {
    if (own_ == MPI_COMM_NULL || !running()) return;
    MPI_Comm_free(&own_);
    if (given_ != MPI_COMM_NULL) MPI_Comm_free(&given_);
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
    compare(detail::all_gather_call<T>(parts, parts.equal, static_cast<Index>(to.size()), rank_,
                                       size_));
    Index before = 0;
    for (int r = 0; r < rank_; ++r) before += parts[r];
    detail::copy_elements(from.data(), to.data() + before, parts.equal);
    gather_in_place(as_bytes(to.data()), [&](int r) { return parts[r] * Index{sizeof(T)}; });
  }

  template <detail::ElementRange Values>
  void all_reduce_sum(Values&& values) {
    using T = std::ranges::range_value_t<Values>;
    static_assert(detail::Summable<T>);
    const std::span<T> own(values);
    const Index count = static_cast<Index>(own.size());
    compare(detail::all_reduce_call<T>(count));
    if (size_ == 1) return;
    constexpr Index kPieceBytes = Index{4} << 20;  // scratch memory of a sum: as much as one piece
    const Index piece =
        std::max<Index>(1, (std::min)(kPieceBytes, options_.largest_message) / Index{sizeof(T)});
    for (Index offset = 0; offset < count; offset += piece)
      reduce_piece(own.data() + offset, (std::min)(piece, count - offset));
  }

  template <detail::ElementRange Values>
  void broadcast(Values&& values, int root) {
    using T = std::ranges::range_value_t<Values>;
    const std::span<T> own(values);
    const Index count = static_cast<Index>(own.size());
    compare(detail::broadcast_call<T>(count, root, size_));
    broadcast_bytes(as_bytes(own.data()), count * Index{sizeof(T)}, root);
  }

  void barrier() {
    compare(detail::kBarrierCall);
    succeed(MPI_Barrier(own_), "MPI_Barrier");
  }

 private:
  static bool running() {
    int initialised = 0, finalised = 0;
    MPI_Initialized(&initialised);
    MPI_Finalized(&finalised);
    return initialised != 0 && finalised == 0;
  }

  static void succeed(int code, const char* call) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    detail::fail<CommunicatorError>(std::string(call) + ": " + text);
  }

  template <typename T>
  static std::byte* as_bytes(T* data) {
    return reinterpret_cast<std::byte*>(data);
  }

  void compare(const detail::CollectiveCall& call) {
    if (!options_.compare_calls) return;
    constexpr int kBytes = static_cast<int>(sizeof(detail::CollectiveCall));
    succeed(MPI_Allgather(&call, kBytes, MPI_BYTE, calls_.data(), kBytes, MPI_BYTE, own_),
            "MPI_Allgather");
    detail::require_same_call(size_, [&](int r) -> const detail::CollectiveCall& {
      return calls_[static_cast<std::size_t>(r)];
    });
  }

  void broadcast_bytes(std::byte* data, Index count, int root) {
    for (Index offset = 0; offset < count; offset += options_.largest_message) {
      const int n = static_cast<int>((std::min)(options_.largest_message, count - offset));
      succeed(MPI_Bcast(data + offset, n, MPI_BYTE, root, own_), "MPI_Bcast");
    }
  }

  /// All parts are in rank order in `whole`, this rank's already in its place.
  template <typename BytesOfRank>
  void gather_in_place(std::byte* whole, BytesOfRank&& bytes_of) {
    Index total = 0;
    for (int r = 0; r < size_; ++r) total += bytes_of(r);
    if (total > options_.largest_message) {
      for (int r = 0; r < size_; whole += bytes_of(r), ++r) broadcast_bytes(whole, bytes_of(r), r);
      return;
    }
    fill_sizes(bytes_, offsets_, bytes_of);
    succeed(MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_BYTE, whole, bytes_.data(), offsets_.data(),
                           MPI_BYTE, own_),
            "MPI_Allgatherv");
  }

  template <typename BytesOfRank>
  void fill_sizes(std::vector<int>& bytes, std::vector<int>& offsets,
                  BytesOfRank&& bytes_of) const {
    int offset = 0;
    for (std::size_t r = 0; r < bytes.size(); ++r) {
      bytes[r] = static_cast<int>(bytes_of(static_cast<int>(r)));
      offsets[r] = offset;
      offset += bytes[r];
    }
  }

  template <typename T>
  void reduce_piece(T* values, Index count) {
    const ShardRange slice = shard_range(count, rank_, size_);
    const auto slice_bytes = [&](int r) {
      return shard_range(count, r, size_).size() * Index{sizeof(T)};
    };
    // What arrives is one slice per rank: as many bytes as a piece, up to one element per rank more.
    const auto needed = static_cast<std::size_t>(slice.size() * size_) * sizeof(T);
    if (scratch_.size() < needed) scratch_.resize(needed);
    T* slices = reinterpret_cast<T*>(scratch_.data());  // operator new aligns for every scalar
    fill_sizes(bytes_, offsets_, slice_bytes);
    fill_sizes(other_bytes_, other_offsets_, [&](int) { return slice.size() * Index{sizeof(T)}; });
    succeed(MPI_Alltoallv(values, bytes_.data(), offsets_.data(), MPI_BYTE, slices,
                          other_bytes_.data(), other_offsets_.data(), MPI_BYTE, own_),
            "MPI_Alltoallv");
    detail::ordered_sum<T>(
        size_, slice.size(), [&](int r) { return slices + r * slice.size(); },
        [&](Index offset, const T* sums, Index n) {
          detail::copy_elements(sums, values + slice.begin + offset, n);
        });
    gather_in_place(as_bytes(values), slice_bytes);
  }

  MpiOptions options_;
  MPI_Comm own_ = MPI_COMM_NULL;    // the duplicate
  MPI_Comm given_ = MPI_COMM_NULL;  // to be freed, where owned
  int rank_ = 0, size_ = 1;
  std::vector<detail::CollectiveCall> calls_;
  std::vector<int> bytes_, offsets_, other_bytes_, other_offsets_;  // one per rank
  std::vector<std::byte> scratch_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
