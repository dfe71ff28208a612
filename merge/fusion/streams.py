"""The donors' side of a batch: host token ids in, donor token ids and their places out; and the cache that carries both.

A donor reads the same bytes as the host, and what a host position sees of it is a function of the host ids up to there:
nothing leaks from the future, whatever the tokenizers are. There are two ways to align the tokens.

    map       static: host id v stands for the donor ids tokens[offsets[v] : offsets[v + 1]], whose bytes are those of v. Every
              end of a host token is an end of a donor token, often where the donor's own tokenizer would have none
    prefix    after every host token the donor holds what its tokenizer makes of the text so far; tokens that a longer text
              splits otherwise are hidden from what comes later (`prefix`)

    ends     [B, T] donor tokens of this call up to and with the one at which a host position finds the donor's state; 0: none,
             the last one before this call counts
    count    [B] donor tokens of a row
    slots    places in the donor's own cache; rows have different numbers of tokens, so some are padding, always behind a
             call's tokens. Windows of attention are counted in tokens, not in slots, so a row does not depend on its batch;
             for that, donors keep all keys and values, also those that a window has passed
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .errors import FusionError
from .fusers import TapMemory
from .prefix import Nodes, PrefixTokens, Retokenizer, expand_rows


@dataclass(frozen=True)
class Expansion:
    """A call's donor tokens: ids [B, N] and whether they are tokens [B, N], `ends` [B, T], and whether all rows have N."""

    ids: torch.Tensor
    valid: torch.Tensor
    ends: torch.Tensor
    even: bool


def expand(ids: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor) -> Expansion:
    """The donor tokens of host ids [B, T]; those outside `mask` [B, T] have none."""
    starts = offsets[ids]
    counts = (offsets[ids + 1] - starts) * mask
    ends = counts.cumsum(1)
    longest, shortest = torch.stack([ends[:, -1].max(), ends[:, -1].min()]).tolist()  # one wait for the device
    slot = torch.arange(longest, device=ids.device).expand(ids.shape[0], longest).contiguous()
    owner = torch.searchsorted(ends, slot, right=True).clamp(max=ids.shape[1] - 1)
    valid = slot < ends[:, -1:]
    within = slot - (ends - counts).gather(1, owner)
    place = (starts.gather(1, owner) + within).clamp(0, max(0, len(tokens) - 1))
    found = tokens[place.where(valid, place.new_zeros(()))] if len(tokens) else slot
    return Expansion(found.long(), valid, ends, longest == shortest)


@dataclass
class Stream(ABC):
    """What a donor has read so far, and what of it belongs to the latest call; a subclass for every way to align tokens.

    last    [B, D_k] for every tap: the state at the last token, zero before there is one

    After `read`: ids [B, N], positions [B, N] and `ends` [B, T] of the new tokens, and whether causality alone hides what has
    to be hidden from them (`plain`).
    """

    cache: DynamicCache | None
    last: list[torch.Tensor] = field(default_factory=list)
    keys_values: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)  # of each tap
    ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    plain: bool = True

    @abstractmethod
    def read(self, ids: torch.Tensor, mask: torch.Tensor, tables: Any) -> int:
        """Takes host ids [B, T], those in `mask` [B, T]; returns N."""

    @abstractmethod
    def visible(self, window: int | None = None) -> torch.Tensor:
        """What new tokens see of all slots, those of the call included: bool [B, N, S]. `window` is counted in tokens."""

    @abstractmethod
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where tokens stand and which of them are seen: positions, valid and at, as in TapMemory."""

    @property
    def rows(self) -> int | None:
        """B; None before anything was read."""
        return None if self.ends is None else self.ends.shape[0]

    @property
    @abstractmethod
    def slots(self) -> int:
        """S: places in the donor's cache."""

    def inputs(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for the donor's forward pass over the new tokens; what was seen before is in its cache."""
        return {
            "input_ids": self.ids,
            "attention_mask": None if self.plain else self._masks(config, dtype),
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": self.cache is not None,
        }

    def _masks(self, config: Any, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
        """What is added to attention scores [B, 1, N, S]; by kind of layer where the donor has several."""

        def added(seen: torch.Tensor) -> torch.Tensor:
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

        near = added(self.visible(getattr(config, "sliding_window", None)))
        if getattr(config, "layer_types", None) is None:
            return near
        return {"full_attention": added(self.visible()), "sliding_attention": near}

    def take(self, states: list[torch.Tensor], tokens: bool = False) -> tuple[list[torch.Tensor], list[TapMemory]]:
        """The states [B, N, D_k] of the new tokens, put where host positions see them: [B, T, D_k]; and with `tokens` the
        tokens themselves.
        """
        assert self.ends is not None
        if not self.last:
            self.last = [x.new_zeros(x.shape[0], x.shape[2]) for x in states]
            self.keys_values = [{} for _ in states]
        aligned, memories = [], []
        places = self.places() if tokens else None
        for k, x in enumerate(states):
            x = x.to(self.last[k].device)  # of no tokens there are states anywhere
            reach = torch.cat([self.last[k][:, None], x], 1)  # entry e: the state after e tokens of this call
            aligned.append(reach.gather(1, self.ends[..., None].expand(-1, -1, x.shape[2]).to(x.device)))
            self.last[k] = aligned[k][:, -1]
            if places is not None:
                memories.append(TapMemory(x, *places, self.keys_values[k] if self.cache is not None else None))
        return aligned, memories

    def select(self, rows: torch.Tensor) -> None:
        """Rows of the batch in another order, some more than once."""
        if self.ends is None:
            return
        rows = rows.to(self.ends.device)
        self.ends = self.ends[rows]
        self._select_own(rows)
        self.last = [x[rows.to(x.device)] for x in self.last]
        for held in self.keys_values:
            for site, (keys, values) in held.items():
                held[site] = keys[rows.to(keys.device)], values[rows.to(values.device)]

    @abstractmethod
    def _select_own(self, rows: torch.Tensor) -> None:
        """`select` for what the subclass keeps."""


@dataclass
class MapStream(Stream):
    """Through a static map; `tables`: its offsets and tokens."""

    valid: torch.Tensor | None = None  # [B, S]
    count: torch.Tensor | None = None  # with the call's
    even: bool = True  # no slot so far is padding

    def read(self, ids: torch.Tensor, mask: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> int:
        offsets, tokens = tables
        new = expand(ids.to(offsets.device), mask.to(offsets.device), offsets, tokens)
        if self.valid is None or self.count is None:
            self.valid, self.count = new.valid[:, :0], new.ends.new_zeros(new.ends.shape[0])
        self.valid = torch.cat([self.valid, new.valid], 1)
        self.ids, self.ends = new.ids, new.ends
        self.positions = self.count[:, None] + torch.arange(new.ids.shape[1], device=new.ids.device)
        self.count = self.count + new.ends[:, -1]
        # padding behind a call's tokens is hidden from them by causality, so only that of earlier calls needs a mask
        self.plain, self.even = self.even, self.even and new.even
        return new.ids.shape[1]

    @property
    def slots(self) -> int:
        return 0 if self.valid is None else self.valid.shape[1]

    def visible(self, window: int | None = None) -> torch.Tensor:
        assert self.valid is not None
        assert self.positions is not None
        distance = self.positions[:, :, None] - (self.valid.cumsum(1) - 1)[:, None]
        seen = self.valid[:, None] & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.valid is not None
        assert self.count is not None
        assert self.ends is not None
        at = (self.count - self.ends[:, -1])[:, None] + self.ends - 1
        return (self.valid.cumsum(1) - 1).clamp(min=0), self.valid, at

    def _select_own(self, rows: torch.Tensor) -> None:
        assert self.valid is not None
        assert self.count is not None
        self.valid, self.count = self.valid[rows], self.count[rows]


@dataclass
class PrefixStream(Stream):
    """The donor's own tokens of the text so far (`prefix`); `tables`: a Retokenizer."""

    texts: list[PrefixTokens] = field(default_factory=list)  # of every row
    nodes: Nodes | None = None

    def read(self, ids: torch.Tensor, mask: torch.Tensor, tables: Retokenizer) -> int:
        self.texts = self.texts or [PrefixTokens(tables) for _ in ids]
        self.nodes = expand_rows(self.texts, ids, mask, self.nodes)
        self.ids, self.ends, self.plain = self.nodes.ids, self.nodes.ends, self.nodes.even
        self.positions = self.nodes.positions[:, self.nodes.before :]
        return self.nodes.ids.shape[1]

    @property
    def slots(self) -> int:
        return 0 if self.nodes is None else self.nodes.death.shape[1]

    def visible(self, window: int | None = None) -> torch.Tensor:
        assert self.nodes is not None
        return self.nodes.visible(window)

    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.nodes is not None
        at = self.nodes.positions.gather(1, self.nodes.last.clamp(min=0)) if self.slots else self.nodes.last
        return self.nodes.positions, self.nodes.alive(), at.where(self.nodes.last >= 0, -1)

    def _select_own(self, rows: torch.Tensor) -> None:
        assert self.nodes is not None
        self.texts = [self.texts[row].copy() for row in rows.tolist()]
        self.nodes = self.nodes.select(rows)


ALIGNMENTS: dict[str, type[Stream]] = {"map": MapStream, "prefix": PrefixStream}


class FusionCache(DynamicCache):
    """The host's cache, and the donors' streams beside it: whatever generation does to the rows of one is done to all."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config.text_config)
        self.of = config
        self.streams = [ALIGNMENTS[donor["alignment"]](DynamicCache()) for donor in config.donors]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search keeps some rows and repeats others."""
        super().reorder_cache(beam_idx)
        self._select("reorder_cache", beam_idx, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        for stream in self.streams:
            if stream.rows is not None:
                stream.select(torch.arange(stream.rows).repeat_interleave(repeats))
                self._donor(stream, "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Some rows only."""
        super().batch_select_indices(indices)
        self._select("batch_select_indices", indices, indices)

    def reset(self) -> None:
        """As if nothing had been read."""
        self.__dict__.update(FusionCache(self.of).__dict__)  # that of transformers leaves the layers their length in 5.17

    def crop(self, *args: Any) -> None:
        """Refused: how many donor tokens belong to the last host tokens is not kept."""
        raise FusionError("the cache of a fused model cannot be cropped; generate without an assistant model or prompt lookup")

    def _select(self, name: str, argument: Any, rows: torch.Tensor) -> None:
        for stream in self.streams:
            stream.select(rows)
            self._donor(stream, name, argument)

    @staticmethod
    def _donor(stream: Stream, name: str, argument: Any) -> None:
        if stream.cache is not None and stream.slots:
            getattr(stream.cache, name)(argument)


def check_cache(cache: Cache | None) -> None:
    """Raises FusionError for a cache that has no place for the donors."""
    if cache is not None and not isinstance(cache, FusionCache):
        raise FusionError(
            f"past_key_values is a {type(cache).__name__}; expected a FusionCache(model.config), or none, to be made one"
        )
