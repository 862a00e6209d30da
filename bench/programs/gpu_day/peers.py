# PyTorch's time for rows of gpu_rows, by the names they have there, an object of JSON per line. Prints nothing, and says why, where there
# is no PyTorch that sees a GPU.
import json
import sys

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(print(f"left out: {error}", file=sys.stderr))
if not torch.cuda.is_available():
    sys.exit(print("left out: PyTorch sees no GPU", file=sys.stderr))

bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
trash = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def report(row, call, peer="PyTorch " + torch.__version__):
    """The median of calls that each begin with a cold L2 cache, as gpu_rows times ours."""
    try:
        samples = []
        for i in range(23):
            trash.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        samples = sorted(samples[3:])
        print(json.dumps({"row": row, "peer": peer, "seconds": samples[len(samples) // 2]}), flush=True)
    except RuntimeError as error:  # a backend that refuses a shape, or no memory
        print(f"left out: {row}: {str(error).splitlines()[0]}", file=sys.stderr)


def attention():
    for tokens in (2048, 8192):
        q = torch.randn(1, 32, tokens, 128, **bf16)
        k, v = (torch.randn(1, 8, tokens, 128, **bf16) for _ in range(2))
        for peer, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                report(f"prefill {tokens} tokens, 32/8 heads, causal bfloat16", call, f"PyTorch {torch.__version__}, {peer}")
    for batch, length in ((64, 4096), (1, 32768)):
        q = torch.randn(batch, 32, 1, 128, **bf16)
        k, v = (torch.randn(batch, 8, length, 128, **bf16) for _ in range(2))
        call = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        report(f"decode {batch} x {length} keys, 32/8 heads, bfloat16 cache", call)


def products():
    weight = torch.randn(8192, 8192, **bf16)
    for tokens in (1, 16, 512, 4096):
        x = torch.randn(tokens, 8192, **bf16)
        report(f"linear {tokens} x 8192 x 8192 bfloat16", lambda: F.linear(x, weight))


def rows():
    x, weight = torch.randn(4096, 4096, **bf16), torch.randn(4096, **bf16)
    report("rms_norm 4096 x 4096 bfloat16", lambda: F.rms_norm(x, (4096,), weight))
    report("layer_norm 4096 x 4096 bfloat16", lambda: F.layer_norm(x, (4096,), weight, weight))
    residual = torch.randn_like(x)
    report("residual_add 4096 x 4096 bfloat16", lambda: x + residual)
    table, ids = torch.randn(65536, 4096, **bf16), torch.randint(65536, (4096,), device="cuda")
    report("embedding 4096 tokens x 4096 bfloat16", lambda: F.embedding(ids, table))
    logits = torch.randn(64, 128256, device="cuda")
    report("greedy_sample 64 x 128256 float", lambda: logits.argmax(-1))

    def top_k():
        values, tokens = logits.topk(50)
        tokens.gather(1, torch.multinomial(values.softmax(-1), 1))

    report("top_k_sample 50, 64 x 128256 float", top_k)
    parameter = torch.nn.Parameter(torch.randn(1 << 26, device="cuda"))
    parameter.grad = torch.randn_like(parameter)
    report("AdamW 64 Mi parameters float", torch.optim.AdamW([parameter], fused=True).step)


with torch.no_grad():
    for part in (products, attention, rows):
        part()
        torch.cuda.empty_cache()
