/// \file
/// CUDA graphs around a step: all kernels that a step launches start at once.
///
///   ef::StepGraph graph(device);
///   while (scheduler.next_step(plan)) {
///     graph.run([&] { model.step_into(logits, plan, pages, sequences); });
///     ef::greedy_sample_into(device, tokens, logits);   // or in the graph
///   }
///
/// Each run calls f, which is captured and launches nothing, brings the executable graph up to date
/// (cudaGraphExecUpdate; a new one where there are other kernels than last time), and launches it.
/// So f is an ordinary function, called every time with today's ids, positions, page tables and
/// sizes, and results have the bits that they have without a graph. What its operators read of the
/// host goes to the device in one copy ahead of the graph.
///
/// In f: operators on this device, with destinations. Not in f, and refused with a DeviceError,
/// since it waits for the device: results for the host (Decoder::step, prefill, decode; norms of
/// gradients), growth of an ef::KvCache (reserve before), an append to a page that a fork shares.
/// Before the first run: what is done once, such as packing weights. run waits for no launch of its
/// own: the host captures the next step while the device computes.
///
/// Errors. What f throws comes out of run: nothing is launched, stream and graph are as before.
/// DeviceError, naming StepGraph, where run is called within a capture, or CUDA cannot capture or
/// launch: what f changed on the host (lengths of a cache) then stays.
///
/// The stream is not CUDA's default one, which cannot be captured (cudaStreamCreate, then
/// Eigen::GpuStreamDevice(&stream)), and gets no work of other threads during run. Any number of
/// graphs may serve one stream; steps that alternate between two shapes best have one each. A graph
/// keeps memory for scratch and what f stages: from the third run of a size on none is allocated.
///
/// On a CPU run calls f, so that code for any device may have one.
///
/// Cost, as expected and not yet measured: for the host f, whose launches take about half as long
/// under capture, and an update of about that; the device saves some 1 us between two kernels and
/// 2 us for each copy. It pays for decode steps of small models and batches, not for long prompts.
#pragma once

#include <utility>

#include "core/dispatch.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Belongs to one thread at a time. Device and stream outlive it.
template <Device D>
class StepGraph {
 public:
  explicit StepGraph(const D& device) : step_(detail::step_graph_on(device)) {}
  explicit StepGraph(const D&& device) = delete;

  /// Launches what f() gives the device.
  template <typename F>
  void run(F&& f) {
    step_.run(f);
  }

 private:
  decltype(detail::step_graph_on(std::declval<const D&>())) step_;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
