/// \file
/// Communicators: how ranks that share one computation exchange data.
///
///   ef::SelfCommunicator                                   one rank, no cost
///   ef::ThreadCommunicator, ef::ThreadCommunicatorGroup    ranks are threads of one process (communicator/threads.h)
///   ef::MpiCommunicator                                    ranks are MPI processes (communicator/mpi.h, with EIGENFORMER_MPI)
///   ef::NcclCommunicator                                   ranks have a GPU each (communicator/nccl.h, CUDA files, with EIGENFORMER_NCCL)
///
/// A collective is called by every rank, with the same sizes and in the same order; it returns when
/// this rank's memory may be used again (a GPU's: by later work of its stream). Elements are any
/// trivially copyable type; ranges are std::span, std::vector, std::array or any other contiguous
/// range.
///
///   all_gather(part, whole)           whole = part of rank 0, part of rank 1, ...; all parts equally long
///   all_gather(part, whole, counts)   parts of counts[0], counts[1], ... elements (Index); 0 is legal
///   all_reduce_sum(values)            values[i] = ((values[i] of rank 0 + rank 1) + rank 2) + ... on every rank. float, double,
///                                     int32, int64, bfloat16, half; the narrow ones are summed in float and rounded once,
///                                     integers wrap
///   broadcast(values, root)           values of rank root on every rank
///   barrier()                         returns when every rank has called it
///
/// Deterministic: the summation order is the order of the ranks, so every rank, run and transport
/// gives the same bits. Aliasing: part may be its own place in whole; otherwise they must not
/// overlap. Throws std::invalid_argument, before anything is sent, where this rank's arguments
/// contradict each other, and CommunicatorError where a rank has failed or ended, where ranks call
/// different collectives (the text says which), or where the transport fails. Nothing is allocated
/// after the first call at a size. A communicator serves one thread at a time. Cost for n ranks and
/// whole or values of B bytes, per rank: all_gather reads and writes B; all_reduce_sum 2 B;
/// broadcast B.
#pragma once

#include <concepts>
#include <span>

#include "communicator/collective.h"
#include "communicator/self.h"
#include "communicator/threads.h"
#if defined(EIGENFORMER_MPI)
#include "communicator/mpi.h"
#endif

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What parallel operators need of the ranks they run on; the collectives are described above. One
/// that moves the memory of a GPU too says so by a member `template <Device D> static constexpr
/// bool kReaches`.
template <typename C>
concept Communicator =
    requires(C& communicator, std::span<const float> part, std::span<float> whole,
             std::span<const Index> counts, std::span<std::int32_t> integers,
             std::span<bfloat16> narrow, int root) {
      { communicator.rank() } -> std::convertible_to<int>;
      { communicator.size() } -> std::convertible_to<int>;
      communicator.all_gather(part, whole);
      communicator.all_gather(part, whole, counts);
      communicator.all_reduce_sum(whole);
      communicator.all_reduce_sum(integers);
      communicator.all_reduce_sum(narrow);
      communicator.broadcast(whole, root);
      communicator.barrier();
    };

static_assert(Communicator<SelfCommunicator> && Communicator<ThreadCommunicator>);

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#if defined(EIGENFORMER_NCCL) && defined(EIGENFORMER_CUDA_UNIT)
#include "communicator/nccl.h"
#endif
