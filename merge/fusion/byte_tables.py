"""What the ids of a tokenizer stand for, in bytes: the measure that two tokenizers without a common vocabulary share.

    content[v]    the bytes that token v adds to a text; b"" for control tokens and for ids that no token has
    clock         c[i] = sum of len(content[v_k]) over k <= i: how much of the text is known after token i

Character offsets would not do: they give both halves of a split character its whole span, which shows a model the future,
and they exist neither for slow tokenizers nor for generated ids. A byte table needs ids only.

Two kinds of tokenizer have such tables, told apart by the definition of the tokenizer and not by its name:

    byte-level       text becomes one printable character per byte before it is merged (GPT-2, Llama-3, Qwen, SmolLM)
    byte fallback    text stays characters, a marker stands for the space, and a character that is in no piece becomes
                     tokens <0x00> to <0xFF> (Llama-2, Mistral, Phi-3, Gemma)

This file is copied next to the weights of fused models: it imports nothing of the package but its siblings.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from .errors import FusionError

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Texts to ids, one list for each."""

ROLES = ("bos", "eos", "pad")  # where one id has several, the first counts
FALLBACK_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
NORMALIZERS = {  # of each kind, those that leave the bytes of a text recoverable
    "byte-level": {"NFC", "ByteLevel"},  # NFC is part of Qwen's: what the model reads is composed text
    "byte fallback": {"Prepend", "Replace"},
}
PRE_TOKENIZERS = {  # those that drop nothing; "Removed" as their behavior would
    "byte-level": {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts"},
    "byte fallback": {"Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"},
}
EXPECTED = "expected byte-level BPE, or BPE with byte fallback, without a normalizer that rewrites the text"


@dataclass(frozen=True)
class ByteTable:
    """The bytes of every id of a tokenizer.

    content          for V ids; b"" for control tokens and for ids without a token
    control          ids that stand for no text: bos, eos, pad, unk, role headers
    roles            which id is "bos", "eos" and "pad"; None where the tokenizer has none
    leading_space    the tokenizer puts a space in front of a text; it is in the content of the first token
    fallback         ids of the byte tokens, which a tokenizer with byte fallback uses only where no piece fits
    """

    content: tuple[bytes, ...]
    control: frozenset[int] = frozenset()
    roles: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(ROLES))
    leading_space: bool = False
    fallback: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> "ByteTable":
        """The table of a fast tokenizer.

        size    the model's vocab_size: ids from the tokenizer's last up to it stand for nothing, control tokens beyond it
                are left out, since the model has no embedding for them

        Raises:
            FusionError: the tokenizer is slow, rewrites texts, drops what it does not know, or has text beyond `size`.
        """
        definition = _Definition.of(tokenizer)
        vocabulary = definition.backend.get_vocab(with_added_tokens=False)
        found = {index: definition.piece_bytes(token) for token, index in vocabulary.items()}
        fallback = set() if definition.byte_level else {vocabulary[piece] for piece in FALLBACK_PIECES if piece in vocabulary}
        control = {index for index in tokenizer.all_special_ids if index is not None}
        control |= {vocabulary[token] for token in (definition.unk_token,) if token in vocabulary}
        for index, added in definition.added.items():
            if added.special:
                control.add(index)
            elif added.content not in vocabulary:  # those of the vocabulary also come from merges, with its markers
                found[index] = added.content.encode()
        found |= dict.fromkeys(control, b"")
        size = max(found) + 1 if size is None else size
        beyond = [index for index in sorted(found) if index >= size and found[index]]
        if beyond:
            raise FusionError(
                f"{definition.name} has the token {found[beyond[0]]!r} at {beyond[0]:,} but the model only {size:,} ids; "
                "expected the tokenizer that belongs to the model"
            )
        named = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
        return cls(
            content=tuple(found.get(index, b"") for index in range(size)),
            control=frozenset(index for index in control if index < size),
            roles={role: index if index is not None and index < size else None for role, index in named.items()},
            leading_space=definition.leading_space,
            fallback=frozenset(fallback),
        )

    def __len__(self) -> int:
        """V, the number of ids."""
        return len(self.content)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """The bytes that every id adds to the clock: int32 [V]."""
        return torch.tensor([len(data) for data in self.content], dtype=torch.int32)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of every content; of several the lowest that is no byte token, as the tokenizer would choose."""
        found: dict[bytes, int] = {}
        for is_fallback in (False, True):
            for index, data in enumerate(self.content):
                if data and (index in self.fallback) is is_fallback:
                    found.setdefault(data, index)
        return found

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence; any ids below V will do, also such that no text is encoded to."""
        return b"".join([self.content[index] for index in ids])

    def longest_match(self, data: bytes) -> list[int]:
        """Ids for any bytes, also for parts of characters, each as long as the vocabulary allows.

        Bytes that no token begins with are left out. Only byte-level tokenizers trained without the whole alphabet lack any
        (SmolLM2 has no token for U+0004, for one), and they leave them out of texts just so.
        """
        result, start = [], 0
        while start < len(data):
            end = min(len(data), start + self._longest)
            while end > start and data[start:end] not in self.ids:
                end -= 1
            if end > start:
                result.append(self.ids[data[start:end]])
            start = max(end, start + 1)
        return result

    @cached_property
    def _longest(self) -> int:
        return max((len(data) for data in self.content), default=0)


def text_encoder(tokenizer: PreTrainedTokenizerBase, table: ByteTable) -> Encode:
    """A function that encodes texts so that the bytes of the ids are those of the text.

    Nothing is put around or in front of a text, and names of special tokens in it are plain text, as with
    `add_special_tokens=False, split_special_tokens=True`. A tokenizer with a leading space encodes a text as this function
    does that text with a space before it. Two things differ from the tokenizer's own encoding, which would lose bytes: text
    is not normalised (NFC), and a literal space marker (U+2581) becomes byte tokens. Only bytes without a token are lost.

    table    `ByteTable.from_tokenizer` of the same tokenizer

    Raises:
        FusionError: as `from_tokenizer`.
    """
    definition = _Definition.of(tokenizer)
    backend = definition.plain_backend()

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def exact(text: str, ids: list[int]) -> list[int]:
        """`ids` if they stand for `text`; else what stands for it without a literal marker, byte tokens for the marker."""
        data = text.encode()
        if table.join(ids) == data:
            return ids
        if definition.marker is None or definition.marker not in text:
            return table.longest_match(data)
        marker = table.longest_match(definition.marker.encode())
        parts = text.split(definition.marker)
        first, *rest = [exact(part, ids) for part, ids in zip(parts, encode(parts), strict=True)]
        return sum((marker + ids for ids in rest), first)

    return lambda texts: [exact(text, ids) for text, ids in zip(texts, encode(texts), strict=True)]


@dataclass(frozen=True)
class _Definition:
    """A fast tokenizer's own description, found fit for a byte table.

    parts      the JSON form of the backend, but for its model and added tokens, which can be large
    marker     the character that stands for a space in pieces; None where the space stands for itself
    """

    name: str
    backend: Tokenizer
    parts: dict[str, Any]
    byte_level: bool
    marker: str | None
    leading_space: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_Definition":
        """Raises FusionError unless the tokens of any text determine its bytes."""
        name = f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise FusionError(f"{name} is a slow one ({type(tokenizer).__name__}); {EXPECTED}, as a fast tokenizer")
        steps = Tokenizer(BPE())
        steps.normalizer, steps.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        parts = json.loads(steps.to_str())
        normalizers, pre_tokenizers = _steps_of(parts)
        byte_level = any(part["type"] == "ByteLevel" for part in [*normalizers, *pre_tokenizers])
        problems = [*_model_problems(backend, byte_level), *_step_problems(normalizers, pre_tokenizers, byte_level)]
        if problems:
            raise FusionError(f"{name} has no bytes for its tokens: found {', '.join(problems)}; {EXPECTED}")
        markers = [part["content"] for part in normalizers if part["type"] == "Replace"]
        markers += [part["replacement"] for part in pre_tokenizers if part["type"] == "Metaspace"]
        return cls(
            name=name,
            backend=backend,
            parts=parts,
            byte_level=byte_level,
            marker=markers[0] if markers else None,
            leading_space=any(_puts_space(part) for part in [*normalizers, *pre_tokenizers]),
        )

    @property
    def unk_token(self) -> str | None:
        return getattr(self.backend.model, "unk_token", None)

    @property
    def added(self) -> dict[int, AddedToken]:
        """Tokens that are found in a text before it reaches the model, by id."""
        return dict(sorted(self.backend.get_added_tokens_decoder().items()))

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes of a piece of the vocabulary."""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[char] for char in piece])
            except KeyError:  # no text leads to such a piece; decoders take it literally
                return piece.encode()
        if piece in FALLBACK_PIECES:
            return FALLBACK_PIECES[piece]
        return (piece.replace(self.marker, " ") if self.marker else piece).encode()

    def plain_backend(self) -> Tokenizer:
        """A tokenizer that encodes the text and nothing else: no special tokens, no leading space, no normal form."""
        normalizers, pre_tokenizers = _steps_of(self.parts)
        kept = [part for part in normalizers if part["type"] in ("Replace", "ByteLevel")]
        without: dict[str, dict[str, Any]] = {
            "ByteLevel": {"add_prefix_space": False},
            "Metaspace": {"prepend_scheme": "never"},
        }
        changed = [part | without.get(part["type"], {}) for part in pre_tokenizers]
        parts = self.parts | {
            "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": changed} if changed else None,
        }
        plain = Tokenizer.from_str(json.dumps(parts))
        plain.model = self.backend.model
        for index, token in self.added.items():  # one by one: ids beyond the vocabulary follow from the order
            if token.special or token.lstrip or token.rstrip:  # the spaces that these swallow would be lost
                plain.add_special_tokens([token])
            else:
                plain.add_tokens([token])
            assert plain.token_to_id(token.content) == index
        plain.encode_special_tokens = True
        return plain


def _steps_of(parts: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The normalizers and the pre-tokenizers, in order, out of whatever sequences they stand in."""

    def flat(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
        if node is None:
            return []
        return [part for child in node[key] for part in flat(child, key)] if node["type"] == "Sequence" else [node]

    return flat(parts["normalizer"], "normalizers"), flat(parts["pre_tokenizer"], "pretokenizers")


def _model_problems(backend: Tokenizer, byte_level: bool) -> list[str]:
    """What keeps the vocabulary from spelling every text."""
    model = backend.model
    if not isinstance(model, BPE):
        return [f"a {type(model).__name__} model"]
    if not byte_level and not model.byte_fallback:
        return ["a BPE model without byte fallback"]
    traits = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    problems = [f"a BPE model with {trait}" for trait in traits if getattr(model, trait)]
    return problems if byte_level else [*problems, *_fallback_problems(backend.get_vocab(with_added_tokens=False))]


def _fallback_problems(vocabulary: Mapping[str, int]) -> list[str]:
    """Bytes for which there is no token; in Gemma's vocabulary a tab stands for itself and has no <0x09>."""
    missing = [
        piece
        for piece, byte in FALLBACK_PIECES.items()
        if piece not in vocabulary and (byte >= b"\x80" or byte.decode("latin-1") not in vocabulary)
    ]
    return [f"byte fallback without {missing[0]} (and {len(missing) - 1} more)"] if missing else []


def _step_problems(
    normalizers: Sequence[Mapping[str, Any]], pre_tokenizers: Sequence[Mapping[str, Any]], byte_level: bool
) -> list[str]:
    """Which steps before the model lose or rewrite bytes."""
    kind = "byte-level" if byte_level else "byte fallback"
    problems = [f"the normalizer {part['type']}" for part in normalizers if part["type"] not in NORMALIZERS[kind]]
    problems += [f"the pre-tokenizer {part['type']}" for part in pre_tokenizers if part["type"] not in PRE_TOKENIZERS[kind]]
    problems += [
        f"the pre-tokenizer {part['type']} that removes its matches"
        for part in pre_tokenizers
        if part.get("behavior") == "Removed"
    ]
    marker_steps = [part for part in normalizers if part["type"] == "Replace"]
    problems += [
        f"a normalizer that replaces {pattern!r} by {part['content']!r}"
        for part in marker_steps
        for pattern in part["pattern"].values()
        if part["pattern"] != {"String": " "} or len(part["content"]) != 1
    ]
    return problems


def _puts_space(part: Mapping[str, Any]) -> bool:
    """Whether a step before the model puts a space in front of the text."""
    if part["type"] == "Metaspace":
        return bool(part["prepend_scheme"] != "never")
    return part["type"] == "Prepend" or bool(part.get("add_prefix_space"))


def _byte_of_characters() -> dict[str, int]:
    """The byte that each character stands for in byte-level vocabularies: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of_characters()
