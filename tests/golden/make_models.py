"""Golden logits of tiny models of every family, by PyPI's transformers: writes models.json beside this file.

    python3 -m venv v && v/bin/pip install torch transformers numpy && v/bin/python tests/golden/make_models.py

Weights are not stored: element i of a tensor is a function of its name and i (weight() here, in C++ in
tests/model/family_files.h), so that a model is its config.json, the names and shapes of its tensors, some ids,
the logits after each of them, and the 64 tokens that greedy decoding adds; of some also what a padded batch gives. Experts are so many that rounding to bfloat16 or INT8
changes no choice of these tokens: another expert's result would be no rounding error.
"""
import json
import pathlib

import numpy
import torch
import transformers as t

IDS = [3, 17, 5, 29, 8, 8, 21, 1, 30, 12]
BASE = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=None)


def without(*keys, **more):
    return {**{k: v for k, v in BASE.items() if k not in keys}, **more}


HALF = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": (t.LlamaConfig, without()),
    "llama_biases": (t.LlamaConfig, without(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama3": (t.LlamaConfig, without(rope_parameters=LLAMA3)),
    "llama_linear": (t.LlamaConfig, without(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "llama_yarn": (t.LlamaConfig, without(rope_parameters=YARN)),
    "llama_dynamic": (t.LlamaConfig, without(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))),
    "mistral": (t.MistralConfig, without(sliding_window=4)),
    "granite": (t.GraniteConfig, without(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0)),
    "qwen2": (t.Qwen2Config, without()),
    "qwen2_windows": (t.Qwen2Config, without(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": (t.Qwen3Config, without(head_dim=6)),
    "mixtral": (t.MixtralConfig, without(num_local_experts=3, num_experts_per_tok=2)),
    "qwen2_moe": (t.Qwen2MoeConfig, without(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=9,
                                            shared_expert_intermediate_size=11, mlp_only_layers=[1])),
    "qwen3_moe": (t.Qwen3MoeConfig, without(head_dim=6, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=9, norm_topk_prob=True,
                                            decoder_sparse_step=2)),
    "qwen3_moe_windows": (t.Qwen3MoeConfig, without(head_dim=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=9,
                                                    use_sliding_window=True, sliding_window=4)),
    "glm4_moe": (t.Glm4MoeConfig, without(head_dim=8, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=11, n_group=4, topk_group=2,
                                          n_shared_experts=2, routed_scaling_factor=1.5, use_qk_norm=True, attention_bias=True)),
    "gpt_oss": (t.GptOssConfig, without(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, swiglu_limit=1.0,
                                        rope_parameters=dict(YARN, beta_fast=32.0, beta_slow=1.0, truncate=False))),
    "gemma": (t.GemmaConfig, without(head_dim=6)),
    "gemma2": (t.Gemma2Config, without(head_dim=6, query_pre_attn_scalar=10, sliding_window=4, layer_types=SLIDING)),
    "gemma3": (t.Gemma3TextConfig, without(head_dim=6, query_pre_attn_scalar=10, sliding_window=4, layer_types=SLIDING)),
    "phi": (t.PhiConfig, without()),
    "phi_norms": (t.PhiConfig, without(qk_layernorm=True)),
    "phi3": (t.Phi3Config, without(sliding_window=4)),
    "phi4_longrope": (t.Phi3Config, without(rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, factor=4.0,
                                                                 partial_rotary_factor=0.5,
                                                                 original_max_position_embeddings=128,
                                                                 short_factor=[1.5], long_factor=[2.5]))),
    "smollm3": (t.SmolLM3Config, without(no_rope_layers=[1, 0, 1])),
    "olmo2": (t.Olmo2Config, without()),
    "starcoder2": (t.Starcoder2Config, without(sliding_window=4)),
    "stablelm": (t.StableLmConfig, without(use_qkv_bias=True, rope_parameters=HALF)),
    "stablelm_parallel": (t.StableLmConfig, without(use_parallel_residual=True, rope_parameters=HALF)),
    "stablelm_norms": (t.StableLmConfig, without(qk_layernorm=True, rope_parameters=HALF)),
    "glm": (t.GlmConfig, without(head_dim=8)),
    "glm4": (t.Glm4Config, without(head_dim=8)),
    "cohere": (t.CohereConfig, without()),
    "cohere_norms": (t.CohereConfig, without(use_qk_norm=True)),
    "cohere2": (t.Cohere2Config, without(sliding_window=4, layer_types=SLIDING)),
    "falcon": (t.FalconConfig, without("intermediate_size", "num_key_value_heads")),
    "falcon_new": (t.FalconConfig, without("intermediate_size", "num_key_value_heads", num_kv_heads=2, new_decoder_architecture=True)),
    "falcon_rw": (t.FalconConfig, without("intermediate_size", "num_key_value_heads", multi_query=False, parallel_attn=False, bias=True)),
    "falcon_alibi": (t.FalconConfig, without("intermediate_size", "num_key_value_heads", multi_query=False, parallel_attn=False, bias=True,
                                             alibi=True)),
    "gpt2": (t.GPT2Config, dict(vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None)),
    "gpt_neox": (t.GPTNeoXConfig, without("num_key_value_heads", rope_parameters=HALF)),
    "gpt_neox_sequential": (t.GPTNeoXConfig, without("num_key_value_heads", use_parallel_residual=False, rope_parameters=HALF)),
}


PADDED = ["llama", "gemma3", "gpt2", "cohere"]
ROWS = [IDS, IDS[2:8], IDS[5:8]]  # of a batch, padded with a token like others
PAD = 7


def weight(name, shape):
    """(u(name, i) - 1/2) * spread + mean, u of 24 bits: a 64-bit FNV-1a of the name, then SplitMix64 of it and i."""
    seed = 0xcbf29ce484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001b3 % 2**64
    count = int(numpy.prod(shape))
    with numpy.errstate(over="ignore"):
        z = numpy.uint64(seed) + (numpy.arange(count, dtype=numpy.uint64) + numpy.uint64(1)) * numpy.uint64(0x9e3779b97f4a7c15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xbf58476d1ce4e5b9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94d049bb133111eb)
        z = z ^ (z >> numpy.uint64(31))
    u = (z >> numpy.uint64(40)).astype(numpy.float64) / 2**24 - 0.5
    if len(shape) > 1:
        return (u * 2).astype(numpy.float32).reshape(shape)
    return (u * 0.5 + (1.0 if name.endswith("weight") else 0.0)).astype(numpy.float32)


def padded(model):
    """Logits after the last token of each row, padded on the left and on the right, and the 12 tokens that greedy decoding adds."""
    def last_logits(rows, side):
        longest = max(map(len, rows))
        fills = [longest - len(row) for row in rows]
        def beside(rows, padding):
            return torch.tensor([padding * f + row if side == "left" else row + padding * f for row, f in zip(rows, fills)])
        mask = beside([[1] * len(row) for row in rows], [0])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(beside(rows, [PAD]), attention_mask=mask, position_ids=positions).logits
        return torch.stack([logits[b, longest - 1 if side == "left" else len(row) - 1] for b, row in enumerate(rows)])
    result = {side: [[float(f"{x:.8g}") for x in row] for row in last_logits(ROWS, side).tolist()] for side in ("left", "right")}
    rows = [list(row) for row in ROWS]
    for _ in range(12):
        for row, token in zip(rows, last_logits(rows, "left").argmax(-1).tolist()):
            row.append(token)
    return dict(result, greedy=[row[len(start):] for row, start in zip(rows, ROWS)])


def weights_of(model):
    """Parameters, and the bias of a router's choice, which is a buffer."""
    return [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))]


def main():
    result = {}
    for name, (kind, arguments) in FAMILIES.items():
        config = kind(**arguments)
        config._experts_implementation = "eager"
        config._attn_implementation = attention = "sdpa" if config.to_dict().get("alibi") else "eager"  # eager adds ALiBi twice
        model = t.AutoModelForCausalLM.from_config(config).float().eval()
        tied = model.config.tie_word_embeddings
        head = {"lm_head.weight"} if tied else set()
        tensors = [(n, list(p.shape)) for n, p in weights_of(model) if n not in head]
        with torch.no_grad():
            for n, p in weights_of(model):
                p.copy_(torch.from_numpy(weight(n, list(p.shape))))
            ids = torch.tensor([IDS])
            logits = model(ids).logits[0]
            # In float: attention of a padding that sees nothing is NaN where the mask is a double's.
            batch = dict(padded=padded(model)) if name in PADDED else {}
            wide = model.double()(ids).logits[0]
            half = kind(**arguments)
            half._attn_implementation, half._experts_implementation = attention, "eager"
            rounded = t.AutoModelForCausalLM.from_config(half).bfloat16().eval()
            for n, p in weights_of(rounded):
                p.copy_(torch.from_numpy(weight(n, list(p.shape))))
            error = ((rounded(ids).logits[0].double() - wide).norm() / wide.norm()).item()
            model.float()
            text = list(IDS)
            for _ in range(64):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        own = {k: v for k, v in config.to_dict().items() if v is not None and not k.startswith(("id2label", "label2id", "_attn", "_experts", "transformers"))}
        result[name] = dict(config=own, tensors=tensors, logits=[[float(f"{x:.8g}") for x in row] for row in wide.tolist()],
                            bfloat16_error=error, greedy=text[len(IDS):], **batch)
        print(name, len(tensors), error, text[len(IDS):len(IDS) + 8], float((logits - wide).abs().max()))
    path = pathlib.Path(__file__).with_name("models.json")
    path.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in result.items()) + "\n}\n")


if __name__ == "__main__":
    main()
