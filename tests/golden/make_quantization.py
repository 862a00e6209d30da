"""Writes quantization.txt: weights, their values in four and eight bits, scales and minimums, activations and products, by NumPy in float32.

Made with numpy 2.4: python tests/golden/make_quantization.py > tests/golden/quantization.txt
Each line: a name, its shape, its numbers (floats as hexadecimal bits). Groups are of 32 inputs, the last one short.
"""
import numpy as np

GROUP, OUT, IN, TOKENS = 32, 5, 77, 3
F = np.float32


def write(name, array):
    flat = array.reshape(-1)
    numbers = [f"{int(b):x}" for b in flat.view(np.uint32)] if array.dtype == np.float32 else [str(int(v)) for v in flat]
    print(name, *array.shape, *numbers)


def groups_of(line):
    return [line[i:i + GROUP] for i in range(0, len(line), GROUP)]


def symmetric(group, most=7):
    largest = np.abs(group).max()
    scale = F(1) if largest == 0 else F(largest / F(most))
    return np.clip(np.rint(group / scale), -most, most).astype(np.int8), scale, F(0)


def in_eight_bits(group):
    return symmetric(group, 127)


def above_minimum(group):
    low, high = group.min(), group.max()
    scale = F(F(high / F(15)) - F(low / F(15)))
    scale = F(1) if scale == 0 else scale
    return np.clip(np.rint((group - low) / scale), 0, 15).astype(np.int8), scale, low


def quantize(weights, one):
    parts = [[one(g) for g in groups_of(line)] for line in weights]
    return (np.array([np.concatenate([p[0] for p in line]) for line in parts]),
            np.array([[p[1] for p in line] for line in parts], dtype=F), np.array([[p[2] for p in line] for line in parts], dtype=F))


def fma(a, b, c):
    """Exact but for the last rounding: 24 bits by 24 bits and a sum fit long double's 64 in all but ties that do not occur here."""
    return F(np.longdouble(a) * np.longdouble(b) + np.longdouble(c))


def product(x, values, scales, minimums):
    y = np.zeros((len(x), len(values)), dtype=F)
    for t, token in enumerate(x):
        q, scale, _ = in_eight_bits(token)
        q = q.astype(np.int64)
        for o in range(len(values)):
            chain = F(0)
            for g, (xs, ws) in enumerate(zip(groups_of(q), groups_of(values[o].astype(np.int64)))):
                chain = fma(F((xs * ws).sum()), scales[o, g], chain)
                if minimums is not None:
                    chain = fma(F(xs.sum()), minimums[o, g], chain)
            y[t, o] = fma(chain, scale, F(0))
    return y


rng = np.random.default_rng(7)
weights = rng.normal(size=(OUT, IN)).astype(F)
weights[1] = np.abs(weights[1]) + F(3)  # one-sided
weights[2, :32] = 0
weights[3, 32:64] = F(-0.25)  # all equal
weights[4, 5] = F(60)  # an outlier
x = rng.normal(size=(TOKENS, IN)).astype(F)
write("weights", weights)
write("x", x)
for name, one in (("symmetric", symmetric), ("minimums", above_minimum)):
    values, scales, minimums = quantize(weights, one)
    write(name + "_values", values)
    write(name + "_scales", scales)
    if name == "minimums":
        write("minimums_minimums", minimums)
    write(name + "_y", product(x, values, scales, minimums if name == "minimums" else None))
values, scales, _ = quantize(weights, in_eight_bits)
write("groups_values", values)
write("groups_scales", scales)
write("groups_y", product(x, values, scales, None))
values, scales, _ = (np.array(part) for part in zip(*map(in_eight_bits, weights)))
write("channels_values", values)
write("channels_scales", scales.reshape(1, OUT))
y = np.zeros((TOKENS, OUT), dtype=F)
for t, token in enumerate(x):
    q, scale, _ = in_eight_bits(token)
    for o in range(OUT):
        y[t, o] = fma(F((q.astype(np.int64) * values[o]).sum()), F(scale * scales[o]), F(0))
write("channels_y", y)
