/// \file
/// Continuous batching as the notebook means it, in vectors and linear searches: what the tests and a doubting user compare with.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/error.h"
#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

struct ContinuousBatchScheduler {
  struct Request {
    std::string id;
    std::vector<std::int32_t> tokens;
  };
  Index max_batch_size, max_seq_length;
  std::vector<Request> active, waiting, finished;

  static Index position(const std::vector<Request>& list, const std::string& id) {
    for (std::size_t i = 0; i < list.size(); ++i)
      if (list[i].id == id) return static_cast<Index>(i);
    return -1;
  }
  bool known(const std::string& id) const {
    return position(active, id) + position(waiting, id) + position(finished, id) > -3;
  }
  bool can_add_more_requests() const { return static_cast<Index>(active.size()) < max_batch_size; }

  void add_request(const std::string& id, const std::vector<std::int32_t>& prompt) {
    if (known(id) || prompt.empty() || static_cast<Index>(prompt.size()) >= max_seq_length)
      detail::fail<std::invalid_argument>(id);
    (can_add_more_requests() ? active : waiting).push_back({id, prompt});
  }

  void update_batch(const std::string& id, std::int32_t token, bool is_finished) {
    if (!known(id)) detail::fail<std::out_of_range>(id);
    const Index at = position(active, id);
    if (at < 0) detail::fail<std::invalid_argument>(id);
    Request& request = active[static_cast<std::size_t>(at)];
    request.tokens.push_back(token);
    if (!is_finished && static_cast<Index>(request.tokens.size()) < max_seq_length) return;
    finished.push_back(request);
    if (waiting.empty()) {
      active.erase(active.begin() + at);
    } else {
      request = waiting.front();
      waiting.erase(waiting.begin());
    }
  }

  std::vector<std::int32_t> take_finished(const std::string& id) {
    if (!known(id)) detail::fail<std::out_of_range>(id);
    const Index at = position(finished, id);
    if (at < 0) detail::fail<std::invalid_argument>(id);
    const auto tokens = finished[static_cast<std::size_t>(at)].tokens;
    finished.erase(finished.begin() + at);
    return tokens;
  }
};

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
