"""Tokenizers of every kind and what PyPI's `tokenizers` (0.23) and `sentencepiece` (0.2) make of many strings.

python3 make_tokenizers.py > tokenizers.json       small ones and some hundred strings, for the tests
python3 make_tokenizers.py FOLDER COUNT            larger ones, one file each, COUNT strings

Strings hold only characters that Unicode 3.2 has, beside those written here: what came later is a letter or
punctuation to one of the many tables involved and unassigned to another.
"""
import io
import json
import pathlib
import random
import sys
import unicodedata

import sentencepiece
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)

GPT2 = None  # ByteLevel's own
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|"
         r"'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|"
         r"'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

TEXTS = [
    "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straße, Größe, Übermut.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ça va, garçon?",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Mañana, señor?",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.", "כל בני האדם נולדו בני חורין ושווים בערכם.",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ", "Tất cả mọi người sinh ra đều được tự do.",
    "def f(x):\n    return x ** 2  # 3.14159\n\n\nfor (int i = 0; i < 10; ++i) { a[i] += b[i]; }\r\n\tif (!ok) {}",
    "I'm sure they'll say we've done it, it's HERE'S THEY'RE 2024-11-27 1234567 12 3.5e-10 $100,000",
    "😀😃👨‍👩‍👧‍👦🇫🇷👍🏽❤️‍🔥 ♥ → ≤ ∑ √ ﬁ Ⅷ ½ ² ₃ ①",
]
ALPHABETS = ["abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " \t\n\r", " ",
             "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "äöüßéèêçñåøæ", "абвгдежзийклмнопрстуфхцчшщъыьэюя",
             "αβγδεζηθικλμνξοπρστυφχψω", "人生而自由在尊严和权利上平等", "すべての人間は生まれアイウエオ", "모든인간은태어날때부터",
             "\u0300\u0301\u0308\u0323\u0327", "\u1100\u1161\u11a8\u1112\u1175\u11ab", "सभीमनुष्यों", "😀😃👍🏽❤️🔥\u200d\ufe0f",
             "\u00a0\u2003\u3000\u0085\u180e\u200b\u2028", "ſKÅΩﬁⅧ½²٣९", "▁", "\x00\x01\x7f\ufffd\ufeff"]
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|x|>", "word", "<n>", "<t>", "[MASK]"]
CONTRACTIONS = ["'s", "'T", "'re", "'VE", "'m", "'LL", "'d", "'ſ", "don't", "I'M"]


def strings(count):
    """As bytes: some are not UTF-8."""
    random.seed(7)
    every = [c for c in map(chr, range(0x110000))
             if unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    words = " ".join(TEXTS).split()
    made = ["", " ", "  ", "\n", "a", "é", "e\u0301"] + TEXTS + CONTRACTIONS + SPECIALS

    def part():
        kind = random.random()
        if kind < 0.35:
            return random.choice(words) + random.choice(["", " ", "  ", ", ", "\n"])
        if kind < 0.75:
            return "".join(random.choices(random.choice(ALPHABETS), k=random.randint(1, 8)))
        if kind < 0.85:
            return "".join(random.choices(every, k=random.randint(1, 4)))
        return random.choice(SPECIALS + CONTRACTIONS + [" ", "   ", "\n\n", " \n "])

    while len(made) < count:
        made.append("".join(part() for _ in range(random.randint(1, 12))))
    made = [text.encode() for text in made[:count]]
    for i in range(5, count, 10):  # not UTF-8 any more
        text = bytearray(made[i] + b"\xe2\x82 x")
        for _ in range(random.randint(0, 4)):
            text[random.randrange(len(text))] = random.choice([0x80, 0xBF, 0xC0, 0xE2, 0xED, 0xF0, 0xF4, 0xFF])
        made[i] = bytes(text)
    return made


def added(tokenizer):
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True, normalized=False),
                          AddedToken("word", single_word=True, normalized=False),
                          AddedToken("<n>", normalized=True)])
    tokenizer.add_special_tokens([AddedToken("<t>", rstrip=True), AddedToken("[MASK]", lstrip=True)])
    return tokenizer


def template(tokenizer, text):
    names = [name for name in text.split() if name != "$A"]
    return processors.TemplateProcessing(single=text, special_tokens=[(n, tokenizer.token_to_id(n)) for n in names])


def train(tokenizer, size, unigram=False, **more):
    texts = TEXTS * 3 + ["".join(t) for t in zip(TEXTS, TEXTS[1:])]
    if unigram:
        trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False, unk_token="<unk>", **more)
    else:
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **more)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(size, pattern, normalizer=None, steps=(), prefix_space=False, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer:
        tokenizer.normalizer = normalizer
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, *split, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pattern is None)])
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return added(tokenizer)


BYTES = [f"<0x{b:02X}>" for b in range(256)]
SPM_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(" ", 1, 0)])


def spm_bpe(size, fallback, prepend=True):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    tokenizer.decoder = SPM_DECODER
    train(tokenizer, size, special_tokens=["<unk>", "<s>", "</s>"] + (BYTES if fallback else []),
          limit_alphabet=size // 5, max_token_length=12)
    file = json.loads(tokenizer.to_str())  # bytes are tokens of the model alone
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in BYTES]
    tokenizer = added(Tokenizer.from_str(json.dumps(file)))
    tokenizer.post_processor = template(tokenizer, "<s> $A </s>")
    return tokenizer


def unigram(size, fallback, scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    train(tokenizer, size, unigram=True, special_tokens=["<unk>", "<s>"], max_piece_length=10)
    if fallback:
        model = json.loads(tokenizer.to_str())["model"]
        vocab = [tuple(v) for v in model["vocab"]] + [(b, -9.0) for b in BYTES]
        tokenizer.model = models.Unigram(vocab, model["unk_id"], True)
        tokenizer.decoder = SPM_DECODER
    added(tokenizer)
    tokenizer.post_processor = template(tokenizer, "<s> $A")
    return tokenizer


def every(size):
    gpt2 = byte_level(size, GPT2, prefix_space=True)
    llama3 = byte_level(size, LLAMA3, ignore_merges=True)
    llama3.post_processor = processors.Sequence([processors.ByteLevel(), template(llama3, "<s> $A")])
    digits = pre_tokenizers.Digits(individual_digits=True)
    yield "gpt2", gpt2
    yield "llama3", llama3
    yield "qwen2", byte_level(size, QWEN2, normalizers.NFC())
    yield "o200k", byte_level(size, O200K)
    yield "starcoder", byte_level(size, GPT2, steps=[digits])
    yield "falcon", byte_level(size, GPT2, steps=[pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits()])
    yield "spm", spm_bpe(size, True)
    yield "spm_unk", spm_bpe(size, False, prepend=False)
    yield "unigram", unigram(size, False, "always")
    yield "unigram_bytes", unigram(size, True, "first")
    patterns = [(r"\b\w+\b|\W+|\p{Han}", "isolated"), (r"^\s+|\s+$", "merged_with_next"), (r"\d+(?=(?:\d{3})*\b)", "contiguous")]
    yield "words_of_patterns", byte_level(size, r"\S", steps=[pre_tokenizers.Split(Regex(p), b) for p, b in patterns])
    words = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>"))
    words.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.Strip(),
                                             normalizers.Replace(Regex(r"\d+"), "0")])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    train(words, size, special_tokens=["<unk>"], continuing_subword_prefix="##", end_of_word_suffix="</w>")
    yield "words", added(words)
    clean = Tokenizer(models.BPE(unk_token="<unk>"))
    clean.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    clean.pre_tokenizer = pre_tokenizers.Metaspace()
    yield "nfkc", added(train(clean, size, special_tokens=["<unk>"]))
    bert = Tokenizer(models.BPE(unk_token="<unk>"))
    bert.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    yield "nfkd", added(train(bert, size, special_tokens=["<unk>"]))
    split = Tokenizer(models.Unigram([("<unk>", 0.0)] + [(c, -1.0 - i / 50) for i, c in enumerate(
        "a b c d e f , . - 1 2 3 ab de -- 12 ,b c- ea".split())], 0, False))
    split.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("-", "merged_with_previous"),
        pre_tokenizers.Split(",", "merged_with_next"), pre_tokenizers.Split(Regex("[0-9]+"), "contiguous"),
        pre_tokenizers.Split(Regex("e|(?=b)"), "removed"), pre_tokenizers.Split(Regex("[a-d]+"), "isolated", invert=True)])
    yield "split", added(split)


SENTENCEPIECE = [("bpe", True), ("unigram", True), ("unigram", False)]


def sentencepiece_model(size, kind, fallback):
    """What GGUF files of models llama (bpe) and t5 (unigram) hold, and how to encode with it."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=size, model_type=kind, byte_fallback=fallback,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        hard_vocab_limit=False, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    pieces = {"tokens": [model.id_to_piece(i) for i in ids], "scores": [float(f"{model.get_score(i):.9g}") for i in ids], "types": kinds}
    return pieces, lambda text: model.encode(text.decode("utf-8", "replace"))


def results(tokenizer, made):
    for text in made:
        ids = tokenizer.encode(text.decode("utf-8", "replace")).ids
        yield ids, tokenizer.decode(ids, skip_special_tokens=False)


def main():
    if len(sys.argv) == 3:
        folder, made = pathlib.Path(sys.argv[1]), strings(int(sys.argv[2]))
        folder.mkdir(exist_ok=True)
        (folder / "strings.txt").write_text("\n".join(text.hex() for text in made))
        for name, tokenizer in every(6000):
            (folder / f"{name}.json").write_text(tokenizer.to_str())
            lines = [" ".join(map(str, ids)) + "|" + text.encode().hex() for ids, text in results(tokenizer, made)]
            (folder / f"{name}.txt").write_text("\n".join(lines))
        for kind, fallback in SENTENCEPIECE:
            pieces, encode = sentencepiece_model(900, kind, fallback)
            lines = [encode(text) for text in made]
            (folder / f"{kind}{fallback}.pieces").write_text(json.dumps(pieces | {"ids": lines}))
        return
    # Ids of the first strings in full, of all as a sum of 32 bits each, and one sum of all decoded texts.
    made = strings(200)
    shown = [text.decode() if is_utf8(text) else [text.hex()] for text in made]
    out = {"strings": shown, "tokenizers": {}}
    for name, tokenizer in every(400):
        whole = list(results(tokenizer, made))
        out["tokenizers"][name] = {
            "file": json.loads(tokenizer.to_str()), "ids": [ids for ids, _ in whole[:8]],
            "sums": sums(ids for ids, _ in whole),
            "text_sum": fnv("\0".join(text for _, text in whole).encode())}
    out["sentencepiece"] = []
    for kind, fallback in SENTENCEPIECE:
        pieces, encode = sentencepiece_model(580, kind, fallback)
        out["sentencepiece"].append(pieces | {"kind": kind, "sums": sums(encode(text) for text in made)})
    print(json.dumps(out, ensure_ascii=False, separators=(",", ":")))


def sums(every):
    return "".join(f"{fnv(b''.join(i.to_bytes(4, 'little') for i in ids)):08x}" for ids in every)


def fnv(data):  # FNV-1a of 32 bits
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def is_utf8(data):
    try:
        return bool(data.decode()) or True
    except UnicodeDecodeError:
        return False


main()
