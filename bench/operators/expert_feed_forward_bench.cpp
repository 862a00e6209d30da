// Experts of a layer: many small ones (8 of 32 with 2048 features and 768 hidden, as Qwen3-30B-A3B
// has them) and few large ones (2 of 8 with 2048 and 7168, half of those of Mixtral). One token,
// whose experts' weights are read once, out of DRAM: calls take turns on the experts; a batch and a
// prompt, whose products are the limit. Peer: a loop over the experts of Eigen's products by hand.
#include <eigenformer/expert_feed_forward.h>
#include <eigenformer/parallel_region.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

struct Shape {
  Index experts, k, in, hidden;
};
constexpr Shape kSmallExperts{32, 8, 2048, 768}, kLargeExperts{8, 2, 2048, 7168};

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

ef::Tensor<float, 2> random_matrix(Index rows, Index columns, unsigned seed) {
  ef::Tensor<float, 2> matrix(rows, columns);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = normal(generator);
  return matrix;
}

/// Which experts tokens go through, in turn: those of one token are others in each call.
class Routes {
 public:
  Routes(Index tokens, const Shape& shape) {
    const Index turns = tokens == 1 ? shape.experts / shape.k : 1;
    for (Index turn = 0; turn < turns; ++turn) {
      routes_.push_back(ef::expert_routing(random_matrix(tokens, shape.experts, 1), shape.k,
                                           {.normalise = true}));
      for (Index j = 0; turns > 1 && j < shape.k; ++j)
        routes_.back().ids(0, j) = static_cast<std::int32_t>(turn * shape.k + j);
    }
  }
  const ef::ExpertRoutingResult<float>& next() { return routes_[turn_++ % routes_.size()]; }
  /// Experts that one call uses.
  Index used() const {
    const auto& ids = routes_[0].ids;
    std::vector<std::int32_t> list(ids.data(), ids.data() + ids.size());
    std::sort(list.begin(), list.end());
    return std::unique(list.begin(), list.end()) - list.begin();
  }

 private:
  std::vector<ef::ExpertRoutingResult<float>> routes_;
  std::size_t turn_ = 0;
};

template <typename S>
struct Weights {
  std::vector<ef::PackedGatedWeight<S>> gate_ups;
  std::vector<ef::PackedWeight<S>> downs;
};

/// As people write it: the tokens of an expert side by side, three products, and their sum.
struct ByHand {
  std::vector<Matrix> gates, ups, downs;

  void run(Matrix& y, const ef::Tensor<float, 2>& x,
           const ef::ExpertRoutingResult<float>& routed) const {
    const Eigen::Map<const Matrix> from(x.data(), x.dimension(0), x.dimension(1));
    y.setZero(from.rows(), from.cols());
    std::vector<std::pair<Index, float>> tokens;
    for (std::size_t e = 0; e < gates.size(); ++e) {
      tokens.clear();
      for (Index t = 0; t < from.rows(); ++t)
        for (Index j = 0; j < routed.ids.dimension(1); ++j)
          if (routed.ids(t, j) == static_cast<std::int32_t>(e))
            tokens.emplace_back(t, routed.weights(t, j));
      if (tokens.empty()) continue;
      Matrix own(static_cast<Index>(tokens.size()), from.cols());
      for (Index i = 0; i < own.rows(); ++i)
        own.row(i) = from.row(tokens[static_cast<std::size_t>(i)].first);
      const Matrix gate = own * gates[e].transpose(), up = own * ups[e].transpose();
      const Matrix inner = gate.array() / (1 + (-gate.array()).exp()) * up.array();
      const Matrix result = inner * downs[e].transpose();
      for (Index i = 0; i < own.rows(); ++i)
        y.row(tokens[static_cast<std::size_t>(i)].first) +=
            tokens[static_cast<std::size_t>(i)].second * result.row(i);
    }
  }
};

template <typename T, typename S>
void cases(bench::Suite& suite, const Shape& shape, const std::string& name, bench::Peak peak,
           const ef::PackingOptions<S>& packing = {}) {
  // of a weight: of int4 by 32 with a scale and a minimum
  constexpr double bytes = std::is_same_v<S, ef::int4> ? 0.75 : sizeof(S);
  const auto w = std::make_shared<Weights<S>>();
  const auto by_hand = std::make_shared<ByHand>();
  const auto up = random_matrix(shape.hidden, shape.in, 2),
             down = random_matrix(shape.in, shape.hidden, 3);
  for (Index e = 0; e < shape.experts; ++e) {
    w->gate_ups.push_back(ef::pack_gated_weight<S>(up, up, packing));
    w->downs.push_back(ef::pack_weight<S>(down, packing));
    if constexpr (std::is_same_v<S, float>) {
      by_hand->gates.push_back(Eigen::Map<const Matrix>(up.data(), shape.hidden, shape.in));
      by_hand->ups.push_back(by_hand->gates.back());
      by_hand->downs.push_back(Eigen::Map<const Matrix>(down.data(), shape.in, shape.hidden));
    }
  }
  for (const Index tokens : {1, 16, 512}) {
    const auto wide = std::make_shared<ef::Tensor<float, 2>>(random_matrix(tokens, shape.in, 4));
    const auto x = std::make_shared<ef::Tensor<T, 2>>(wide->template cast<T>());
    const auto y = std::make_shared<ef::Tensor<T, 2>>(tokens, shape.in);
    const auto routes = std::make_shared<Routes>(tokens, shape);
    const double of_expert = 3.0 * static_cast<double>(shape.in * shape.hidden);
    const auto limit =
        bench::Limit::product(2.0 * static_cast<double>(tokens * shape.k) * of_expert,
                              static_cast<double>(routes->used()) * of_expert * bytes, peak)
            .rotating_through(static_cast<double>(shape.experts) * of_expert * bytes);
    auto& row = suite.row("expert_feed_forward " + std::to_string(tokens) + " tokens, " +
                              std::to_string(shape.k) + " of " + std::to_string(shape.experts) +
                              " of 2048 x " + std::to_string(shape.hidden) + " " + name,
                          limit);
    row.ours([=](const auto& device) {
      const ef::ParallelRegion region(device);
      const auto& routed = routes->next();
      ef::expert_feed_forward_into(device, *y, *x, routed.ids, routed.weights, w->gate_ups,
                                   w->downs, ef::Epilogue{}.silu());
    });
    if constexpr (std::is_same_v<S, float>) {
      const auto sums = std::make_shared<Matrix>();
      row.peer("Eigen by hand", [=](const auto&) { by_hand->run(*sums, *wide, routes->next()); });
    }
  }
}

void small_expert_cases(bench::Suite& suite) {
  using bench::Peak;
  cases<float, float>(suite, kSmallExperts, "float", Peak::float_fma);
  cases<ef::bfloat16, ef::bfloat16>(suite, kSmallExperts, "bfloat16", Peak::bfloat16);
  cases<float, std::int8_t>(suite, kSmallExperts, "int8", Peak::int8);
  cases<float, ef::int4>(suite, kSmallExperts, "int4 with minimums", Peak::int8,
                         {.zero_points = true});
}
void large_expert_cases(bench::Suite& suite) {
  using bench::Peak;
  cases<float, std::int8_t>(suite, kLargeExperts, "int8", Peak::int8);
  cases<float, ef::int4>(suite, kLargeExperts, "int4 with minimums", Peak::int8,
                         {.zero_points = true});
}

}  // namespace

EIGENFORMER_BENCHMARK(small_expert_cases)
EIGENFORMER_BENCHMARK(large_expert_cases)
