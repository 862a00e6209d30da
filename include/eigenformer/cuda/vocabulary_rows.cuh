/// \file
/// CUDA kernel of a vocabulary whose rows are divided: what a rank answers about its shard of each,
/// one block per row. A question is a pass over the shard in L2, that of a token two; a chain of
/// top_p and a draw is 12 of them for float, each with a launch and a wait of the host, which are
/// most of its time: 20 us each are expected.
#pragma once

#include "../problem/vocabulary_rows.h"
#include "sampling/filters.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct AskRowsKernel {
  using C = compute_type<T>;
  using Asked = problem::RowAsked<C>;
  static constexpr int kThreads = kRowThreads;
  problem::AskRows<T> p;  // asked and answers on the device

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = sampling_arrays<C>(block);
    const Index size = p.shard.size();
    for (Index r = block.index(); r < p.rows; r += block.count()) {
      const Asked& asked = p.asked[r];
      double* const out = p.answers + r * p.numbers;
      for (Index i = block.thread(); i < p.numbers; i += block.size()) out[i] = 0;
      block.barrier();
      SamplingRow<T> row{p.logits + r * size, nullptr, size, asked.band, asked.inverse_temperature};
      row.band.lo_end = own_place(asked.band.lo_end);
      row.band.hi_begin = own_place(asked.band.hi_begin);
      if (asked.question == problem::RowQuestion::equals && block.thread() == 0)
        out[1] = static_cast<double>(logit_of_key(asked.prefix, C(0)));
      if (size > 0) answer(block, arrays, row, asked, out);
      block.barrier();  // the next row's scratch
    }
  }

 private:
  EIGENFORMER_DEVICE Index own_place(Index token) const {
    const Index place = token - p.shard.begin;
    return place < 0 ? 0 : place < p.shard.size() ? place : p.shard.size();
  }

  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void answer(Block& block, const Arrays& arrays, const SamplingRow<T>& row,
                                 const Asked& asked, double* out) const {
    using Question = problem::RowQuestion;
    const auto give = [&](int number, double value) {
      if (block.thread() == 0) out[number] = value;
    };
    switch (asked.question) {
      case Question::none:
        return;
      case Question::digits:
        return write_digits(block, arrays, row, asked, out);
      case Question::equals: {
        const C value = logit_of_key(asked.prefix, C(0));
        const Index count = count_tokens(block, arrays, row, [&](Index t, C x) {
          return x == value && row.band.contains(x, t);
        });
        return give(0, static_cast<double>(count));
      }
      case Question::place:
        if (asked.nth == 0) return;
        return give(0, static_cast<double>(p.shard.begin + 1 +
                                           nth_equal(block, arrays, row, asked.value, asked.nth)));
      case Question::weight:
        return give(0, sum_in_order(block, arrays.sums, row.vocab, weights_of(row)));
      case Question::token:
        if (asked.nth == 0) return;
        return write_token(block, arrays, row, asked, out);
      case Question::scores: {
        SamplingRow<T> all = row;
        all.band = {asked.given_best, std::numeric_limits<C>::lowest(), row.vocab};
        all.inverse_temperature = 1;
        write_scores(block, arrays, all, out);
        return write_scores(block, arrays, row, out + 2);
      }
      case Question::logit:
        if (asked.token < p.shard.begin || asked.token >= p.shard.end) return;
        give(0, static_cast<double>(row.at(asked.token - p.shard.begin)));
        return give(1, 1.0);
      case Question::above:
        return give(0, static_cast<double>(count_tokens(
                           block, arrays, row, [&](Index, C x) { return x > asked.value; })));
    }
  }

  /// Each thread adds to a column of its own, then 16 neighbours add a digit.
  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void write_digits(Block& block, const Arrays& arrays,
                                       const SamplingRow<T>& row, const Asked& asked,
                                       double* out) const {
    constexpr int digits = 16;
    const auto& masses = arrays.sums.numbers;  // (digits, threads)
    const Index threads = block.size();
    for (int digit = 0; digit < digits; ++digit)
      masses.store(digit * threads + block.thread(), 0.0);
    const std::uint64_t wanted = asked.prefix >> asked.shift >> 4;
    for_each_logit(block, row, [&](Index t, C x) {
      const std::uint64_t from_here = std::uint64_t{problem::order_key(x)} >> asked.shift;
      if (!row.band.contains(x, t) || from_here >> 4 != wanted) return;
      const Index at = static_cast<Index>(from_here % digits) * threads + block.thread();
      masses.store(at, masses.load(at) + (asked.counts ? 1.0 : row.weight(x)));
    });
    block.barrier();
    const int digit = block.thread() / digits, member = block.thread() % digits;
    double sum = 0;
    for (Index i = member; i < threads; i += digits) sum += masses.load(digit * threads + i);
    for (int apart = digits / 2; apart > 0; apart /= 2) sum += block.shuffle_xor(sum, apart);
    if (member == 0) out[digit] = sum;
  }

  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void write_token(Block& block, const Arrays& arrays, const SamplingRow<T>& row,
                                      const Asked& asked, double* out) const {
    const auto weights = weights_of(row);
    const auto& sums = arrays.sums;
    const double total = sum_in_order(block, sums, row.vocab, weights);
    const RunFound found = find_run(block, sums, row.vocab, asked.target, total, weights);
    const Index begin = found.run * kRun;
    constexpr Index apart = kRun / FourWeights::kCount;
    for (Index j = block.thread(); j < apart; j += block.size()) {
      const FourWeights four = weights(begin + j, apart);
      for (int k = 0; k < FourWeights::kCount; ++k)
        sums.numbers.store(j + k * apart, four.values[k]);
    }
    block.barrier();
    if (block.thread() != 0) return;
    double before = found.before, last = before;
    for (Index j = 0; j < kRun; ++j) {
      const double own = sums.numbers.load(j);
      if (own == 0) continue;
      last = before;
      before += own;
      if (!(before > asked.target)) continue;
      // 0 is the sum before the first token, without an error
      const bool is_certain =
          (last + asked.margin < asked.target || (asked.is_first && last == 0)) &&
          before > asked.target + asked.margin;
      if (is_certain) out[0] = static_cast<double>(p.shard.begin + begin + j + 1);
      return;
    }
  }

  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void write_scores(Block& block, const Arrays& arrays,
                                       const SamplingRow<T>& row, double* out) const {
    const double below = sum_in_order(block, arrays.sums, row.vocab, [&](Index t, Index apart) {
      FourWeights four = row.weights(t, apart);
      for (int k = 0; k < FourWeights::kCount; ++k)
        if (four.values[k] == 1.0) four.values[k] = 0;
      return four;
    });
    const Index ones = count_tokens(block, arrays, row, [&](Index t, C x) {
      return row.band.contains(x, t) && row.weight(x) == 1.0;
    });
    if (block.thread() != 0) return;
    out[0] = below;
    out[1] = static_cast<double>(ones);
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::AskRows<T>& p) {
  using Kernel = AskRowsKernel<T>;
  const auto count = static_cast<std::size_t>(p.rows);
  const auto [asked] = stage(on, "vocabulary", std::span(p.asked, count));
  fetch(on, "vocabulary", p.answers, p.rows * p.numbers, [&](double* answers) {
    Kernel kernel{p};
    kernel.p.asked = asked;
    kernel.p.answers = answers;
    launch_rows(on, "vocabulary", p.rows, sampling_arrays_bytes<typename Kernel::C>(), kernel);
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
