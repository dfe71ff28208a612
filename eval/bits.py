"""Bits per byte of documents: what models with different tokenizers can be compared by.

    bits per byte = sum over tokens of -log2 p(token | bos and all tokens before) / bytes of the text

Documents are cut at a number of bytes, not of tokens, so that every model is given the same text; the sums of each document are
kept, since comparisons are made document by document.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from .errors import DataError
from .stats import Mean, ratio


@dataclass(frozen=True)
class Bits:
    """Of every document: bits [N] and bytes [N]."""

    bits: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]

    @property
    def per_byte(self) -> float:
        """Of all documents as one text."""
        return float(self.bits.sum() / self.bytes.sum())


def cut(documents: Sequence[str], num_bytes: int) -> list[str]:
    """The beginnings of documents, of at most so many bytes, without the parts of a character that is cut; none empty."""
    found = [document.encode()[:num_bytes].decode(errors="ignore") for document in documents]
    return [document for document in found if document.strip()]


def pieces(documents: Sequence[str], num_bytes: int) -> list[str]:
    """Documents in pieces of at most so many bytes, cut at line ends where there are any: one long text is many documents."""
    found = []
    for document in documents:
        piece = ""
        for line in (part for one in document.splitlines(keepends=True) for part in _at_most(one, num_bytes)):
            if piece and len((piece + line).encode()) > num_bytes:
                found.append(piece)
                piece = ""
            piece += line
        found.append(piece)
    return [piece for piece in found if piece.strip()]


def _at_most(line: str, num_bytes: int) -> Iterator[str]:
    """A line in parts; a character is never cut."""
    data = line.encode()
    while data:
        part = data[:num_bytes].decode(errors="ignore") or data.decode()[0]
        yield part
        data = data[len(part.encode()) :]


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    batch: int = 8,
    device: str = "cpu",
    done: Callable[[int], object] = lambda documents: None,
) -> Bits:
    """The bits of documents under a causal model of transformers.

    Raises:
        DataError: there are none.
    """
    if not documents:
        raise DataError("there are no documents to measure bits per byte on")
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [[first, *tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]] for one in documents]
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    bits = np.zeros(len(ids))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(ids[k]) for k in chosen)
        rows = torch.tensor([ids[k] + [first] * (longest - len(ids[k])) for k in chosen], device=device)
        there = torch.tensor([[1] * (len(ids[k]) - 1) + [0] * (longest - len(ids[k])) for k in chosen], device=device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]  # padding is behind, where nothing sees it
        nats = torch.stack(
            [functional.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits, rows[:, 1:], strict=True)]
        )
        bits[chosen] = ((nats.double() * there).sum(1) / math.log(2)).cpu().numpy()
        done(len(chosen))
    return Bits(bits, np.array([float(len(one.encode())) for one in documents]))


def difference(one: Bits, other: Bits) -> Mean:
    """Bits per byte of `one` less those of `other` on the same documents: mean over bytes, its error over documents."""
    return ratio(one.bits - other.bits, one.bytes)
