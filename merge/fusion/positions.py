"""Which positions of a host's and a donor's token sequences stand for the same bytes, so that their states can be compared."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .byte_tables import Encode
from .errors import FusionError
from .vocabulary import VocabularyMap

MAX_TOKENS = 512  # of a text, in host tokens


@dataclass(frozen=True)
class Aligned:
    """A batch of texts for both models, padded on the right, where causality hides what stands there.

    host_ids [b, T], donor_ids [b, S]
    host_positions, donor_positions    [n, 2] pairs (row, token); the i-th of both are states to be compared
    """

    host_ids: torch.Tensor
    donor_ids: torch.Tensor
    host_positions: torch.Tensor
    donor_positions: torch.Tensor

    def __post_init__(self) -> None:
        for side, ids, at in (
            ("host", self.host_ids, self.host_positions),
            ("donor", self.donor_ids, self.donor_positions),
        ):
            if at.ndim != 2 or at.shape[1] != 2 or len(at) != len(self.host_positions):
                expected = f"{tuple(self.host_positions.shape[:1])} pairs (row, token) for both models"
                raise FusionError(f"the alignment's {side} positions have shape {tuple(at.shape)}; expected {expected}")
            if len(at) and (at.min() < 0 or bool((at >= torch.tensor(ids.shape)).any())):
                raise FusionError(f"the alignment's {side} positions lie outside its ids of shape {tuple(ids.shape)}")


Align = Callable[[Sequence[str]], Aligned]


def same_tokens(encode: Encode, max_tokens: int = MAX_TOKENS, *, skip: int = 0) -> Align:
    """For models with one tokenizer: every token is aligned with itself, but for the first `skip` of a text.

    `encode` gives the ids of texts. The state of a first token is often hundreds of times as large as all others.
    """

    def align(texts: Sequence[str]) -> Aligned:
        rows = [list(row)[:max_tokens] for row in encode(texts)]
        ids, positions = _padded(rows), _pairs([range(skip, len(row)) for row in rows])
        return Aligned(ids, ids, positions, positions)

    return align


def mapped_tokens(encode: Encode, table: VocabularyMap, max_tokens: int = MAX_TOKENS, *, skip: int = 0) -> Align:
    """For a donor with another vocabulary, which reads the host's tokens through `table`: each with the last it became.

    Host tokens that the donor does not see have no position, nor have the first `skip` of a text.
    """

    lengths = table.counts.tolist()

    def align(texts: Sequence[str]) -> Aligned:
        host = [list(row)[:max_tokens] for row in encode(texts)]
        donor = [table.expand(row) for row in host]
        counts = [[lengths[token] for token in row] for row in host]
        ends = [list(itertools.accumulate(row)) for row in counts]
        seen = [[i for i, count in enumerate(row) if count and i >= skip] for row in counts]
        last = [[end[i] - 1 for i in row] for end, row in zip(ends, seen, strict=True)]
        return Aligned(_padded(host), _padded(donor), _pairs(seen), _pairs(last))

    return align


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids


def _pairs(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([(i, at) for i, row in enumerate(rows) for at in row], dtype=torch.long).reshape(-1, 2)
