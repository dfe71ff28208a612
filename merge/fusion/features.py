"""What training needs again and again, computed once: the donors' states, and the host's where the first fuser meets it.

Nothing below the first site changes while fusers are trained, so an update runs the host's upper layers alone. Modes that
train on the same blocks share one store. Sizes in bytes per host token: (sum of D_k + d) x element size, and for `cross` the
same again for the donors' tokens, and with their own tokens (alignment prefix) a byte for every one of a block's donor tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .fusers import Features, TapMemory
from .modeling_fusion import FusionForCausalLM


@dataclass
class Store:
    """Of N blocks of T host tokens.

    entry      [N, T, d] the host's states at its first site; None where the host is run from the bottom
    aligned    of every tap [N, T, D_k]
    memories   of every tap the donor's tokens, padded to the longest block; empty where no mode reads them
    """

    entry: torch.Tensor | None
    aligned: list[torch.Tensor]
    memories: list[TapMemory]
    first_site: int

    def features(self, rows: Sequence[int]) -> Features:
        """Of some blocks."""
        chosen = list(rows)
        memories = [TapMemory(m.new[chosen], m.positions[chosen], m.valid[chosen], m.at[chosen]) for m in self.memories]
        return Features([x[chosen] for x in self.aligned], memories)

    def shuffled(self) -> "Store":
        """Every block with another block's donors."""
        rows = torch.arange(len(self.aligned[0])).roll(1)
        found = self.features(rows.tolist())
        for own, other in zip(self.memories, found.memories, strict=True):
            other.at = own.at
        return Store(self.entry, found.aligned, found.memories, self.first_site)

    def zeroed(self) -> "Store":
        """With nothing from the donors."""
        memories = [TapMemory(torch.zeros_like(m.new), m.positions, m.valid, m.at) for m in self.memories]
        return Store(self.entry, [torch.zeros_like(x) for x in self.aligned], memories, self.first_site)


@torch.no_grad()
def compute(model: FusionForCausalLM, blocks: torch.Tensor, batch: int, *, tokens: bool, device: Any = "cpu") -> Store:
    """The store of blocks [N, T] under a model's donors, and its host up to the first site; `tokens`: for `cross`."""
    first = min(model.config.fusion["sites"])
    entries: list[torch.Tensor] = []
    found: list[Features] = []
    parts: Any = model
    held = parts.host.model.layers[first - 1].register_forward_hook(
        lambda module, arguments, output: entries.append((output[0] if isinstance(output, tuple) else output).cpu())
    )
    try:
        for start in range(0, len(blocks), batch):
            ids = blocks[start : start + batch].to(device)
            features = model.features(ids, tokens=tokens)
            features.aligned = [x.cpu() for x in features.aligned]
            found.append(features)
            parts.host.model(ids, use_cache=False)
    finally:
        held.remove()
    aligned = [torch.cat(several) for several in zip(*(one.aligned for one in found), strict=True)]
    memories = [_joined(list(several)) for several in zip(*(one.memories for one in found), strict=True)] if tokens else []
    return Store(torch.cat(entries), aligned, memories, first)


def _joined(several: list[TapMemory]) -> TapMemory:
    longest = max(one.new.shape[1] for one in several)

    def padded(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        rest = x.new_zeros(*x.shape[:dim], longest - x.shape[dim], *x.shape[dim + 1 :])
        return torch.cat([x, rest], dim).cpu()

    return TapMemory(
        torch.cat([padded(one.new) for one in several]),
        torch.cat([padded(one.positions) for one in several]),
        torch.cat([padded(one.valid, -1 % one.valid.ndim) for one in several]),
        torch.cat([one.at.cpu() for one in several]),
    )


class _Given(nn.Module):
    """Stands for the layers up to the first site: returns the states that they gave before."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(like, "attention_type", None)
        self.states: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """The states, or what came in where there are none."""
        return hidden_states if self.states is None else self.states


@contextmanager
def from_entry(model: FusionForCausalLM, store: Store) -> Iterator[Any]:
    """Inside, the host is run from its first site on; yields a function that sets the states it starts from."""
    parts: Any = model
    decoder = parts.host.model
    layers, first = decoder.layers, store.first_site
    stands = [_Given(layer) for layer in layers[:first]]
    stands[-1]._forward_hooks.update(layers[first - 1]._forward_hooks)  # the first fuser's among them

    def begin(rows: Sequence[int], device: Any) -> None:
        assert store.entry is not None
        stands[-1].states = store.entry[list(rows)].to(device)

    decoder.layers = nn.ModuleList([*stands, *layers[first:]])
    try:
        yield begin
    finally:
        decoder.layers = layers


def run_host(model: FusionForCausalLM, ids: torch.Tensor, features: Features) -> torch.Tensor:
    """Logits [B, T, V] with the donors' words given."""
    parts: Any = model
    parts._features = features
    try:
        found: torch.Tensor = parts.host(input_ids=ids, use_cache=False).logits
        return found
    finally:
        parts._features = None
