/// \file
/// The memory of a graph that is captured anew for each launch (graph.cuh). No graph reads what an
/// earlier capture staged, so that each capture has the memory of the one before:
///
/// Host memory that its kernels read is gathered while the graph is captured, and goes to the
/// device in one copy ahead of the graph, which then holds kernels alone. Scratch is shared by all
/// calls of the graph, as by those of a stream: they run one after the other. What turns out too
/// small during a capture is followed by more, since kernels captured already have its address; the
/// next capture begins with one piece that is large enough.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

#include "../core/workspace.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Staging brings the functions of the device, as for a StageRing. `memory` is the device's.
template <typename Staging>
class StepMemory {
 public:
  static constexpr std::size_t kLeast = 16384, kAlignment = 64;

  StepMemory(const Staging& staging, const Memory& memory)
      : staging_(staging), scratch_(memory), arena_(memory) {}
  ~StepMemory() {
    release();
    staging_.forget(copied_);
  }
  StepMemory(const StepMemory&) = delete;
  StepMemory& operator=(const StepMemory&) = delete;

  /// A capture begins. Waits until the copy for the last launch has read the host's memory: the
  /// stream has then begun that launch, so that this capture goes on beside it.
  void begin(const char* name) {
    if (under_way_) staging_.wait(name, copied_);
    under_way_ = false;
    open(scratch_, scratch_frame_);
    open(arena_, arena_frame_);
    if (pieces_.size() > 1) {
      std::size_t total = 0;
      for (const Piece& piece : pieces_) total += piece.size;
      release();
      add(name, total);
    }
    for (Piece& piece : pieces_) piece.used = 0;
  }

  /// fill(host memory of `bytes`), and where the graph finds them on the device.
  template <typename Fill>
  const std::byte* stage(const char* name, std::size_t bytes, Fill&& fill) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (pieces_.empty() || pieces_.back().size - pieces_.back().used < bytes)
      add(name, (std::max)({bytes, kLeast, pieces_.empty() ? 0 : 2 * pieces_.back().size}));
    Piece& piece = pieces_.back();
    const std::size_t at = piece.used;
    piece.used += bytes;
    fill(piece.host + at);
    return piece.device + at;
  }

  /// use(`bytes` of the device), which the graph's next call has as well.
  template <typename Use>
  void lend(std::size_t bytes, Use&& use) {
    Workspace::Frame frame(scratch_);
    use(frame.template take<std::byte>(static_cast<Index>(bytes)));
  }

  /// What frames take.
  Workspace& arena() { return arena_; }

  /// The copy of all that was staged, ahead of the launch.
  void send(const char* name) {
    for (Piece& piece : pieces_)
      if (piece.used > 0) staging_.copy(name, piece.device, piece.host, piece.used);
    staging_.record(name, copied_);
    under_way_ = true;
  }

 private:
  struct Piece {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    std::size_t size = 0, used = 0;
  };

  /// A frame around a whole capture: inner ones give their memory to each other, and none of it
  /// back to the device.
  static void open(Workspace& workspace, std::optional<Workspace::Frame>& frame) {
    frame.reset();
    frame.emplace(workspace);
  }
  void add(const char* name, std::size_t bytes) {
    Piece& piece = pieces_.emplace_back();
    piece.host = staging_.allocate_host(name, bytes);
    piece.device = staging_.allocate_device(name, bytes);
    piece.size = bytes;
  }
  void release() {
    for (const Piece& piece : pieces_) staging_.free(piece.host, piece.device);
    pieces_.clear();
  }

  Staging staging_;
  Workspace scratch_, arena_;
  std::optional<Workspace::Frame> scratch_frame_, arena_frame_;
  std::vector<Piece> pieces_;
  typename Staging::Event copied_{};
  bool under_way_ = false;
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
