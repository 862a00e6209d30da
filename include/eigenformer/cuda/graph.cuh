/// \file
/// A step that is captured anew and launched at once, each time (step_graph.h is the manual):
///
///   auto step = step_graph(on);
///   step.run([&] { ... });   // calls of operators on this stream
///
/// What a device brings is an executable graph, found by the type of the backend; see CudaGraph.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "../core/error.h"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename D>
class CapturedStep {
 public:
  explicit CapturedStep(const Backend<D>& on)
      : ring_(stage_ring(on)),
        memory_(ring_.memory(), device_memory(on)),
        graph_(executable_graph(on)) {}

  template <typename F>
  void run(F&& f) {
    ring_.refuse_capture(kName);
    memory_.begin(kName);
    graph_.begin_capture(kName);
    detail::attempt_or_undo([&] { ring_.capture_into(memory_, f); },
                            [&] { graph_.abandon_capture(); });
    graph_.end_capture(kName);
    memory_.send(kName);
    graph_.launch(kName);
  }

 private:
  static constexpr const char* kName = "StepGraph";

  // a reference to the stream's; the graph goes before the memory that it reads
  decltype(stage_ring(std::declval<const Backend<D>&>())) ring_;
  StepMemory<std::remove_cvref_t<decltype(ring_.memory())>> memory_;
  decltype(executable_graph(std::declval<const Backend<D>&>())) graph_;
};

template <typename D>
CapturedStep<D> step_graph(const Backend<D>& on) {
  return CapturedStep<D>(on);
}

#if defined(EIGENFORMER_CUDA_UNIT)

/// The executable graph of the CUDA runtime, on one stream. Each capture updates it in place, which
/// the launches under way do not see; where the capture has other nodes than the last a new one
/// takes its place. One that is destroyed runs to its end.
class CudaGraph {
 public:
  explicit CudaGraph(cudaStream_t stream) : stream_(stream) {}
  ~CudaGraph() { replace(nullptr); }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  /// Relaxed: what a call allocates at its first size is no part of the graph.
  void begin_capture(const char* name) const {
    expect(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), name, "capture");
  }
  void abandon_capture() const noexcept {
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(stream_, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();  // the next launch would take it for its own
  }
  void end_capture(const char* name) {
    cudaGraph_t graph = nullptr;
    expect(cudaStreamEndCapture(stream_, &graph), name, "capture");
    cudaError_t status = cudaSuccess;
    if (!update(graph)) {
      cudaGraphExec_t executable = nullptr;
      status = cudaGraphInstantiateWithFlags(&executable, graph, 0);
      if (status == cudaSuccess) replace(executable);
    }
    cudaGraphDestroy(graph);
    expect(status, name, "instantiation of the graph");
  }
  void launch(const char* name) const {
    expect(cudaGraphLaunch(executable_, stream_), name, "launch of the graph");
  }

 private:
  static void expect(cudaError_t status, const char* name, const char* what) {
    if (status != cudaSuccess) cudaGetLastError();
    check_cuda(status, std::string(name) + ": " + what);
  }
  bool update(cudaGraph_t graph) const {
    cudaGraphExecUpdateResultInfo info{};
    if (executable_ == nullptr) return false;
    if (cudaGraphExecUpdate(executable_, graph, &info) == cudaSuccess) return true;
    cudaGetLastError();  // other nodes are no error
    return false;
  }
  void replace(cudaGraphExec_t executable) {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    executable_ = executable;
  }

  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

inline CudaGraph executable_graph(const Backend<Eigen::GpuDevice>& on) {
  return CudaGraph(on.device.stream());
}

#endif

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
