/// \file
/// CPU kernel of speculative verification: rejection sampling along a drafted chain. A row costs two numbers for each accepted
/// token and one pass over one distribution (two at a rejection) for the last.
#pragma once

#include "../core/device.h"
#include "../sampling/params.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

template <typename Draft, typename Target>
struct SpeculativeProblem {
  const std::int32_t* draft_tokens;  // (batch, drafts)
  const Draft* draft;                // (batch, drafts, vocab)
  const Target* target;              // (batch, drafts + 1, vocab)
  Index batch, drafts, vocab;
  const Index* draft_lengths;  // (batch), or nullptr: all of them
  const Philox* generators;
  Index generators_stride;
  std::int32_t* accepted;  // (batch), -1 where a distribution that was read is none
  std::int32_t* tokens;    // (batch, drafts + 1), -1 past the last

  double uniform(Index row, Index index) const {
    return generators_stride == 0 ? generators[0].uniform(static_cast<std::uint32_t>(row),
                                                          static_cast<std::uint32_t>(index))
                                  : generators[row].uniform(0, static_cast<std::uint32_t>(index));
  }
};

namespace cpu {

/// Draws from weight(token) >= 0 in token order with doubles; -1 where the weights sum to 0, -2 where they are no distribution.
template <typename Weight>
std::int32_t draw_from_weights(Index vocab, double u, Weight weight) {
  double total = 0;
  bool negative = false;
  for (Index v = 0; v < vocab; ++v) {
    const double w = weight(v);
    negative = negative || w < 0;
    total += w;
  }
  if (negative || !(total < std::numeric_limits<double>::infinity())) return -2;
  std::int32_t drawn = -1;
  double running = 0;
  for (Index v = 0; v < vocab; ++v) {
    const double w = weight(v);
    if (w == 0) continue;
    drawn = static_cast<std::int32_t>(v);
    running += w;
    if (running > u * total) break;
  }
  return drawn;
}

/// Verifies one row; returns how many drafts were accepted, -1 where what it read is no distribution.
template <typename Draft, typename Target>
Index verify_row(const SpeculativeProblem<Draft, Target>& p, Index r, std::int32_t* tokens) {
  const Index length = p.draft_lengths == nullptr ? p.drafts : p.draft_lengths[r];
  const auto target_at = [&](Index i, Index v) {
    return static_cast<double>(p.target[(r * (p.drafts + 1) + i) * p.vocab + v]);
  };
  const auto draft_at = [&](Index i, Index v) {
    return static_cast<double>(p.draft[(r * p.drafts + i) * p.vocab + v]);
  };
  Index accepted = 0;
  while (accepted < length) {
    const std::int32_t token = p.draft_tokens[r * p.drafts + accepted];
    const double target = target_at(accepted, token), draft = draft_at(accepted, token);
    if (!(target >= 0 && draft >= 0)) return -1;
    if (!(p.uniform(r, accepted) * draft < target)) break;
    tokens[accepted++] = token;
  }
  const double u = p.uniform(r, length);  // one number for the last token, wherever the chain broke
  std::int32_t last = -1;
  if (accepted < length) {
    last = draw_from_weights(p.vocab, u, [&](Index v) {
      const double excess = target_at(accepted, v) - draft_at(accepted, v);
      return excess < 0 ? 0.0 : excess;  // a NaN passes
    });
  }
  // No residual: the two distributions are one up to rounding.
  if (last == -1)
    last = draw_from_weights(p.vocab, u, [&](Index v) { return target_at(accepted, v); });
  if (last < 0) return -1;
  tokens[accepted] = last;
  return accepted;
}

template <CpuDevice D, typename Draft, typename Target>
void verify_speculative(const D& device, const SpeculativeProblem<Draft, Target>& p) {
  parallel_for(device, p.batch, 1, [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r) {
      std::int32_t* tokens = p.tokens + r * (p.drafts + 1);
      std::fill(tokens, tokens + p.drafts + 1, -1);
      const Index accepted = verify_row(p, r, tokens);
      if (accepted < 0) std::fill(tokens, tokens + p.drafts + 1, -1);
      p.accepted[r] = static_cast<std::int32_t>(accepted);
    }
  });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
