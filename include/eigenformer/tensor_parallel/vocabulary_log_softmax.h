/// \file
/// Part of tensor_parallel.h, which includes it: log-softmax of rows whose columns are divided
/// among ranks.
#pragma once

#include "../cpu/vocabulary_log_softmax.h"
#include "../log_softmax.h"
#include "block_sums.h"
#include "vocabulary_top_k.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// y = log-softmax of this rank's columns of all rows, in memory of the host.
template <CpuDevice D, typename Y, typename T, typename C>
void divided_log_softmax(const D& device, Y* y, const T* x, Index rows, Index vocab,
                         C& communicator, Workspace& workspace) {
  using S = compute_type<T>;
  if (rows == 0) return;
  Workspace::Frame frame(workspace);
  const int ranks = communicator.size(), own_rank = communicator.rank();
  const ShardRange shard = problem::shard_of(vocab, own_rank, ranks);
  T* const hi = frame.take<T>(rows);
  std::int32_t* const ids = frame.take<std::int32_t>(rows);
  double *const best = frame.take<double>(rows), *const log_sums = frame.take<double>(rows);
  divided_top_k(device, x, rows, vocab, 1, {}, hi, ids, nullptr, communicator, workspace);
  constexpr S infinity = std::numeric_limits<S>::infinity();
  bool* const has_softmax = frame.take<bool>(rows);
  for (Index r = 0; r < rows; ++r) {
    const S most = static_cast<S>(hi[r]) + S(0);  // of -0 and 0 either is the largest
    has_softmax[r] = ids[r] >= 0 && most != infinity && most != -infinity;
    best[r] = static_cast<double>(most);
    log_sums[r] = 0;
  }
  const RowsOfParts parts({vocab, ranks}, rows, 1, 2, frame);
  detail::run(device,
              problem::WeighExponentials<T>{x, rows, vocab, shard, best, has_softmax,
                                            parts.of(own_rank, 0)},
              workspace);
  parts.gather(communicator);
  const auto** const of_row = frame.take<const double*>(ranks);
  for (Index r = 0; r < rows; ++r) {
    if (!has_softmax[r]) continue;
    for (int rank = 0; rank < ranks; ++rank) of_row[rank] = parts.of(rank, r);
    detail::run(Eigen::DefaultDevice{},
                problem::JoinExponentials<S>{vocab, ranks, of_row, best[r], log_sums[r]},
                workspace);
  }
  detail::run(device,
              problem::SubtractLogSums<Y, T>{y, x, rows, shard.size(), best, log_sums, has_softmax},
              workspace);
}

}  // namespace detail

/// This rank's columns of log_softmax (log_softmax.h) of whole rows, bit for bit: x is its columns
/// shard_range(vocab, rank, world_size) of rows of `vocab` tokens, (rows, shard), and y of the same
/// shape, float, or double where x is; it may be x itself. What travels, bytes of a row that every
/// rank holds in the end: 24 for each rank (32 of double), 8 for each block of 128 tokens and for
/// each token of blocks that ranks share. Rows that have no softmax give NaN, as there. Throws
/// std::invalid_argument for shapes that differ and columns that are not the shard of `vocab`. The
/// _into form allocates nothing after the first call at a size. On a GPU x and y are its memory;
/// this rank's columns are copied to the host, and back.
///
///   auto scores = ef::vocabulary_parallel_log_softmax(logits, vocab, communicator);
template <Device D, typename Y, typename X, Communicator C>
void vocabulary_parallel_log_softmax_into(const D& device, Y&& y, const X& x, Index vocab,
                                          C& communicator,
                                          Workspace& workspace = thread_workspace()) {
  constexpr auto name = "vocabulary_parallel_log_softmax";
  const auto input = input_view<2>(x);
  auto output = output_view<2>(y);
  using T = scalar_of<decltype(input)>;
  using Out = scalar_of<decltype(output)>;
  detail::require_floating_scalars<decltype(input)>();
  static_assert(std::is_same_v<Out, float> || std::is_same_v<Out, compute_type<T>>,
                "eigenformer: log-probabilities are float, or double where x is double");
  detail::checked_size(name, "x", input);
  detail::require_same_shape(name, "y", output, "x", input);
  detail::check_shard(name, "x", input.dimension(1), vocab, communicator);
  const Index count = input.size();
  Workspace::Frame frame(workspace);
  const auto* const from = detail::on_host(device, name, input.data(), count, frame);
  Out* const to = CpuDevice<D> ? output.data() : frame.take<Out>(count);
  detail::divided_log_softmax(detail::host_device(device), to, from, input.dimension(0), vocab,
                              communicator, workspace);
  if constexpr (!CpuDevice<D>)
    memory_of(device).copy_in(output.data(), to, static_cast<std::size_t>(count) * sizeof(Out));
}
template <CpuDevice D, typename X, Communicator C>
auto vocabulary_parallel_log_softmax(const D& device, const X& x, Index vocab, C& communicator) {
  const auto input = input_view<2>(x);
  auto y = detail::make_tensor<compute_type<scalar_of<X>>, 2>("vocabulary_parallel_log_softmax",
                                                              "x", detail::sizes_of<2>(input));
  vocabulary_parallel_log_softmax_into(device, y, input, vocab, communicator);
  return y;
}
template <typename X, Communicator C>
  requires(!Device<X>)
auto vocabulary_parallel_log_softmax(const X& x, Index vocab, C& communicator) {
  return vocabulary_parallel_log_softmax(Eigen::DefaultDevice{}, x, vocab, communicator);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
