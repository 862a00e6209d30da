"""Writes attention.txt: what PyTorch (2.15 when the file was made, CPU, float64) says attention and its gradients are.

Run: python make_attention.py > attention.txt    (needs torch)
Inputs come from a formula that tests/attention/golden.cpp repeats, so only results are stored. Each line is a name and numbers.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 7, 4, 2, 6
LENGTHS = [7, 4]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def values(seed, *sizes):
    """((i * 2654435761 + seed * 40503) mod 2^32 >> 16) / 16384 - 2: exact in float, in [-2, 2)."""
    count = int(torch.tensor(sizes).prod())
    flat = [(((i * 2654435761 + seed * 40503) & 0xFFFFFFFF) >> 16) / 16384.0 - 2.0 for i in range(count)]
    return torch.tensor(flat, dtype=torch.float64).reshape(*sizes)


def inputs():
    q = values(1, BATCH, SEQ, HEADS, DIM).requires_grad_()
    k = values(2, BATCH, SEQ, KV_HEADS, DIM).requires_grad_()
    v = values(3, BATCH, SEQ, KV_HEADS, DIM).requires_grad_()
    return q, k, v, values(4, BATCH, SEQ, HEADS, DIM)


def report(name, out, tensors, grad_out, extra=()):
    valid = torch.zeros(BATCH, SEQ, 1, 1, dtype=torch.float64)
    for b, n in enumerate(LENGTHS):
        valid[b, :n] = 1
    out = torch.nan_to_num(out) * valid
    out.backward(grad_out * valid)
    results = [("out", out)] + [("grad_" + n, t.grad) for n, t in zip("qkv", tensors)] + list(extra)
    for what, tensor in results:
        tensor = tensor() if callable(tensor) else tensor
        print(f"{name}.{what}", *(f"{x:.12g}" for x in tensor.detach().flatten().tolist()))


def visible(window=None, causal=True):
    i, j = torch.arange(SEQ)[:, None], torch.arange(SEQ)[None, :]
    mask = torch.ones(SEQ, SEQ, dtype=torch.bool)
    if causal:
        mask &= j <= i
    if window:
        mask &= j > i - window
    return torch.stack([mask & (j < n) for n in LENGTHS])[:, None]


# scaled_dot_product_attention, grouped queries, padding and causal mask
q, k, v, grad_out = inputs()
out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible(), enable_gqa=True)
report("causal", out.transpose(1, 2), (q, k, v), grad_out)

# scaled_dot_product_attention, no causal mask, a scale of its own
q, k, v, grad_out = inputs()
out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible(causal=False), enable_gqa=True, scale=0.75)
report("scale", out.transpose(1, 2), (q, k, v), grad_out)

# flex_attention: softcap, then ALiBi, sliding window
q, k, v, grad_out = inputs()
lengths = torch.tensor(LENGTHS)


def score(s, b, h, i, j):
    return 3.0 * torch.tanh(s / 3.0) + SLOPES[h] * (j - i)


def mask(b, h, i, j):
    return (j <= i) & (j > i - 3) & (j < lengths[b])


repeat = HEADS // KV_HEADS
wide = [q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(repeat, 1), v.transpose(1, 2).repeat_interleave(repeat, 1)]
block_mask = create_block_mask(mask, BATCH, HEADS, SEQ, SEQ, device="cpu")
with torch.no_grad():
    flex = flex_attention(*(x.detach() for x in wide), score_mod=score, block_mask=block_mask)
# It has no backward pass on the CPU: gradients come from the same formula under autograd.
i, j = torch.arange(SEQ)[:, None], torch.arange(SEQ)[None, :]
seen = visible(window=3)
seen = seen | ~seen.any(dim=-1, keepdim=True)  # padding rows see nothing: their gradient would be NaN, and report() drops them anyway
logits = score(wide[0] @ wide[1].transpose(2, 3) / DIM**0.5, None, torch.arange(HEADS)[:, None, None], i, j)
out = torch.softmax(logits.masked_fill(~seen, float("-inf")), dim=-1) @ wide[2]
for b, n in enumerate(LENGTHS):
    assert torch.allclose(flex[b, :, :n], out[b, :, :n], atol=1e-12)
report("flex", out.transpose(1, 2), (q, k, v), grad_out)

# sinks: one more column of logits that has no value
q, k, v, grad_out = inputs()
sinks = SINKS.clone().requires_grad_()
logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(repeat, 2)) / DIM**0.5
logits = logits.masked_fill(~visible(), float("-inf"))
logits = torch.cat([logits, sinks[None, :, None, None].expand(BATCH, HEADS, SEQ, 1)], dim=-1)
out = torch.einsum("bhij,bjhd->bihd", torch.softmax(logits, dim=-1)[..., :-1], v.repeat_interleave(repeat, 2))
report("sinks", out, (q, k, v), grad_out, [("grad_sinks", lambda: sinks.grad)])

# scaled_dot_product_attention with a bias for each head and pair of positions, some of them -infinity
q, k, v, grad_out = inputs()
bias = values(5, 1, HEADS, SEQ, SEQ)
bias = bias.masked_fill(bias > 1.5, float("-inf"))
seen = visible(causal=False)
out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias.masked_fill(~seen, float("-inf")), enable_gqa=True)
report("bias", out.transpose(1, 2), (q, k, v), grad_out)
