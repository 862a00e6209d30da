// A column-parallel layer over two thread ranks against the same layer on one thread. Limits:
// decode reads the weight, prefill computes 2 * tokens * in * out. Peers: ef::linear on the device
// of the row, Eigen by hand on the whole weight.
#include <eigenformer/tensor_parallel.h>

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

/// The layer and two long-lived ranks: rank 1 takes part whenever rank 0, on the timed thread,
/// begins.
class Layer {
 public:
  Layer(Index tokens, Index in, Index out)
      : x(random_matrix(tokens, in)),
        weight(random_matrix(out, in)),
        y{{tokens, out}, {tokens, out}} {
    own_.emplace_back(group_.communicator(0));
    other_ = std::thread([this, communicator = group_.communicator(1)]() mutable {
      try {
        for (;;) step(communicator);
      } catch (const ef::CommunicatorError&) {
        // The group was stopped.
      }
    });
  }
  ~Layer() {
    group_.stop("end of the benchmark");
    other_.join();
  }

  void run() { step(own_.front()); }

  ef::Tensor<float, 2> x, weight;
  ef::Tensor<float, 2> y[2];  // one per rank

 private:
  void step(ef::ThreadCommunicator& communicator) {
    communicator.barrier();
    ef::column_parallel_linear_into(Eigen::DefaultDevice{}, y[communicator.rank()], x, weight,
                                    communicator);
  }

  ef::ThreadCommunicatorGroup group_{2};
  std::vector<ef::ThreadCommunicator> own_;
  std::thread other_;
};

void tensor_parallel_cases(bench::Suite& suite) {
  const Index features = 2048;
  for (Index tokens : {1, 16, 256}) {
    auto layer = std::make_shared<Layer>(tokens, features, features);
    const double weights = static_cast<double>(features * features);
    auto& row = suite.row(
        "column_parallel_linear " + std::to_string(tokens) +
            " tokens, (2048, 2048) float, 2 thread ranks",
        bench::Limit::product(2.0 * static_cast<double>(tokens) * weights, 4.0 * weights));
    row.calls.push_back({"eigenformer", [=](const Eigen::DefaultDevice&) { layer->run(); }, {}});
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
