"""Writes optimizer.txt: weights after each of 5 steps of torch.optim.AdamW and SGD in double, from 7 fixed weights and gradients.

Made with torch 1.13.1: python tests/golden/optimizer.py > tests/golden/optimizer.txt
Each line: the optimizer, its options, the step, the 7 weights.
"""
import torch

CASES = [
    ("adamw", dict(lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)),
    ("adamw", dict(lr=0.1, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3)),
    ("sgd", dict(lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False)),
    ("sgd", dict(lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=False)),
    ("sgd", dict(lr=0.05, weight_decay=0.1, momentum=0.5, nesterov=True)),
]


def gradient(step):
    """Exact in float: multiples of 1/8."""
    return torch.tensor([((i * 5 + step * 3) % 17 - 8) / 8 for i in range(7)], dtype=torch.float64)


for name, options in CASES:
    weights = torch.nn.Parameter(torch.tensor([(i - 3) / 4 for i in range(7)], dtype=torch.float64))
    optimizer = torch.optim.AdamW([weights], **options) if name == "adamw" else torch.optim.SGD([weights], **options)
    for step in range(5):
        weights.grad = gradient(step)
        optimizer.step()
        if name == "adamw":
            values = [options["lr"], options["weight_decay"], *options["betas"], options["eps"]]
        else:
            values = [options["lr"], options["weight_decay"], options["momentum"], int(options["nesterov"]), 0]
        print(name, *values, step, *(f"{w:.17g}" for w in weights.tolist()))
