"""Writes model.gguf, family.gguf and model.safetensors beside itself: what readers of model files are compared with.

Made with PyPI's gguf 0.19 and safetensors 0.8: python tests/golden/model_files.py
model.gguf has a value of every type in its metadata, and for each format X a tensor `X` of random blocks with a tensor `X.float`
of what gguf makes of them. model.safetensors has a tensor of each type, all with the values 1 to 6 but BOOL (0 and 1).
"""
import pathlib
import gguf
import numpy as np
import torch
from safetensors.torch import save_file

folder = pathlib.Path(__file__).parent
generator = np.random.default_rng(2026)
halves = np.array([0.0, -0.0, 6e-8, -3.1e-5, 0.01, -0.37, 1.0, 12.5, -65504.0], np.float16)
# Format: elements and bytes of a block, offsets of its halves.
blocks = {"Q8_0": (32, 34, [0]), "Q5_0": (32, 22, [0]), "Q5_1": (32, 24, [0, 2]), "Q4_0": (32, 18, [0]), "Q4_1": (32, 20, [0, 2]), "Q4_K": (256, 144, [0, 2]), "Q5_K": (256, 176, [0, 2]),
          "Q6_K": (256, 210, [208]), "MXFP4": (32, 17, [])}

writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
writer.add_uint8("uint8", 200)
writer.add_int8("int8", -100)
writer.add_uint16("uint16", 60000)
writer.add_int16("int16", -30000)
writer.add_uint32("uint32", 4000000000)
writer.add_int32("int32", -2000000000)
writer.add_float32("float32", 0.5)
writer.add_bool("bool", True)
writer.add_string("string", "grüße")
writer.add_uint64("uint64", 2**63 + 1)
writer.add_int64("int64", -2**62)
writer.add_float64("float64", 1e300)
writer.add_array("strings", ["<s>", "", "é"])
writer.add_array("floats", [1.5, -2.0])
writer.add_array("integers", [3, -4, 5])
for name, (elements, size, offsets) in blocks.items():
    kind = gguf.GGMLQuantizationType[name]
    data = generator.integers(0, 256, (3, 2, size), np.uint8)  # 3 rows of 2 blocks
    for offset in offsets:
        data[:, :, offset:offset + 2] = generator.choice(halves, (3, 2, 1)).view(np.uint8)
    rows = data.reshape(3, 2 * size)
    writer.add_tensor(name, rows, raw_dtype=kind)
    writer.add_tensor(name + ".float", gguf.dequantize(rows, kind).astype(np.float32))
numbers = np.array([[0.1, -2.5, 3e-5], [65000.0, 1.0, -0.0]], np.float32)
writer.add_tensor("F32", numbers)
writer.add_tensor("F16", numbers.astype(np.float16))
writer.add_tensor("F16.float", numbers.astype(np.float16).astype(np.float32))
bfloat = gguf.quantize(numbers, gguf.GGMLQuantizationType.BF16)
writer.add_tensor("BF16", bfloat, raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.add_tensor("BF16.float", gguf.dequantize(bfloat, gguf.GGMLQuantizationType.BF16).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

# What a family's reader asks for, and no layer: where fuzzing begins.
family = gguf.GGUFWriter(folder / "family.gguf", "gemma3")
family.add_block_count(3)
family.add_context_length(64)
family.add_embedding_length(8)
family.add_feed_forward_length(16)
family.add_head_count(2)
family.add_head_count_kv(1)
family.add_key_length(4)
family.add_layer_norm_rms_eps(1e-6)
family.add_sliding_window(4)
family.add_sliding_window_pattern([True, True, False])
family.add_rope_freq_base(1e6)
family.add_rope_scaling_type(gguf.RopeScalingType.YARN)
family.add_rope_scaling_factor(4.0)
family.add_rope_scaling_orig_ctx_len(16)
family.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
family.write_header_to_file()
family.write_kv_data_to_file()
family.write_tensors_to_file()
family.close()

values = torch.arange(1, 7).reshape(2, 3)
types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
tensors = {name: values.to(kind) for name, kind in types.items()}
tensors["BOOL"] = values % 2 == 0
tensors["scalar"] = torch.tensor(7.0)
tensors["empty"] = torch.zeros(0, 4)
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
