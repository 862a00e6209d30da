// A column-parallel layer over two thread ranks against the same layer on one thread. Limits:
// decode reads the weight, prefill computes 2 * tokens * in * out. Peers: ef::linear on the device
// of the row, Eigen by hand on the whole weight. Then tokens of a divided vocabulary on two thread
// ranks, from a head of one feature, so that little but the sampling is timed; the limit reads the
// logits once, the peer gathers them and samples on each rank.
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

/// One row of logits: normal numbers times `scale`.
struct Head {
  Head(Index vocab, double scale) : hidden(1, 1), weight(vocab, 1), logits{{1, vocab}, {1, vocab}} {
    hidden.setConstant(1);
    ef::Philox random{7};
    std::normal_distribution<double> normal(0, scale);
    for (Index i = 0; i < vocab; ++i) weight(i, 0) = static_cast<float>(normal(random));
  }

  ef::Tensor<float, 2> hidden, weight;
  ef::Tensor<float, 2> logits[2];
  ef::Tensor<std::int32_t, 1> ids[2]{{1}, {1}};
  ef::SamplesWithLogProbabilities scored[2];
  TwoRanks ranks;
};

void add_head_row(bench::Suite& suite, const std::string& name, const std::shared_ptr<Head>& head,
                  TwoRanks::Step divided, TwoRanks::Step gathered) {
  auto& row = suite.row("vocabulary_parallel_sample " + name + ", 128256 tokens, 2 thread ranks",
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
        suite, name, head,
        [=](ef::ThreadCommunicator& communicator) {
          ef::vocabulary_parallel_sample_into(device, head->ids[communicator.rank()], head->hidden,
                                              head->weight, communicator, params, ef::Philox{1});
        },
        [=](ef::ThreadCommunicator& communicator) {
          auto& logits = head->logits[communicator.rank()];
          ef::column_parallel_linear_into(device, logits, head->hidden, head->weight, communicator);
          ef::sample_into(device, head->ids[communicator.rank()], logits, params, ef::Philox{1});
        });
  };
  add("top-k 50, top-p .9", normal, {.top_k = 50, .top_p = .9});
  add("all tokens", normal, {});
  add("min-p .05", normal, {.min_p = .05});
  add("top-p .9 of normal * 3", normal, {.top_p = .9});
  add("top-p .9, flat", flat, {.top_p = .9});
  add_head_row(
      suite, "with log-probabilities and 5 best", normal,
      [=](ef::ThreadCommunicator& communicator) {
        ef::vocabulary_parallel_sample_with_log_probabilities_into(
            device, normal->scored[communicator.rank()], normal->hidden, normal->weight,
            communicator, ef::SamplingParams{}, ef::Philox{1}, {.best = 5});
      },
      [=](ef::ThreadCommunicator& communicator) {
        auto& logits = normal->logits[communicator.rank()];
        ef::column_parallel_linear_into(device, logits, normal->hidden, normal->weight,
                                        communicator);
        ef::sample_with_log_probabilities_into(device, normal->scored[communicator.rank()], logits,
                                               ef::SamplingParams{}, ef::Philox{1}, {.best = 5});
      });
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
  head_cases(suite);
}

}  // namespace

EIGENFORMER_BENCHMARK(tensor_parallel_cases)
