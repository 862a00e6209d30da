"""Writes unicode_tables.h and compatibility_tables.h into a folder. Needs unicodedata2 (PyPI).

Usage: python3 make_unicode_tables.py ../../include/eigenformer/model/tokenizer
"""
import pathlib
import sys

import unicodedata2

EVERY = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def table(name, what, numbers, kind="std::uint32_t"):
    lines, line = [], ""
    for number in numbers:
        item = f"{number},"
        if len(line) + len(item) > 100:
            lines.append(line)
            line = ""
        line += item
    body = "\n".join(lines + [line])
    return f"/// {what}\ninline constexpr {kind} {name}[] = {{\n{body}\n}};\n\n"


decompositions = []
for c in EVERY:
    parts = unicodedata2.decomposition(chr(c)).split()
    if parts and not parts[0].startswith("<") and not 0xAC00 <= c < 0xD7A4:
        decompositions.append((c, int(parts[0], 16), int(parts[1], 16) if parts[1:] else 0))
one_way = [c for c, a, b in decompositions
           if b and unicodedata2.normalize("NFC", chr(a) + chr(b)) != chr(c)]
classes = []
for c in EVERY:
    k = unicodedata2.combining(chr(c))
    if k and classes and classes[-1][1:] == [c - 1, k]:
        classes[-1][1] = c
    elif k:
        classes.append([c, c, k])
lower = []
for c in EVERY:
    to = chr(c).lower()
    if len(to) == 1 and ord(to) != c:
        shift, step = ord(to) - c, c - lower[-1][1] if lower else 0
        if lower and lower[-1][3] == shift and step in (1, 2) and lower[-1][2] in (0, step):
            lower[-1][1:3] = c, step
        else:
            lower.append([c, c, 0, shift])

single, several = [], []  # compatibility decompositions, of characters that have more than a canonical one
for c in EVERY:
    parts = [ord(x) for x in unicodedata2.normalize("NFKD", chr(c))]
    if parts != [ord(x) for x in unicodedata2.normalize("NFD", chr(c))]:
        (single if len(parts) == 1 else several).append((c, parts))
ranges, before = [], 0
for c, (to,) in single:
    step = c - ranges[-1][1] if ranges else 0
    if ranges and ranges[-1][3] == to - c and step in (1, 2) and ranges[-1][2] in (0, step):
        ranges[-1][1:3] = c, step
    else:
        ranges.append([c, c, 0, to - c])
starts = [0] + [first for first, *_ in ranges]
ranges = [n for (first, last, step, add), old in zip(ranges, starts) for n in (first - old, last - first, step, add)]
starts = [0] + [c for c, _ in several]
several = [n for (c, parts), old in zip(several, starts) for n in (c - old, len(parts), *parts)]


def write(name, *tables):
    text = f"""/// \\file
/// Tables of Unicode {unicodedata2.unidata_version}, made by
/// tests/golden/make_unicode_tables.py. Not to be edited.
#pragma once

#include <cstdint>

#include "../../core/isa.h"

// clang-format off
namespace eigenformer {{
inline namespace EIGENFORMER_ABI {{
namespace detail {{

""" + "".join(tables) + """}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
// clang-format on
"""
    (pathlib.Path(sys.argv[1]) / name).write_text(text)


write("unicode_tables.h",
      table("kDecompositions",
            "Canonical decompositions, but of Hangul: character, first part, second part (0: none).",
            [n for entry in decompositions for n in entry]),
      table("kNotComposed", "Characters of two parts that these parts do not compose to.", one_way),
      table("kCombiningClasses",
            "First and last character of a range, their combining class, where it is not 0.",
            [n for entry in classes for n in entry]),
      table("kLowercase",
            "First and last character of a range, step (1, 2; 0: one), what lower case adds.",
            [n for entry in lower for n in entry], "std::int32_t"))
write("compatibility_tables.h",
      table("kCompatibleRanges",
            "Ranges of characters that stand for one each: how far the first is from that of the range\n"
            "/// before, the last from the first, step (1, 2; 0: one), what is added.",
            ranges, "std::int32_t"),
      table("kCompatibleTexts",
            "Characters that stand for several: how far from the one before, how many, these.",
            several, "std::uint32_t"))
