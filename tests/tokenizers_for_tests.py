"""Tokenizers of every kind: small ones made here, and two real ones where the packages that hold them are installed.

Nothing is downloaded. The small ones are trained on the text below, which takes milliseconds and gives the same merges
every time; the real ones are read from the files of mistral-common and llama-models, without importing either.
"""

import base64
import functools
import importlib.util
import struct
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROSE = """
The river rose in the night, and in the morning the lower fields were under water. We carried what we could to the barn.
Nobody had believed the forecast; it is unbelievable how seldom one does. By noon the water was falling again.
Der Fluss stieg über Nacht, und am Morgen standen die unteren Felder unter Wasser. Naïve façade, déjà vu, Ærø, año.
Вода поднялась ночью. 河水在夜里上涨了。 川の水は夜のうちに増えた。 강물이 밤새 불어났다. 🌊🌊 🙂
"""
CODE = """
def rise(level, hours=12):
    for hour in range(hours):
        if level[hour] > 3.75:  # metres
            return {"hour": hour, "level": level[hour]}
    return None

    \tx = [0, 1, 2, 3, 10, 100, 1000]
"""
STRESS = (  # what tokenizers lose, join, split or take for something else
    "",
    " ",
    "plain words, and a number: 1234567",
    "  two spaces in front, three behind   ",
    "\ttabs\t\tand\n\n\nnew lines\r\nof both kinds\r",
    "    def f(x):\n\treturn x[1:]  # code\n",
    "\x00\x01\x04\x7f control characters",
    "\ufeffbyte order mark",
    "no\u00a0break\u2009thin\u3000ideographic spaces",
    "caf\u00e9 and cafe\u0301, \u1e69 and s\u0323\u0307 and s\u0307\u0323",
    "\ufb01 \ufb04 \u2460 \u00bd \u2168 \uff21 \u212b, which normal forms rewrite",
    "\U0001d510\U0001d552\U0001d4fd\U0001d691 \U0001d7d8",
    "你好🙂x",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1f3\U0001f1f4 \U0001f44d\U0001f3fd \u2764\ufe0f: clusters",
    "한국어 \u1112\u1161\u11ab, 日本語、ไทย, हिन्दी",
    "العربية \u200f\u05de\u05d9\u05de\u05d9\u05df\u200e",
    "z\u0336a\u0310\u0352\u0489l\u200bg\u200do",
    "\ufffd \ue000 \U0010ffff",
    "<s>not special</s> <unk> <pad> <bos> <eos> <|end|> <|end_of_text|> <|begin_of_text|>",
    "literally <0x0A>, <0x09> and [INST] <table> [/INST]",
    "a\u2581literal \u2581 marker \u2581\u2581",
    "Don't STOP, ıİ ß ẞ: case folding",
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fast(backend, **roles):
    """A transformers tokenizer around a backend; roles as `bos_token="<s>"`."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def byte_level(text=PROSE, size=420, *, prefix_space=False, split=None, nfc=False, alphabet=True, specials=("<|end|>",)):
    """As GPT-2's and Llama-3's: the first special token is bos and eos, the second if there is one is eos.

    alphabet    all 256 bytes are tokens; without, only those of the text
    """
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=split is None)
    parts = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, level]) if parts else level
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=initial, show_progress=False)
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return fast(backend, bos_token=specials[0], eos_token=specials[-1])


def sentencepiece(
    text=PROSE, size=160, *, space="normalizer", dummy=True, specials=("<unk>", "<s>", "</s>"), runs=(), added=()
):
    """As those of Llama-2, Mistral, Phi-3 and Gemma: unk, bos, eos and perhaps pad, the bytes, the pieces.

    space    where the marker takes the place of spaces: "normalizer", or "metaspace" (a pre-tokenizer)
    dummy    a space is put in front of texts
    runs     more pieces, of several markers
    added    tokens that are not special, in the vocabulary or not
    """
    pieces = [*trained(text, size), *runs]
    vocabulary = {piece: index for index, piece in enumerate([*specials, *BYTES, *pieces])}
    merges = merges_of(set(pieces), vocabulary)
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=specials[0], fuse_unk=True, byte_fallback=True)
    return sentencepiece_around(model, space=space, dummy=dummy, specials=specials, added=added)


def sentencepiece_around(model, *, space="normalizer", dummy=True, specials=("<unk>", "<s>", "</s>"), added=()):
    """The steps before and after a model with byte fallback."""
    backend = Tokenizer(model)
    if space == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if dummy else "never", split=False)
    else:
        marker = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marker]) if dummy else marker
    strip = [decoders.Strip(" ", 1, 0)] if dummy else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    roles = {"pad_token": specials[3]} if len(specials) > 3 else {}
    return fast(backend, unk_token=specials[0], bos_token=specials[1], eos_token=specials[2], **roles)


def gemma_like(text=PROSE + CODE):
    """No space in front, a pad token, and pieces that are added tokens as well."""
    specials, runs = ("<unk>", "<bos>", "<eos>", "<pad>"), ("▁▁", "▁▁▁▁")
    return sentencepiece(text, 220, dummy=False, specials=specials, runs=runs, added=("<table>", *runs))


SMALL = {
    "gpt2": functools.partial(byte_level, CODE, 330),
    "llama3": functools.partial(byte_level, split=LLAMA3_SPLIT, specials=("<|begin_of_text|>", "<|end_of_text|>")),
    "qwen": functools.partial(byte_level, PROSE + CODE, 480, split=LLAMA3_SPLIT, nfc=True),
    "roberta": functools.partial(byte_level, prefix_space=True, specials=("<s>", "</s>")),
    "llama2": sentencepiece,
    "llama2-metaspace": functools.partial(sentencepiece, PROSE + CODE, 240, space="metaspace"),
    "gemma": gemma_like,
}


@functools.cache
def small(name):
    """One of SMALL, built once."""
    return SMALL[name]()


def unigram():
    """Byte fallback or not, the normal form rewrites the text."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    return fast(backend, unk_token="<unk>")


def wordpiece():
    """No bytes: lowercases, drops accents and spaces."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast(backend, unk_token="[UNK]")


def trained(text, size):
    """The pieces of a BPE over characters, spaces as markers, in the order in which they were found."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(text.splitlines(), trainers.BpeTrainer(vocab_size=size, show_progress=False))
    vocabulary = backend.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def merges_of(pieces, rank):
    """All pairs of pieces that make a piece, in the order in which a BPE model with these ranks would merge them."""
    found = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((rank[piece], rank[left], rank[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def data_file(package, *names):
    """A file of an installed package, which is not imported; None where it is not there."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations)), *names)
    return path if path.is_file() else None


@functools.cache
def mistral():
    """Mistral-7B-v0.1's tokenizer (32,000 ids), or None without mistral-common."""
    path = data_file("mistral_common", "data", "tokenizer.model.v1")
    if path is None:
        return None
    pieces = sentencepiece_pieces(path.read_bytes())
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    rank = {piece: -score for piece, score, kind in pieces if kind == 1}  # not the id: runs of spaces are merged last
    merges = merges_of(rank.keys(), rank)
    return sentencepiece_around(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


@functools.cache
def llama3():
    """Llama-3's tokenizer (128,256 ids), or None without llama-models."""
    path = data_file("llama_models", "llama3", "tokenizer.model")
    if path is None:
        return None
    return tiktoken_like(dict(line.split() for line in path.read_bytes().splitlines()))


def tiktoken_like(lines):
    """A byte-level tokenizer from base64 tokens and their ranks, with Llama-3's split and special tokens."""
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = character_of_bytes()
    ranks = {"".join(alphabet[byte] for byte in base64.b64decode(token)): int(rank) for token, rank in lines.items()}
    backend.model = models.BPE(vocab=ranks, merges=merges_of(ranks.keys(), ranks), ignore_merges=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), level])
    backend.decoder = decoders.ByteLevel()
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{index}" for index in range(254))]
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    return fast(backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def character_of_bytes():
    """What a byte-level tokenizer writes for every byte, asked of one: each UTF-8 byte of a text becomes a character."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {}
    for lead in (*range(0x80), *range(0x80, 0x800, 0x20), *range(0x800, 0x10000, 0x800), *range(0x10000, 0x110000, 0x8000)):
        for point in range(lead, lead + (1 if lead < 0x80 else 0x40)):
            if not 0xD800 <= point < 0xE000:
                text = chr(point)
                found |= dict(zip(text.encode(), level.pre_tokenize_str(text)[0][0], strict=True))
    unused = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(found.values()))
    return found | dict(zip(sorted(set(range(256)) - found.keys()), unused, strict=True))


def sentencepiece_pieces(data):
    """The pieces of a SentencePiece model file in order: texts, scores, types (1: normal, 2: unknown, 3: control, 6: byte).

    The file is a protocol buffer whose field 1 holds a message for every piece: 1 its text, 2 its score, 3 its type.
    """
    messages = [dict(fields_of(value)) for field, value in fields_of(data) if field == 1]
    return [(piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, 1)) for piece in messages]


def fields_of(data):
    """Field numbers and values of a protocol buffer message."""
    at = 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        else:
            length = {1: 8, 5: 4}.get(kind) or varint()
            yield key >> 3, data[at : at + length]
            at += length
