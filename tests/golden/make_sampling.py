"""Writes sampling.txt: the distribution after one chain of each system's stages, for 48 fixed logits and a fixed history.

Made with transformers 5.24.0 (its own processors, in double) and NumPy (llama.cpp's samplers, written here from its formulas: DRY, XTC,
top-n-sigma, mirostat, dynamic temperature, penalties of the last n tokens): python tests/golden/make_sampling.py > tests/golden/sampling.txt
Each line: a name, which tests/sampling/sampling_golden_test.cpp gives its parameters, and 48 probabilities.
"""
import collections
import math

import numpy as np
import torch
from transformers.generation import logits_process as hf

VOCAB = 48
LOGITS = np.array([((i * 37 + 11) % 64 - 32) / 8 for i in range(VOCAB)])
WITHOUT = np.array([((i * 29 + 5) % 64 - 32) / 16 for i in range(VOCAB)])  # of guidance
PROMPT = [5, 9, 2, 40, 5, 9, 2, 7]
HISTORY = PROMPT + [5, 9, 11, 2, 5, 9]


class Guidance(hf.UnbatchedClassifierFreeGuidanceLogitsProcessor):
    def get_unconditional_logits(self, input_ids):
        return torch.tensor(WITHOUT)[None, None]


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def write(name, logits):
    print(name, *(f"{p:.9g}" for p in softmax(np.asarray(logits, dtype=np.float64))))


def transformers(name, *processors):
    scores = torch.tensor(LOGITS)[None]
    for processor in processors:
        scores = processor(torch.tensor([HISTORY]), scores)
    write("hf_" + name, scores[0].numpy())


repetition = hf.RepetitionPenaltyLogitsProcessor(1.3)
ngrams = hf.NoRepeatNGramLogitsProcessor(3)
words = hf.NoBadWordsLogitsProcessor([[11], [9, 2], [5, 9, 40], [9, 5, 1]])
sequences = hf.SequenceBiasLogitsProcessor([[[5], -2.5], [[9, 30], 3.0], [[5, 9, 2], 1.5], [[2, 9, 17], 9.0]])
transformers("repetition", repetition)
transformers("no_repeat_ngram", ngrams)
transformers("no_repeat_unigram", hf.NoRepeatNGramLogitsProcessor(1))
transformers("bad_words", words)
transformers("sequence_bias", sequences)
transformers("min_tokens", hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 7, [19, 45], device="cpu"))
transformers("min_tokens_over", hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [19, 45], device="cpu"))
transformers("forced", hf.ForcedEOSTokenLogitsProcessor(len(HISTORY) + 1, 19, device="cpu"))
transformers("guidance", Guidance(1.75, None))
transformers("guidance_repetition", Guidance(1.75, None), repetition)
transformers("log_repetition", hf.LogitNormalization(), repetition)
transformers("top_p", hf.TopPLogitsWarper(0.35, min_tokens_to_keep=1))
transformers("top_p_keep", hf.TopPLogitsWarper(0.35, min_tokens_to_keep=9))
transformers("min_p", hf.MinPLogitsWarper(0.4))
transformers("min_p_keep", hf.MinPLogitsWarper(0.4, min_tokens_to_keep=12))
transformers("top_k_keep", hf.TopKLogitsWarper(3, min_tokens_to_keep=6))
transformers("typical", hf.TypicalLogitsWarper(0.6))
transformers("typical_keep", hf.TypicalLogitsWarper(0.1, min_tokens_to_keep=14))
transformers("epsilon", hf.EpsilonLogitsWarper(0.03))
transformers("epsilon_keep", hf.EpsilonLogitsWarper(0.9, min_tokens_to_keep=5))
transformers("eta", hf.EtaLogitsWarper(0.2))
transformers("top_h", hf.TopHLogitsWarper(0.4))
transformers("top_h_small", hf.TopHLogitsWarper(0.01))
transformers("chain", Guidance(1.25, None), sequences, repetition, ngrams, words, hf.TemperatureLogitsWarper(0.8), hf.TopHLogitsWarper(0.9),
             hf.TopKLogitsWarper(30), hf.TopPLogitsWarper(0.95), hf.MinPLogitsWarper(0.02), hf.TypicalLogitsWarper(0.9),
             hf.EpsilonLogitsWarper(0.01), hf.EtaLogitsWarper(0.02))


def keep(logits, kept):
    return np.where(kept, logits, -np.inf)


def top_k(logits, k):
    return keep(logits, np.isin(np.arange(VOCAB), np.argsort(-logits, kind="stable")[:k]))


def penalties(logits, window, repeat, frequency, presence):
    logits = logits.copy()
    for token, count in collections.Counter(HISTORY[len(HISTORY) - window:]).items():
        logits[token] = logits[token] * repeat if logits[token] <= 0 else logits[token] / repeat
        logits[token] -= count * frequency + presence
    return logits


def dry(logits, history, multiplier, base, allowed, breakers=(), window=None):
    last = history[len(history) - min(window or len(history), len(history)):]
    n = len(last)
    if n <= allowed:
        return logits
    limit = n
    for i in range(n):  # from the last token back: does a breaker begin here?
        tails = [len(b) - 1 for b in breakers if len(b) - 1 <= i and last[n - 1 - i:n - 1 - i + len(b)] == list(b)]
        if tails:
            limit = i - max(tails)
            break
    if limit < allowed:
        return logits
    longest = {}
    for i in range(n - 1):  # the repetition that ends at i, and the token that went on
        length = 0
        while length <= i and last[i - length] == last[n - 1 - length]:
            length += 1
        length = min(length, limit)
        if length >= allowed:
            longest[last[i + 1]] = max(longest.get(last[i + 1], 0), length)
    logits = logits.copy()
    for token, length in longest.items():
        if [token] not in [list(b) for b in breakers]:
            logits[token] -= multiplier * base ** min(length - allowed, int(88.7228391 / math.log(base)))
    return logits


def xtc(logits, threshold):
    order = np.argsort(-logits, kind="stable")
    choices = (softmax(logits) >= threshold).sum()
    return keep(logits, ~np.isin(np.arange(VOCAB), order[:max(choices - 1, 0)]))


def top_n_sigma(logits, n):
    finite = logits[logits > -np.inf]
    return keep(logits, logits >= finite.max() - n * finite.std())


def mirostat_1(logits, mu, m=100):
    p = np.sort(softmax(logits))[::-1]
    p = p[p > 0][:m]
    t = np.log(np.arange(2, len(p) + 1) / np.arange(1, len(p)))
    s = (t * np.log(p[:-1] / p[1:])).sum() / (t * t).sum()
    k = ((s - 1) * 2 ** mu / (1 - VOCAB ** -(s - 1))) ** (1 / s)
    return top_k(logits, max(int(k), 1))


def mirostat_2(logits, mu):
    kept = -np.log2(softmax(logits)) <= mu
    return keep(logits, kept) if kept.any() else top_k(logits, 1)


def dynamic_temperature(logits, temperature, spread, exponent):
    p = softmax(logits)
    p = p[p > 0]
    share = -(p * np.log(p)).sum() / math.log(len(p))
    low = max(temperature - spread, 0)
    return logits / (low + (temperature + spread - low) * share ** exponent)


write("llama_penalties", penalties(LOGITS, 5, 1.2, 0.3, 0.1))
write("llama_dry", dry(LOGITS, HISTORY, 0.8, 1.75, 2))
write("llama_dry_long", dry(LOGITS, PROMPT + PROMPT[:7], 0.5, 1.2, 2))
write("llama_dry_one", dry(LOGITS, HISTORY, 0.25, 3, 0))
write("llama_dry_breakers", dry(LOGITS, PROMPT + PROMPT[:7], 0.8, 1.75, 2, [[40, 5], [7]]))
write("llama_dry_breaker_token", dry(LOGITS, HISTORY, 0.8, 1.75, 1, [[2], [3, 9]]))
write("llama_dry_window", dry(LOGITS, HISTORY, 0.8, 1.75, 1, [], 8))
write("llama_xtc", xtc(LOGITS, 0.04))
write("llama_xtc_high", xtc(LOGITS, 0.3))
write("llama_top_n_sigma", top_n_sigma(LOGITS, 0.75))
write("llama_mirostat_1", mirostat_1(LOGITS, 6))
write("llama_mirostat_2", mirostat_2(LOGITS, 3.5))
write("llama_mirostat_2_best", mirostat_2(LOGITS, 1.0))
write("llama_dynatemp", dynamic_temperature(LOGITS, 0.9, 0.6, 1.3))
write("llama_chain", dynamic_temperature(
    xtc(top_k(top_n_sigma(dry(penalties(LOGITS, len(HISTORY), 1.1, 0.2, 0), HISTORY, 0.8, 1.75, 2), 2), 20), 0.08), 0.7, 0.3, 1))
