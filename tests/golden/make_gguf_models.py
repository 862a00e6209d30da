"""What llama.cpp's converter makes of the tiny models of models.json: writes gguf_models.json beside this file.

    python3 tests/golden/make_gguf_models.py FOLDER_OF_LLAMA_CPP     # its Python is run where it lies; needs torch, transformers, numpy

Weights are not stored: for each model there are the metadata of its file, and for each tensor the one of the model it comes from, with
what was done: rows in another order, transposed, 1 added. Tensors that the converter computes are there with their values. `changes` are
made in the model's config.json first: what GGUF has no word for takes the value that llama.cpp expects.
"""
import json
import pathlib
import sys
import tempfile

import numpy

folder = pathlib.Path(__file__).parent
sys.path.insert(0, str(folder))
llama_cpp = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(llama_cpp / "gguf-py"))
sys.path.insert(0, str(llama_cpp))

from make_models import weight  # noqa: E402
import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import get_model_class  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

# Model of models.json (if not of the same name), architecture, changes of its configuration, metadata that the converter does not write or
# takes from other shapes than these models have.
NEOX = dict(rotary_pct=0.5)
LONG = dict(max_position_embeddings=512, original_max_position_embeddings=128,
            rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, factor=4.0, partial_rotary_factor=0.5,
                                 original_max_position_embeddings=128, short_factor=[1.5], long_factor=[2.5]))
CASES = {
    "llama": ("", "LlamaForCausalLM", {}, {}),
    "llama_fused": ("llama", "LlamaForCausalLM", {}, {}),
    "llama_biases": ("", "LlamaForCausalLM", {}, {}),
    "llama3": ("", "LlamaForCausalLM", {}, {}),
    "llama_linear": ("", "LlamaForCausalLM", {}, {}),
    "llama_yarn": ("", "LlamaForCausalLM", {}, {}),
    "mistral": ("", "MistralForCausalLM", {}, {"llama.attention.sliding_window": 4}),
    "granite": ("", "GraniteForCausalLM", {}, {}),
    "qwen2": ("", "Qwen2ForCausalLM", {}, {}),
    "qwen3": ("", "Qwen3ForCausalLM", {}, {}),
    "mixtral": ("", "MixtralForCausalLM", {}, {}),
    "qwen2_moe": ("", "Qwen2MoeForCausalLM", dict(mlp_only_layers=[]), {}),
    "qwen3_moe": ("qwen3_moe_windows", "Qwen3MoeForCausalLM", dict(use_sliding_window=False, norm_topk_prob=True), {}),
    "gpt_oss": ("", "GptOssForCausalLM", dict(swiglu_limit=7.0), {}),
    "gemma": ("", "GemmaForCausalLM", {}, {}),
    "gemma2": ("", "Gemma2ForCausalLM", dict(query_pre_attn_scalar=6), {}),
    "gemma3": ("", "Gemma3ForCausalLM", dict(query_pre_attn_scalar=6), {"gemma3.attention.sliding_window_pattern": 2}),
    "phi": ("", "PhiForCausalLM", dict(intermediate_size=24), {"phi2.feed_forward_length": 24, "phi2.attention.head_count_kv": 2}),
    "phi3": ("", "Phi3ForCausalLM", dict(original_max_position_embeddings=128), {}),
    "phi4_longrope": ("", "Phi3ForCausalLM", LONG, {}),
    "phi4_short": ("phi4_longrope", "Phi3ForCausalLM", LONG, {}),
    "smollm3": ("", "SmolLM3ForCausalLM", dict(no_rope_layers=[1, 1, 1]), {}),
    "olmo2": ("", "Olmo2ForCausalLM", {}, {}),
    "starcoder2": ("", "Starcoder2ForCausalLM", dict(sliding_window=None), {}),
    "stablelm": ("", "StableLmForCausalLM", {}, {}),
    "stablelm_parallel": ("", "StableLmForCausalLM", {}, {}),
    "glm": ("", "GlmForCausalLM", dict(rms_norm_eps=1e-5), {"chatglm.attention.key_length": 8, "chatglm.attention.value_length": 8, "chatglm.rope.dimension_count": 4}),
    "glm4": ("", "Glm4ForCausalLM", {}, {}),
    "cohere": ("", "CohereForCausalLM", {}, {}),
    "cohere2": ("", "Cohere2ForCausalLM", dict(rotary_pct=1.0), {"cohere2.attention.sliding_window_pattern": 2}),
    "falcon": ("", "FalconForCausalLM", dict(num_kv_heads=1), {}),
    "falcon_new": ("", "FalconForCausalLM", {}, {}),
    "gpt2": ("", "GPT2LMHeadModel", dict(n_ctx=128), {}),
    "gpt_neox": ("", "GPTNeoXForCausalLM", NEOX, {}),
    "gpt_neox_sequential": ("", "GPTNeoXForCausalLM", NEOX, {}),
}


def write_folder(path, config, tensors):
    (path / "config.json").write_text(json.dumps(config))
    vocabulary = {chr(65 + i): i for i in range(32)}
    (path / "tokenizer.json").write_text(json.dumps(dict(model=dict(type="BPE", vocab=vocabulary, merges=[]), added_tokens=[])))
    save_file(tensors, path / "model.safetensors")


def convert(path, architecture, changes, fuse):
    with torch.inference_mode():
        model = get_model_class(architecture)(path, gguf.LlamaFileType.ALL_F32, path / "model.gguf", eager=True, fuse_qkv=fuse)
        model.hparams.update(changes)  # transformers has put some elsewhere
        model.set_vocab = lambda: None  # tokenizers have tests of their own
        model.write()
    return gguf.GGUFReader(path / "model.gguf")


def apart(tensors):
    """Mixtral's experts as its files have them, which the converter expects."""
    result = {}
    for name, value in tensors.items():
        block = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                result[block.replace("gate_up_proj", f"{e}.w1.weight")], result[block.replace("gate_up_proj", f"{e}.w3.weight")] = numpy.split(both, 2)
        elif name.endswith("experts.down_proj"):
            result.update({block.replace("down_proj", f"{e}.w2.weight"): one for e, one in enumerate(value)})
        else:
            result[block] = value
    return {n: numpy.ascontiguousarray(v) for n, v in result.items()}


def order_of(rows, source):
    """Which row of the source each row is, or None."""
    places = {row.tobytes(): i for i, row in enumerate(source)}
    order = [places.get(row.tobytes()) for row in rows]
    return None if None in order else order


def origin(value, tensors):
    fused = [tuple(n.replace("q_proj", p) for p in ("q_proj", "k_proj", "v_proj")) for n in tensors if "q_proj" in n]
    for plus in (0, 1):
        for transposed in (False, True):
            for names in [(n,) for n in tensors] + fused:
                parts = [tensors[n] + numpy.float32(plus) for n in names]
                if transposed and parts[0].ndim < 2:
                    continue
                parts = [numpy.swapaxes(p, -1, -2) if transposed else p for p in parts]
                # Rows, or where vectors are and were taken apart, elements.
                elements = value.ndim == 1 or names[0].endswith("_bias")
                width = 1 if elements else value.shape[-1]
                if len(parts[0].shape) > 1 and parts[0].shape[-1] % width != 0 or not elements and parts[0].shape[-1] != width:
                    continue
                source = numpy.concatenate([numpy.ascontiguousarray(p).reshape(-1, width) for p in parts])
                order = order_of(value.reshape(-1, width), source)
                if order is None:
                    continue
                entry = dict(of=list(names))
                if plus:
                    entry["plus"] = 1
                if transposed:
                    entry["transposed"] = True
                if order != list(range(len(source))):
                    entry["rows"] = order
                return entry
    return dict(values=[float(x) for x in value.ravel()])


def metadata_of(reader):
    result = {}
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "tokenizer.")) or key.startswith("general.") and key != "general.architecture":
            continue
        kind = field.types[0].name.lower()
        value = field.contents()
        result[key] = [kind, field.types[-1].name.lower(), value] if kind == "array" else [kind, value]
    return result


def main():
    models = json.loads((folder / "models.json").read_text())
    result = {}
    for name, (source, architecture, changes, more) in CASES.items():
        model = models[source or name]
        config = {k: v for k, v in {**model["config"], "architectures": [architecture], **changes}.items() if v is not None}
        shapes = model["tensors"]
        if name == "qwen2_moe":  # experts in all layers, as the converter knows it
            shapes = [s for s in shapes if ".1.mlp." not in s[0]] + [[n.replace(".0.", ".1."), s] for n, s in shapes if ".0.mlp." in n]
        tensors = {n: weight(n, shape) for n, shape in shapes}
        with tempfile.TemporaryDirectory() as path:
            write_folder(pathlib.Path(path), config, apart(tensors) if name == "mixtral" else tensors)
            reader = convert(pathlib.Path(path), architecture, changes, name == "llama_fused")
            metadata = metadata_of(reader)
            for key, value in more.items():
                metadata[key] = ["uint32", value]
            converted = {t.name: [list(map(int, reversed(t.shape))), origin(numpy.array(t.data), tensors)] for t in reader.tensors}
        result[name] = dict(model=source or name, changes=changes, metadata=metadata, tensors=converted)
        if shapes is not model["tensors"]:
            result[name]["shapes"] = shapes
        if name == "phi4_short":
            result[name]["length"] = 128  # positions that are served
        print(name, len(converted), [n for n, (_, o) in converted.items() if "values" in o])
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in result.items())
    (folder / "gguf_models.json").write_text("{\n" + text + "\n}\n")


main()
