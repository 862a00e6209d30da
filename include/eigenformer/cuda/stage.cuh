/// \file
/// The memory that a stream brings with it: what calls send to the device, keep there between their
/// kernels, and fetch from it. Nothing is allocated once the sizes have been seen.
///
/// Host memory that a kernel reads (lengths, offsets, tables, generators) goes to the device, all
/// arrays of a call in one asynchronous copy:
///
///   const auto [lengths, slopes] = stage(on, "attention", std::span(p.lengths, n), slopes_span);
///
/// The pointers are the device's, for kernels of this call: what is staged is overwritten by the
/// kPieces-th call on the stream after it. The host's arrays may change as soon as stage returns.
/// An array of no elements gives a null pointer, and nothing at all is copied where all are empty.
///
/// In a call that is captured into a graph the copy is part of the graph: each replay brings what
/// the arrays held at capture, so that its memory is kept until the stream's is given back. Graphs
/// that are captured anew for each launch bring memory of their own (step_memory.cuh).
///
/// Scratch of the device, for what a call's kernels leave to its later ones:
///
///   with_scratch<Row, float>(on, "rms_norm_backward", {rows, n}, [&](Row* row, float* sums) {
///     launch(...);   // kernels of this stream only
///   });
///
/// Numbers that a kernel leaves for the host, into host memory. The call waits for them, so that it
/// cannot be captured:
///
///   fetch(on, "gradient_norm", p.sums, p.count, [&](double* sums) { launch(...); });
///
/// Scratch that passes from one problem to the next, for calls that are made of several: frames
/// nest, and problems in between may take scratch of their own. It is the stream's, so that work of
/// two streams never meets in it:
///
///   auto frame = scratch_frame(on);
///   T* const logits = frame.template take<T>(rows * size);   // until the frame ends
#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../core/workspace.h"
#include "launch.cuh"
#include "step_memory.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// The staging memory of one stream: pieces of pinned host memory, each with its place on the
/// device, used in turn. A piece is overwritten once its own copy is over; its place on the device
/// by the next copy, which the stream runs after the kernels that read it. Memory brings the
/// functions of the device; see CudaStaging.
template <typename Memory>
class StageRing {
 public:
  static constexpr std::size_t kPieces = 8, kLeast = 4096;

  explicit StageRing(const Memory& memory) : memory_(memory) {}
  ~StageRing() {
    for (Piece& piece : pieces_) release(piece);
    for (Piece& piece : kept_) release(piece);
    release(scratch_);
  }
  StageRing(const StageRing&) = delete;
  StageRing& operator=(const StageRing&) = delete;

  /// fill(host memory of `bytes`), and the copy under way: where it goes to on the device.
  template <typename Fill>
  const std::byte* send(const char* name, std::size_t bytes, Fill&& fill) {
    const std::lock_guard lock(mutex_);
    if (step_ != nullptr) return step_->stage(name, bytes, fill);
    const bool captured = memory_.capturing();
    Piece& piece = captured ? kept_.emplace_back() : pieces_[next_++ % kPieces];
    if (piece.under_way) memory_.wait(name, piece.copied);
    piece.under_way = false;
    grow(name, piece, bytes, true);
    fill(piece.host);
    memory_.copy(name, piece.device, piece.host, bytes);
    if (!captured) memory_.record(name, piece.copied);
    piece.under_way = !captured;
    return piece.device;
  }

  /// use(`bytes` of the device), uninitialised. Kernels of one stream run one after the other, so
  /// that all calls have the same memory; other threads that give work to the stream wait here
  /// until use returns, and so come before or after all kernels of this call.
  template <typename Use>
  void lend(const char* name, std::size_t bytes, Use&& use) {
    const std::lock_guard scratch_lock(scratch_mutex_);
    if (step_ != nullptr)
      step_->lend(bytes, use);
    else
      use(memory_.capturing() ? keep(name, bytes) : grow(name, scratch_, bytes, false));
  }

  /// f() while the stream is captured for a step graph, whose memory its calls take.
  template <typename F>
  void capture_into(StepMemory<Memory>& step, F&& f) {
    step_ = &step;
    detail::attempt_or_undo(f, [&] { step_ = nullptr; });
    step_ = nullptr;
  }

  /// Scratch of the calls that are made of several problems. While it lives other threads that give
  /// such calls to the stream wait.
  class Frame {
   public:
    Frame(StageRing& ring, const eigenformer::Memory& memory)
        : ring_(ring), lock_(ring.arena_mutex_), frame_(ring.arena(memory)) {}

    /// Uninitialised memory of the device, aligned to 64 bytes; until the frame ends, or in a call
    /// that is captured, as long as the graph may run.
    template <typename T>
    T* take(Index count) {
      if (ring_.step_ == nullptr && ring_.memory_.capturing())
        return reinterpret_cast<T*>(ring_.keep("scratch", shared_bytes<T>(count)));
      return frame_.template take<T>(count);
    }

   private:
    StageRing& ring_;
    std::unique_lock<std::recursive_mutex> lock_;
    Workspace::Frame frame_;
  };

  /// Bytes of the device into host memory, once all work of the stream is done.
  void fetch(const char* name, void* host, const std::byte* device, std::size_t bytes) const {
    refuse_capture(name);
    memory_.fetch(name, host, device, bytes);
  }

  /// Whether all work of the stream is done.
  bool finished(const char* name) const {
    refuse_capture(name);
    return memory_.finished(name);
  }

  void refuse_capture(const char* name) const {
    if (memory_.capturing())
      detail::fail<DeviceError>(std::string(name) +
                                ": cannot be captured into a graph, it waits for the device");
  }

  /// The functions of the device.
  const Memory& memory() const { return memory_; }

 private:
  struct Piece {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    std::size_t size = 0;
    typename Memory::Event copied{};
    bool under_way = false;
  };

  /// Bytes of the device for a graph.
  std::byte* keep(const char* name, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    return grow(name, kept_.emplace_back(), bytes, false);
  }

  Workspace& arena(const eigenformer::Memory& memory) {
    if (step_ != nullptr) return step_->arena();
    return arena_ ? *arena_ : arena_.emplace(memory);
  }

  /// At least so many bytes on the device, and on the host where it is asked for.
  std::byte* grow(const char* name, Piece& piece, std::size_t bytes, bool on_host) {
    if (piece.size >= bytes) return piece.device;
    release(piece);
    std::size_t size = kLeast;
    while (size < bytes) size *= 2;
    if (on_host) piece.host = memory_.allocate_host(name, size);
    piece.device = memory_.allocate_device(name, size);
    piece.size = size;
    return piece.device;
  }
  void release(Piece& piece) {
    memory_.free(piece.host, piece.device);
    piece.host = piece.device = nullptr;
    piece.size = 0;
  }

  Memory memory_;
  std::recursive_mutex arena_mutex_;  // where two are taken: this one, scratch_mutex_, mutex_
  std::mutex mutex_, scratch_mutex_;
  std::optional<Workspace> arena_;  // what frames take
  Piece scratch_;                   // no host memory
  std::array<Piece, kPieces> pieces_{};
  std::vector<Piece> kept_;             // what graphs read
  StepMemory<Memory>* step_ = nullptr;  // of the step graph that is being captured
  std::size_t next_ = 0;
};

/// The arrays on the device, in order. Each begins at a multiple of 16 bytes.
template <typename D, typename... T>
std::tuple<const T*...> stage(const Backend<D>& on, const char* name,
                              std::span<const T>... arrays) {
  static_assert((std::is_trivially_copyable_v<T> && ...));
  if constexpr (sizeof...(T) == 0) {
    return {};
  } else {
    const std::size_t total = (shared_bytes<T>(static_cast<Index>(arrays.size())) + ... + 0);
    if (total == 0) return {};
    std::size_t at = 0;
    const auto place = [&](std::size_t bytes) {
      const std::size_t begin = at;
      at += (bytes + 15) / 16 * 16;
      return begin;
    };
    const std::byte* const device = stage_ring(on).send(name, total, [&](std::byte* host) {
      const auto put = [&](auto array) {
        if (!array.empty())
          std::memcpy(host + place(array.size_bytes()), array.data(), array.size_bytes());
      };
      (put(arrays), ...);
    });
    at = 0;
    return {(arrays.empty() ? nullptr
                            : reinterpret_cast<const T*>(device + place(arrays.size_bytes())))...};
  }
}

/// use(arrays...): one of each type, of that many elements, each from a multiple of 16 bytes on.
template <typename... T, typename D, typename Use>
void with_scratch(const Backend<D>& on, const char* name, const Index (&counts)[sizeof...(T)],
                  Use&& use) {
  static_assert((std::is_trivially_copyable_v<T> && ...));
  std::size_t total = 0, i = 0;
  ((total += shared_bytes<T>(counts[i++])), ...);
  stage_ring(on).lend(name, total, [&](std::byte* device) {
    std::size_t k = 0;
    const auto next = [&]<typename A>(A*) {
      A* const array = reinterpret_cast<A*>(device);
      device += shared_bytes<A>(counts[k++]);
      return array;
    };
    std::apply(use, std::tuple<T*...>{next(static_cast<T*>(nullptr))...});
  });
}

/// host[0, count) is what the kernels that run(array) launches leave in an array of the device.
template <typename T, typename D, typename Run>
void fetch(const Backend<D>& on, const char* name, T* host, Index count, Run&& run) {
  if (count <= 0) return;
  with_scratch<T>(on, name, {count}, [&](T* array) {
    run(array);
    stage_ring(on).fetch(name, host, reinterpret_cast<const std::byte*>(array),
                         static_cast<std::size_t>(count) * sizeof(T));
  });
}

/// Whether all work of the stream is done. Cannot be captured.
template <typename D>
bool finished(const Backend<D>& on, const char* name) {
  return stage_ring(on).finished(name);
}

template <typename D>
auto scratch_frame(const Backend<D>& on) {
  auto& ring = stage_ring(on);
  return typename std::remove_reference_t<decltype(ring)>::Frame(ring, device_memory(on));
}

#if defined(EIGENFORMER_CUDA_UNIT)

/// Pinned memory and copies of the CUDA runtime, on one stream.
class CudaStaging {
 public:
  using Event = cudaEvent_t;

  explicit CudaStaging(cudaStream_t stream) : stream_(stream) {}

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream_, &status), "stage");
    return status != cudaStreamCaptureStatusNone;
  }
  std::byte* allocate_host(const char* name, std::size_t bytes) const {
    return allocated(name, [&](void** memory) { return cudaMallocHost(memory, bytes); });
  }
  std::byte* allocate_device(const char* name, std::size_t bytes) const {
    return allocated(name, [&](void** memory) { return cudaMalloc(memory, bytes); });
  }
  void free(std::byte* host, std::byte* device) const {
    if (host == nullptr && device == nullptr) return;
    cudaStreamSynchronize(stream_);  // kernels may be reading it; a piece grows a few times at most
    cudaFreeHost(host);
    cudaFree(device);
  }
  void copy(const char* name, std::byte* device, const std::byte* host, std::size_t bytes) const {
    check_cuda(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_),
               std::string(name) + ": copy of arguments");
  }
  void fetch(const char* name, void* host, const std::byte* device, std::size_t bytes) const {
    const std::string what = std::string(name) + ": copy of results";
    check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), what);
    check_cuda(cudaStreamSynchronize(stream_), what);
  }
  bool finished(const char* name) const {
    const cudaError_t status = cudaStreamQuery(stream_);
    if (status == cudaErrorNotReady) return false;
    check_cuda(status, name);
    return true;
  }
  void record(const char* name, Event& event) const {
    if (event == nullptr)
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), name);
    check_cuda(cudaEventRecord(event, stream_), name);
  }
  void wait(const char* name, Event& event) const {
    check_cuda(cudaEventSynchronize(event), std::string(name) + ": copy of arguments");
  }
  void forget(Event& event) const {
    if (event != nullptr) cudaEventDestroy(event);
  }

 private:
  /// Allocating is allowed while a stream is captured where the thread says that it means it.
  template <typename Allocate>
  std::byte* allocated(const char* name, Allocate&& allocate) const {
    void* memory = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), name);
    const cudaError_t status = allocate(&memory);
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), name);
    check_cuda(status, std::string(name) + ": memory for arguments");
    return static_cast<std::byte*>(memory);
  }

  cudaStream_t stream_;
};

/// That of a stream, made at its first call and never destroyed: a program's end is no time to call
/// the CUDA runtime.
inline StageRing<CudaStaging>& stage_ring(const Backend<Eigen::GpuDevice>& on) {
  static auto& mutex = *new std::mutex;
  static auto& rings = *new std::map<cudaStream_t, StageRing<CudaStaging>>;
  const std::lock_guard lock(mutex);
  const cudaStream_t stream = on.device.stream();
  return rings.try_emplace(stream, CudaStaging(stream)).first->second;
}

#endif

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
