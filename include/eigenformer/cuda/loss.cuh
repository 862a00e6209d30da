/// \file
/// CUDA kernel of softmax cross-entropy: one block per row, two coalesced passes, 16
/// bytes per thread. The first takes
/// the maximum and the sum of exponentials of all classes but the target's together, each thread
/// rescaling its sum where its maximum grows (Milakov and Gimelshein, "Online normalizer
/// calculation for softmax", 2018), then in a fixed tree; the second writes the gradient. Label
/// smoothing adds a pass for the mean. Two exponentials and some 10 flops per element against two
/// reads and a write, of which a row that fits L2 beside its neighbours' saves one read: memory is
/// the limit, of which 70% and more is expected for a few rows per multiprocessor. The targets are
/// staged; the rows' losses come back, and the call waits for them.
#pragma once

#include <cmath>
#include <limits>

#include "../problem/loss.h"
#include "collectives.cuh"
#include "packs.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The largest of some numbers, and the sum of exp(x - largest) over them; -infinity and 0 of none.
/// A NaN among them makes the sum NaN.
template <typename C>
struct ExponentialSum {
  C largest, sum;

  EIGENFORMER_DEVICE void add(C x) {
    if (x > largest) {
      sum = sum * std::exp(largest - x) + C(1);
      largest = x;
    } else if (x != -std::numeric_limits<C>::infinity()) {
      sum += std::exp(x - largest);
    }
  }
  /// The sum, from a number that is no less than the largest.
  EIGENFORMER_DEVICE C from(C maximum) const {
    return largest == -std::numeric_limits<C>::infinity() ? sum : sum * std::exp(largest - maximum);
  }
  EIGENFORMER_DEVICE friend ExponentialSum operator+(const ExponentialSum& a,
                                                     const ExponentialSum& b) {
    const C maximum = Larger{}(a.largest, b.largest);
    return {maximum, a.from(maximum) + b.from(maximum)};
  }
};

template <typename L, typename G>
struct CrossEntropyKernel {
  using C = compute_type<L>;
  static constexpr int kThreads = kRowThreads, kWarps = kThreads / kWarp;
  problem::CrossEntropy<L, G> p;
  const Index* targets;  // those of p, on the device
  double* row_loss;

  static constexpr std::size_t shared() {
    return shared_bytes<ExponentialSum<C>>(kWarps) + shared_bytes<double>(kWarps);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto scratch = block.template shared<ExponentialSum<C>>(kWarps);
    const auto means = block.template shared<double>(kWarps);
    for (Index row = block.index(); row < p.rows; row += block.count()) {
      const Index target = targets[row];
      if (target != p.ignore_index) {
        work_on(block, scratch, means, row, target);
        continue;
      }
      if (block.thread() == 0) row_loss[row] = 0;
      if (p.gradient == nullptr) continue;
      for (Index k = block.thread(); k < p.classes; k += block.size())
        p.gradient[row * p.classes + k] = static_cast<G>(C(0));
    }
  }

 private:
  /// What is known of a row, as in cpu/loss.h.
  struct Row {
    C maximum, sum;  // of all logits; of exp(x - maximum)
    double others;   // the sum without the target
    bool sure;       // the target holds most of the mass: 1 - p comes from the others
    double log_sum_exp;
  };

  // Every thread has read the target's logit before the barriers of the first pass, and so before
  // a gradient takes the place of the logits.
  template <typename Block, typename Scratch, typename Means>
  EIGENFORMER_DEVICE void work_on(Block& block, const Scratch& scratch, const Means& means,
                                  Index row, Index target) const {
    const L* logits = p.logits + row * p.classes;
    const C target_logit = static_cast<C>(logits[target]);
    ExponentialSum<C> part{-std::numeric_limits<C>::infinity(), C(0)};
    for_each_pack_of_line(
        block, p.classes,
        [&]<int N>(WidthOf<N>, Index k) {
          const auto x = load_pack<C, N>(logits + k);
          for (int i = 0; i < N; ++i)
            if (k + i != target) part.add(x[i]);
        },
        logits);
    const ExponentialSum<C> rest = reduce_block(block, scratch, part, Add{});

    Row found;
    found.maximum = LargerOrNan{}(rest.largest, target_logit);
    found.others = static_cast<double>(rest.from(found.maximum));
    found.sum = std::isfinite(found.maximum)
                    ? static_cast<C>(found.others) + std::exp(target_logit - found.maximum)
                    : std::numeric_limits<C>::quiet_NaN();
    found.sure = found.sum < 2 && target_logit == found.maximum;
    const double log_sum =
        found.sure ? std::log1p(found.others) : std::log(static_cast<double>(found.sum));
    found.log_sum_exp = static_cast<double>(found.maximum) + log_sum;
    const double below =
        p.label_smoothing > 0 ? mean_below(block, means, logits, found.maximum) : 0.0;
    if (block.thread() == 0)
      row_loss[row] = loss_of(found, log_sum, static_cast<double>(target_logit), below);
    if (p.gradient != nullptr)
      write_gradient(block, found, target_logit, logits, p.gradient + row * p.classes, target);
  }

  /// Mean of maximum - x; where the sum overflows the mean may not: then divided first.
  template <typename Block, typename Means>
  EIGENFORMER_DEVICE double mean_below(Block& block, const Means& means, const L* logits,
                                       C maximum) const {
    const double n = static_cast<double>(p.classes), from = static_cast<double>(maximum);
    double sum = 0;
    for (Index k = block.thread(); k < p.classes; k += block.size())
      sum += from - static_cast<double>(logits[k]);
    sum = reduce_block(block, means, sum, Add{});
    if (std::isfinite(sum)) return sum / n;  // all threads of the block, or none
    double mean = 0;
    for (Index k = block.thread(); k < p.classes; k += block.size())
      mean += from / n - static_cast<double>(logits[k]) / n;
    return reduce_block(block, means, mean, Add{});
  }

  EIGENFORMER_DEVICE double loss_of(const Row& row, double log_sum, double target_logit,
                                    double below) const {
    double loss = log_sum;  // each term from the maximum: its own size cancels
    if (p.label_smoothing < 1)
      loss += (1.0 - p.label_smoothing) * (static_cast<double>(row.maximum) - target_logit);
    if (p.label_smoothing > 0) loss += p.label_smoothing * below;
    if (p.z_loss > 0) loss += p.z_loss * row.log_sum_exp * row.log_sum_exp;
    return loss;
  }

  template <typename Block>
  EIGENFORMER_DEVICE void write_gradient(Block& block, const Row& row, C target_logit,
                                         const L* logits, G* gradient, Index target) const {
    const double per_class = p.label_smoothing / static_cast<double>(p.classes);
    const double z_factor = p.z_loss > 0 ? 1.0 + 2.0 * p.z_loss * row.log_sum_exp : 1.0;
    const double sum = static_cast<double>(row.sum);
    const C factor = static_cast<C>(z_factor * p.gradient_scale / sum);
    const C offset = static_cast<C>(-per_class * p.gradient_scale);
    const bool finite = std::isfinite(factor);  // else 0 * infinity where a class has no mass
    const auto in_double = [&](C x) {
      const double e = std::exp(static_cast<double>(x) - static_cast<double>(row.maximum));
      return z_factor * e / sum - per_class;
    };
    const auto at_target = [&] {
      const double kept = p.label_smoothing - per_class;
      return row.sure ? z_factor - 1.0 + kept - z_factor * row.others / (1.0 + row.others)
                      : in_double(target_logit) + p.label_smoothing - 1.0;
    };
    for_each_pack_of_line(
        block, p.classes,
        [&]<int N>(WidthOf<N>, Index k) {
          auto x = load_pack<C, N>(logits + k);
          for (int i = 0; i < N; ++i)
            x[i] = k + i == target ? static_cast<C>(at_target() * p.gradient_scale)
                   : finite        ? std::fma(std::exp(x[i] - row.maximum), factor, offset)
                                   : static_cast<C>(in_double(x[i]) * p.gradient_scale);
          store_pack<N>(x, gradient + k);
        },
        logits, static_cast<const G*>(gradient));
  }
};

template <typename D, typename L, typename G>
void execute(const Backend<D>& on, const problem::CrossEntropy<L, G>& p) {
  using Kernel = CrossEntropyKernel<L, G>;
  fetch(on, "cross_entropy", p.row_loss, p.rows, [&](double* row_loss) {
    const auto [targets] =
        stage(on, "cross_entropy", std::span(p.targets, static_cast<std::size_t>(p.rows)));
    launch_rows(on, "cross_entropy", p.rows, Kernel::shared(), Kernel{p, targets, row_loss});
  });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
