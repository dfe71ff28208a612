"""Integer tables that carry tokens of a host's vocabulary to a donor's and back, byte for byte.

    V, U       ids of the host and of the donor, as many as their models have
    rows       for every host id the donor ids that stand for the same bytes; flat, with offsets

The donor reads the rows of the host's tokens and never the text, so that what it has read after host token i is what those
tokens say and nothing later. Encoding the text for the donor instead would leak the future: where its tokens end depends on
the letters that follow. The tables are built once and saved with the model, which then needs one tokenizer, the host's;
`prefix` is the way that needs the donor's too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .byte_tables import ROLES, ByteTable, Encode
from .errors import FusionError


@dataclass(frozen=True)
class VocabularyMap:
    """Host id v stands for the donor ids tokens[offsets[v] : offsets[v + 1]].

    offsets    int32 [V + 1], from 0 to N
    tokens     int32 [N]
    inexact    host ids of which the donor gets fewer bytes, because no token of its vocabulary has them; mostly none
    """

    offsets: torch.Tensor
    tokens: torch.Tensor
    inexact: tuple[int, ...] = ()

    def row(self, index: int) -> list[int]:
        """The donor ids of one host id; none for what the donor is not to see."""
        start, end = self.offsets[index : index + 2].tolist()
        return [int(token) for token in self.tokens[start:end].tolist()]

    def expand(self, ids: Sequence[int]) -> list[int]:
        """The donor ids of a sequence of host ids."""
        return [token for index in ids for token in self.row(index)]

    @property
    def counts(self) -> torch.Tensor:
        """Donor tokens per host id: int32 [V]. Their running sum, less one, is the last donor slot of every position."""
        return self.offsets.diff()


@dataclass(frozen=True)
class Bridge:
    """How a donor's next-token distribution becomes one over the host's vocabulary.

    With p_h and p_d the two distributions and C(u) = {v : begins[v] = u}, the donor's opinion on host token v is
        q(v) = p_d(begins[v]) p_h(v) / sum_{C(begins[v])} p_h  +  sum_{u : lands[u] = v} p_d(u),
    divided by its sum over v: the donor chooses among first tokens, the host among those that begin alike.

    begins    int32 [V], the donor token with which host token v starts; -1 for what the donor knows nothing of
    lands     int32 [U], for donor tokens that start no host token the first host token of their bytes; -1 for those that
              start one, whose mass is shared out in the first term, and for those without a counterpart, whose mass is lost
    """

    begins: torch.Tensor
    lands: torch.Tensor


def vocabulary_map(
    host: ByteTable, donor: ByteTable, encode: Encode | None = None, *, control: Mapping[int, Sequence[int]] | None = None
) -> VocabularyMap:
    """The map that has equal bytes on both sides for every host id; the exceptions are counted in `inexact`.

    A row is the donor's one token of those bytes if there is one, else what `encode` makes of them, else (parts of
    characters, or without `encode`) the longest matches. Control tokens go by role: bos to bos, eos to eos, all others to
    nothing.

    encode     the donor's `text_encoder`
    control    other rows for host control tokens, of donor control tokens

    Raises:
        FusionError: `control` names an id that is no control token.
    """
    rows: list[Sequence[int]] = [()] * len(host)
    for index, row in _control_rows(host, donor, control or {}).items():
        rows[index] = row
    left = []
    for index, data in enumerate(host.content):
        if data and (hit := donor.ids.get(data)) is not None:
            rows[index] = (hit,)
        elif data:
            left.append(index)
    texts = {index: text for index in left if (text := _text(host.content[index])) is not None} if encode else {}
    encoded = dict(zip(texts, encode(list(texts.values())), strict=True)) if encode else {}
    for index in left:
        data, ids = host.content[index], encoded.get(index, ())
        exact = donor.join(ids) == data and donor.control.isdisjoint(ids)
        rows[index] = ids if exact else donor.longest_match(data)
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    tokens = [token for row in rows for token in row]
    inexact = tuple(index for index in left if donor.join(rows[index]) != host.content[index])
    return VocabularyMap(offsets.to(torch.int32), torch.tensor(tokens, dtype=torch.int32), inexact)


def bridge(
    host: ByteTable, donor: ByteTable, *, host_encode: Encode | None = None, donor_encode: Encode | None = None
) -> Bridge:
    """The tables of the mixture of outputs; `host_encode` and `donor_encode` as in `vocabulary_map`."""
    begins = _first(vocabulary_map(host, donor, donor_encode))
    lands = _first(vocabulary_map(donor, host, host_encode))
    lands[begins[begins >= 0].long()] = -1
    return Bridge(begins, lands)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every text the same ids."""
    mine, theirs = (getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other))
    return mine is not None and theirs is not None and mine.to_str() == theirs.to_str()


def same_vocabulary(host_size: int, donor_size: int) -> tuple[VocabularyMap, Bridge]:
    """The tables of two models with one tokenizer, whatever it is: every id stands for itself, if the donor has it."""
    shared = min(host_size, donor_size)
    ids = torch.arange(max(host_size, donor_size), dtype=torch.int32)
    offsets = torch.arange(host_size + 1, dtype=torch.int32).clamp(max=shared)
    begins = ids[:host_size].where(ids[:host_size] < shared, ids.new_tensor(-1))
    return VocabularyMap(offsets, ids[:shared].clone()), Bridge(begins, ids.new_full((donor_size,), -1))


def clock(lengths: torch.Tensor) -> torch.Tensor:
    """The bytes that are known after every token: int64, `(..., T) -> (..., T)`.

    lengths    of the tokens in bytes, `table.lengths[ids]`; 0 for control tokens and padding
    """
    return lengths.long().cumsum(-1)


def aligned(host_ends: torch.Tensor, donor_ends: torch.Tensor) -> torch.Tensor:
    """For every host position the last donor token that ends no later: int64, `(..., T), (..., S) -> (..., T)`.

    -1 where there is none. The clocks must not decrease; padding at the end of `donor_ends` has to lie beyond all of
    `host_ends`. A donor token without bytes ends with the token before it, so that a control token in the middle of a text
    would be seen early: count those that stand in both streams as one byte in both. The counts of a `VocabularyMap` need
    no such care.
    """
    return torch.searchsorted(donor_ends.contiguous(), host_ends.contiguous(), right=True) - 1


def _control_rows(host: ByteTable, donor: ByteTable, control: Mapping[int, Sequence[int]]) -> dict[int, Sequence[int]]:
    """The rows of bos and eos, then those that the user gave."""
    rows: dict[int, Sequence[int]] = {}
    for role in ROLES:
        source, target = host.roles.get(role), donor.roles.get(role)
        if source is not None and source not in rows:
            rows[source] = () if role == "pad" or target is None else (target,)
    wrong = [f"host id {index}" for index in control if index not in host.control]
    wrong += [f"donor id {token}" for row in control.values() for token in row if token not in donor.control]
    if wrong:
        raise FusionError(f"the map of control tokens names {', '.join(wrong)}; expected ids of control tokens")
    return rows | dict(control)


def _text(data: bytes) -> str | None:
    """Bytes as text; None for parts of characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _first(table: VocabularyMap) -> torch.Tensor:
    """The first donor id of every host id, -1 where there is none: int32 [V]."""
    first = torch.full_like(table.counts, -1)
    present = table.counts > 0
    first[present] = table.tokens[table.offsets[:-1][present].long()]
    return first
