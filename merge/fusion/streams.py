"""The donors' side of a batch: host token ids in, donor token ids and their places out; and the cache that carries both.

A donor reads the same bytes as the host, through a static map: host id v stands for the donor ids tokens[offsets[v] :
offsets[v + 1]], whose bytes are those of v. So every end of a host token is an end of a donor token, and what a host position
sees of the donor is a function of the host ids up to it: nothing leaks from the future, whatever the tokenizers are.

    ends     [B, T] donor tokens of this call up to and with a host position; 0: none, the last one before this call counts
    count    [B] donor tokens of a row before this call
    slots    places in the donor's own cache; rows have different numbers of tokens, so some are padding, always behind a
             call's tokens. Windows of attention are counted in tokens, not in slots, so a row does not depend on its batch;
             for that, donors keep all keys and values, also those that a window has passed
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .errors import FusionError
from .fusers import TapMemory


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
class Stream:
    """What a donor has read so far.

    last    [B, D_k] for every tap: the state at the last token, zero before there is one
    """

    cache: DynamicCache | None
    even: bool = True  # no slot so far is padding
    valid: torch.Tensor | None = None  # [B, slots]
    count: torch.Tensor | None = None
    last: list[torch.Tensor] = field(default_factory=list)
    keys_values: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)  # of each tap

    def inputs(self, new: Expansion, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for the donor's forward pass over new tokens; what was seen before is in its cache.

        Padding behind a call's tokens is hidden from them by causality, so only padding of earlier calls needs a mask.
        """
        if self.valid is None or self.count is None:
            self.valid, self.count = new.valid[:, :0], new.ends.new_zeros(new.ends.shape[0])
        self.valid = torch.cat([self.valid, new.valid], 1)
        positions = self.count[:, None] + torch.arange(new.ids.shape[1], device=new.ids.device)
        mask = None if self.even else self._masks(positions, config, dtype)
        self.even = self.even and new.even
        return {
            "input_ids": new.ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": self.cache is not None,
        }

    def _masks(self, positions: torch.Tensor, config: Any, dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
        """What is added to attention scores [B, 1, N, slots]; by kind of layer where the donor has several."""
        assert self.valid is not None
        distance = positions[:, :, None] - (self.valid.cumsum(1) - 1)[:, None]
        seen = self.valid[:, None] & (distance >= 0)
        window = getattr(config, "sliding_window", None)

        def added(seen: torch.Tensor) -> torch.Tensor:
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]

        near = added(seen if window is None else seen & (distance < window))
        if getattr(config, "layer_types", None) is None:
            return near
        return {"full_attention": added(seen), "sliding_attention": near}

    def take(self, new: Expansion, states: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[TapMemory]]:
        """The states [B, N, D_k] of the new tokens, put where host positions see them; ([B, T, D_k], tokens for `cross`)."""
        assert self.valid is not None
        assert self.count is not None
        if not self.last:
            self.last = [x.new_zeros(x.shape[0], x.shape[2]) for x in states]
            self.keys_values = [{} for _ in states]
        aligned, memories = [], []
        positions = (self.valid.cumsum(1) - 1).clamp(min=0)
        at = self.count[:, None] + new.ends - 1
        for k, x in enumerate(states):
            reach = torch.cat([self.last[k][:, None], x], 1)  # entry e: the state after e tokens of this call
            aligned.append(reach.gather(1, new.ends[..., None].expand(-1, -1, x.shape[2])))
            self.last[k] = aligned[k][:, -1]
            memories.append(TapMemory(x, positions, self.valid, at, self.keys_values[k] if self.cache is not None else None))
        self.count = self.count + new.ends[:, -1]
        return aligned, memories

    def select(self, rows: torch.Tensor) -> None:
        """Rows of the batch in another order, some more than once."""
        if self.valid is None or self.count is None:
            return
        rows = rows.to(self.valid.device)
        self.valid, self.count = self.valid[rows], self.count[rows]
        self.last = [x[rows.to(x.device)] for x in self.last]
        for held in self.keys_values:
            for site, (keys, values) in held.items():
                held[site] = keys[rows.to(keys.device)], values[rows.to(values.device)]


class FusionCache(DynamicCache):
    """The host's cache, and the donors' streams beside it: whatever generation does to the rows of one is done to all."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config.text_config)
        self.streams = [Stream(DynamicCache()) for _ in config.donors]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search keeps some rows and repeats others."""
        super().reorder_cache(beam_idx)
        self._select("reorder_cache", beam_idx, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        for stream in self.streams:
            if stream.count is not None:
                rows = torch.arange(stream.count.shape[0], device=stream.count.device).repeat_interleave(repeats)
                stream.select(rows)
                self._donor(stream, "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Some rows only."""
        super().batch_select_indices(indices)
        self._select("batch_select_indices", indices, indices)

    def reset(self) -> None:
        """As if nothing had been read."""
        super().reset()
        for stream in self.streams:
            if stream.cache is not None:
                stream.cache.reset()
            stream.even, stream.valid, stream.count = True, None, None
            stream.last, stream.keys_values = [], []

    def crop(self, *args: Any) -> None:
        """Refused: how many donor tokens belong to the last host tokens is not kept."""
        raise FusionError("the cache of a fused model cannot be cropped; generate without an assistant model or prompt lookup")

    def _select(self, name: str, argument: Any, rows: torch.Tensor) -> None:
        for stream in self.streams:
            stream.select(rows)
            self._donor(stream, name, argument)

    @staticmethod
    def _donor(stream: Stream, name: str, argument: Any) -> None:
        if stream.cache is not None and stream.valid is not None and stream.valid.shape[1]:
            getattr(stream.cache, name)(argument)


def check_cache(cache: Cache | None) -> None:
    """Raises FusionError for a cache that has no place for the donors."""
    if cache is not None and not isinstance(cache, FusionCache):
        raise FusionError(
            f"past_key_values is a {type(cache).__name__}; expected a FusionCache(model.config), or none, to be made one"
        )
