// A column-parallel layer over two thread ranks against the same layer on one thread. Limits:
// decode reads the weight, prefill computes 2 * tokens * in * out. Peers: ef::linear on the device
// of the row, Eigen by hand on the whole weight. Then tokens of a divided vocabulary on two thread
// ranks, from a head of one feature, so that little but the sampling is timed; the limit reads the
// logits once, the peer gathers them and samples on each rank. Last what has shards of rows at
// hand, beside the operator on whole rows that one rank holds.
#include <eigenformer/sampling.h>
#include <eigenformer/tensor_parallel.h>

#include <functional>
#include <memory>
#include <random>
#include <thread>

#include "report/harness.h"

namespace ef = eigenformer;
using Eigen::Index;

namespace {

ef::Tensor<float, 2> random_matrix(Index rows, Index columns) {
  ef::Tensor<float, 2> matrix(rows, columns);
  const ef::Philox random{static_cast<std::uint64_t>(rows * 7919 + columns)};
  for (Index i = 0; i < matrix.size(); ++i)
    matrix.data()[i] = static_cast<float>(random.uniform(static_cast<std::uint32_t>(i))) - 0.5f;
  return matrix;
}

/// Two long-lived ranks: the other takes part whenever rank 0, on the timed thread, begins.
class TwoRanks {
 public:
  using Step = std::function<void(ef::ThreadCommunicator&)>;

  TwoRanks() {
    own_.emplace_back(group_.communicator(0));
    other_ = std::thread([this, communicator = group_.communicator(1)]() mutable {
      try {
        for (;;) {
          communicator.barrier();
          (*step_)(communicator);
          communicator.barrier();
        }
      } catch (const ef::CommunicatorError&) {
        // The group was stopped.
      }
    });
  }
  ~TwoRanks() {
    group_.stop("end of the benchmark");
    other_.join();
  }
  TwoRanks(const TwoRanks&) = delete;

  void run(const Step& step) {
    step_ = &step;
    own_.front().barrier();
    step(own_.front());
    own_.front().barrier();
  }

 private:
  ef::ThreadCommunicatorGroup group_{2};
  std::vector<ef::ThreadCommunicator> own_;
  const Step* step_ = nullptr;
  std::thread other_;
};

struct Layer {
  Layer(Index tokens, Index in, Index out)
      : x(random_matrix(tokens, in)),
        weight(random_matrix(out, in)),
        y{{tokens, out}, {tokens, out}} {}

  ef::Tensor<float, 2> x, weight;
  ef::Tensor<float, 2> y[2];  // one per rank
  TwoRanks ranks;
  const TwoRanks::Step step = [this](ef::ThreadCommunicator& communicator) {
    ef::column_parallel_linear_into(Eigen::DefaultDevice{}, y[communicator.rank()], x, weight,
                                    communicator);
  };
};

/// One row of logits: normal numbers times `scale`. Packed, for the product of one feature takes
/// longer than sampling does where it is not.
struct Head {
  Head(Index vocab, double scale) : hidden(1, 1), weight(vocab, 1), logits{{1, vocab}, {1, vocab}} {
    hidden.setConstant(1);
    ef::Philox random{7};
    std::normal_distribution<double> normal(0, scale);
    for (Index i = 0; i < vocab; ++i) weight(i, 0) = static_cast<float>(normal(random));
    packed = ef::pack_weight<float>(weight);
    ranks.run([this](ef::ThreadCommunicator& communicator) {
      shard[communicator.rank()] = ef::pack_column_shard<float>(weight, communicator);
    });
  }

  ef::Tensor<float, 2> hidden, weight;
  ef::PackedWeight<float> packed;
  ef::PackedColumnShard<float> shard[2];
  ef::Tensor<float, 2> logits[2];
  ef::Tensor<std::int32_t, 1> ids[2]{{1}, {1}};
  ef::SamplesWithLogProbabilities scored[2];
  TwoRanks ranks;
};

void add_head_row(bench::Suite& suite, const std::string& name, const std::shared_ptr<Head>& head,
                  TwoRanks::Step divided, TwoRanks::Step gathered) {
  auto& row = suite.row("vocabulary_parallel_" + name + ", 128256 tokens, 2 thread ranks",
                        bench::Limit::read_bytes(4.0 * static_cast<double>(head->weight.size())));
  row.calls.push_back(
      {"eigenformer", [=](const Eigen::DefaultDevice&) { head->ranks.run(divided); }, {}});
  row.calls.push_back(
      {"gathered logits", [=](const Eigen::DefaultDevice&) { head->ranks.run(gathered); }, {}});
}

void head_cases(bench::Suite& suite) {
  const Eigen::DefaultDevice device;
  const auto normal = std::make_shared<Head>(128256, 3), flat = std::make_shared<Head>(128256, .1);
  const auto add = [&](const std::string& name, std::shared_ptr<Head> head,
                       const ef::SamplingParams& params) {
    add_head_row(
        suite, "sample " + name, head,
        [=](ef::ThreadCommunicator& communicator) {
          ef::vocabulary_parallel_sample_into(device, head->ids[communicator.rank()], head->hidden,
                                              head->shard[communicator.rank()], communicator,
                                              params, ef::Philox{1});
        },
        [=](ef::ThreadCommunicator& communicator) {
          auto& logits = head->logits[communicator.rank()];
          ef::column_parallel_linear_into(device, logits, head->hidden,
                                          head->shard[communicator.rank()], communicator);
          ef::sample_into(device, head->ids[communicator.rank()], logits, params, ef::Philox{1});
        });
  };
  add("top-k 50, top-p .9", normal, {.top_k = 50, .top_p = .9});
  add("all tokens", normal, {});
  add("min-p .05", normal, {.min_p = .05});
  add("top-p .9 of normal * 3", normal, {.top_p = .9});
  add("top-p .9, flat", flat, {.top_p = .9});
  add_head_row(
      suite, "sample with log-probabilities and 5 best", normal,
      [=](ef::ThreadCommunicator& communicator) {
        ef::vocabulary_parallel_sample_with_log_probabilities_into(
            device, normal->scored[communicator.rank()], normal->hidden,
            normal->shard[communicator.rank()], communicator, ef::SamplingParams{}, ef::Philox{1},
            {.best = 5});
      },
      [=](ef::ThreadCommunicator& communicator) {
        auto& logits = normal->logits[communicator.rank()];
        ef::column_parallel_linear_into(device, logits, normal->hidden,
                                        normal->shard[communicator.rank()], communicator);
        ef::sample_with_log_probabilities_into(device, normal->scored[communicator.rank()], logits,
                                               ef::SamplingParams{}, ef::Philox{1}, {.best = 5});
      });
}

/// This rank's columns of x.
template <int Rank>
ef::Tensor<float, Rank> columns_of(const ef::Tensor<float, Rank>& x, int rank) {
  const ef::ShardRange own = ef::shard_range(x.dimension(Rank - 1), rank, 2);
  Eigen::array<Index, Rank> begin{}, size;
  for (int d = 0; d < Rank; ++d) size[static_cast<std::size_t>(d)] = x.dimension(d);
  begin[Rank - 1] = own.begin;
  size[Rank - 1] = own.size();
  return x.slice(begin, size);
}

constexpr Index kVocab = 128256;

/// A row of shards on two ranks beside whole rows that one holds: no gather is timed.
template <typename Whole>
void add_shard_row(bench::Suite& suite, const std::string& name, double floats_read,
                   TwoRanks& ranks, TwoRanks::Step step, const std::string& peer, Whole whole) {
  auto& row = suite.row("vocabulary_parallel_" + name + ", 128256 tokens, 2 thread ranks",
                        bench::Limit::read_bytes(4.0 * floats_read));
  row.calls.push_back(
      {"eigenformer", [&ranks, step](const Eigen::DefaultDevice&) { ranks.run(step); }, {}});
  row.peer(peer + " of whole rows", whole);
}

/// Four drafts of one row, of which the first is refused: draft and target differ little.
struct Drafts {
  Drafts() {
    ef::Philox random{9};
    for (auto* each : {&target, &draft})
      for (Index i = 0; i < each->size(); ++i)
        each->data()[i] =
            static_cast<float>((1 + random() % 7) / (4.0 * static_cast<double>(kVocab)));
    tokens.setValues({{1, 70000, 3, 4}});
    parents.setConstant(-1);
    target(0, 0, 1) = 0;
    for (int rank : {0, 1}) {
      p[rank] = columns_of(target, rank);
      q[rank] = columns_of(draft, rank);
    }
  }
  /// Of the places that drafts of a chain have.
  template <typename T>
  static ef::TensorView<const float, 3> chain(const T& x) {
    return {x.data(), 1, 4, x.dimension(2)};
  }
  ef::Tensor<std::int32_t, 2> tokens{1, 4};
  ef::Tensor<std::int32_t, 1> parents{4};
  ef::Tensor<float, 3> target{1, 5, kVocab}, draft{1, 5, kVocab};
  ef::Tensor<float, 3> p[2], q[2];
  ef::SpeculativeResult result[2];
  ef::SpeculativeTreeResult tree[2];
  TwoRanks ranks;
};

void speculative_cases(bench::Suite& suite) {
  const Eigen::DefaultDevice device;
  const auto drafts = std::make_shared<Drafts>();
  add_shard_row(
      suite, "verify_speculative 4 drafts", 2 * kVocab, drafts->ranks,
      [=](ef::ThreadCommunicator& communicator) {
        const int rank = communicator.rank();
        ef::vocabulary_parallel_verify_speculative_into(
            device, drafts->result[rank], drafts->tokens, Drafts::chain(drafts->q[rank]),
            drafts->p[rank], kVocab, communicator, ef::Philox{1});
      },
      "verify_speculative",
      [=](const auto& of_row) {
        ef::verify_speculative_into(of_row, drafts->result[0], drafts->tokens,
                                    Drafts::chain(drafts->draft), drafts->target, ef::Philox{1});
      });
  // the floor is that of one sibling refused
  add_shard_row(
      suite, "verify_speculative_tree 4 siblings", 2 * kVocab, drafts->ranks,
      [=](ef::ThreadCommunicator& communicator) {
        const int rank = communicator.rank();
        ef::vocabulary_parallel_verify_speculative_tree_into(
            device, drafts->tree[rank], drafts->tokens, drafts->parents, drafts->q[rank],
            drafts->p[rank], kVocab, communicator, ef::Philox{1});
      },
      "verify_speculative_tree",
      [=](const auto& of_row) {
        ef::verify_speculative_tree_into(of_row, drafts->tree[0], drafts->tokens, drafts->parents,
                                         drafts->draft, drafts->target, ef::Philox{1});
      });
}

void probability_cases(bench::Suite& suite) {
  const Eigen::DefaultDevice device;
  struct Probabilities {
    Head head{kVocab, 3};
    ef::Tensor<float, 2> shard[2]{columns(0), columns(1)}, whole{1, kVocab};
    ef::Tensor<float, 1> scores[2]{ef::Tensor<float, 1>(1), ef::Tensor<float, 1>(1)};
    std::vector<std::int32_t> token{70000};
    static ef::Tensor<float, 2> columns(int rank) {
      return {1, ef::shard_range(kVocab, rank, 2).size()};
    }
  };
  const auto all = std::make_shared<Probabilities>();
  const auto add = [&](const std::string& name, const ef::SamplingParams& params) {
    add_shard_row(
        suite, "sampling_probabilities " + name, kVocab, all->head.ranks,
        [=](ef::ThreadCommunicator& communicator) {
          ef::vocabulary_parallel_sampling_probabilities_into(
              device, all->shard[communicator.rank()], all->head.hidden,
              all->head.shard[communicator.rank()], communicator, params);
        },
        "linear and sampling_probabilities",
        [=](const auto& of_row) {
          auto& logits = all->head.logits[0];
          ef::linear_into(of_row, logits, all->head.hidden, all->head.packed);
          ef::sampling_probabilities_into(of_row, all->whole, logits, params);
        });
  };
  add("all tokens", {});
  add("top-p .9", {.top_p = .9});
  add_shard_row(
      suite, "log_probabilities_of", kVocab, all->head.ranks,
      [=](ef::ThreadCommunicator& communicator) {
        ef::vocabulary_parallel_log_probabilities_of_into(
            device, all->scores[communicator.rank()], all->head.hidden,
            all->head.shard[communicator.rank()], communicator, all->token);
      },
      "linear and log_probabilities_of",
      [=](const auto& of_row) {
        auto& logits = all->head.logits[0];
        ef::linear_into(of_row, logits, all->head.hidden, all->head.packed);
        ef::log_probabilities_of_into(of_row, all->scores[0], logits, all->token);
      });
}

void score_cases(bench::Suite& suite) {
  const Eigen::DefaultDevice device;
  constexpr Index k = 64, beams = 4;
  struct Rows {
    ef::Tensor<float, 2> whole = Head(kVocab, 3).weight.reshape(Eigen::array<Index, 2>{1, kVocab});
    ef::Tensor<float, 2> x[2]{columns_of(whole, 0), columns_of(whole, 1)}, y[2]{x[0], x[1]},
        all = whole;
    ef::Tensor<float, 2> values[2]{{1, k}, {1, k}};
    ef::Tensor<std::int32_t, 2> ids[2]{{1, k}, {1, k}};
    TwoRanks ranks;
  };
  const auto rows = std::make_shared<Rows>();
  add_shard_row(
      suite, "log_softmax", kVocab, rows->ranks,
      [=](ef::ThreadCommunicator& communicator) {
        const int rank = communicator.rank();
        ef::vocabulary_parallel_log_softmax_into(device, rows->y[rank], rows->x[rank], kVocab,
                                                 communicator);
      },
      "log_softmax",
      [=](const auto& of_row) { ef::log_softmax_into(of_row, rows->all, rows->whole); });
  add_shard_row(
      suite, "top_k 64", kVocab, rows->ranks,
      [=](ef::ThreadCommunicator& communicator) {
        const int rank = communicator.rank();
        ef::vocabulary_parallel_top_k_into(device, rows->values[rank], rows->ids[rank],
                                           rows->x[rank], kVocab, communicator);
      },
      "top_k",
      [=](const auto& of_row) {
        ef::top_k_into(of_row, rows->values[0], rows->ids[0], rows->whole);
      });
  struct Search {
    ef::Tensor<float, 2> whole = random_matrix(beams, kVocab);
    ef::Tensor<float, 2> x[2]{columns_of(whole, 0), columns_of(whole, 1)};
    static ef::BeamSearch search() {
      return ef::BeamSearch(1, {.beams = beams, .max_new_tokens = Index{1} << 40});
    }
    ef::BeamSearch of_rank[2]{search(), search()}, of_whole = search();
    TwoRanks ranks;
  };
  const auto search = std::make_shared<Search>();
  add_shard_row(
      suite, "beam_search_step 4 beams", beams * kVocab, search->ranks,
      [=](ef::ThreadCommunicator& communicator) {
        const int rank = communicator.rank();
        ef::vocabulary_parallel_beam_search_step(device, search->of_rank[rank], search->x[rank],
                                                 kVocab, communicator);
      },
      "beam_search step",
      [=](const auto& of_row) { search->of_whole.step(of_row, search->whole); });
}

void tensor_parallel_cases(bench::Suite& suite) {
  const Index features = 2048;
  for (Index tokens : {1, 16, 256}) {
    auto layer = std::make_shared<Layer>(tokens, features, features);
    const double weights = static_cast<double>(features * features);
    auto& row = suite.row(
        "column_parallel_linear " + std::to_string(tokens) +
            " tokens, (2048, 2048) float, 2 thread ranks",
        bench::Limit::product(2.0 * static_cast<double>(tokens) * weights, 4.0 * weights));
    row.calls.push_back(
        {"eigenformer", [=](const Eigen::DefaultDevice&) { layer->ranks.run(layer->step); }, {}});
    row.peer("ef::linear", [=](const auto& device) {
      ef::linear_into(device, layer->y[0], layer->x, layer->weight);
    });
    row.peer("Eigen by hand", [=](const auto& device) {
      const Eigen::array<Eigen::IndexPair<Index>, 1> pairs{Eigen::IndexPair<Index>(1, 1)};
      layer->y[0].device(device) = layer->x.contract(layer->weight, pairs);
    });
  }
}

}  // namespace

EIGENFORMER_BENCHMARK(tensor_parallel_cases)
EIGENFORMER_BENCHMARK(head_cases)
EIGENFORMER_BENCHMARK(speculative_cases)
EIGENFORMER_BENCHMARK(probability_cases)
EIGENFORMER_BENCHMARK(score_cases)
