"""What is added to the host's residual stream: Delta(h, f_1..f_K), exactly zero before training.

    h    [B, T, d]    the host's state at a site
    f_k  [B, T, D_k]  a donor's state at a tap, at the last of its tokens that ends no later than the host's token
    r    rank; n a norm with gain (n(h) of the concat and gate modes has none); every matrix W: inputs -> r

    concat      Delta = W_out silu([W_h n(h); W_1 n(f_1); ..; W_K n(f_K)])
    weighted    Delta = W_out sum_k softmax(w)_k W_k n(f_k)
    gate        the same with weights softmax(G n(h) + b) over the taps and "none"
    attention   one token's query W_q n(h) over the K taps and a learned key whose value is zero
    cross       the same over all donor tokens that end no later, nearer ones first: -slope_j (distance in donor tokens),
                and a zero key whose value is zero (after CALM, arXiv 2401.02412, made causal, the host's equal at first)

W_out is zero at first, so that Delta is 0 exactly in any dtype. Fusers may be in float32 while the models are not.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization

NORMS = ("rms", "layer", "none")
EPS = 1e-6


@dataclass
class TapMemory:
    """Donor tokens at one tap, for `cross`; S of them so far, N new.

    new          [B, N, D_k] states
    positions    [B, S] number of the token in its row, from 0
    valid        [B, S]: it is a token, not padding; or [B, T, S] where that is not the same at every host position
    at           [B, T] number of the last token that a host position may see, -1: none
    keys_values  site -> (keys, values) [B, S - N, r] of the tokens before; None where nothing is cached
    """

    new: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    at: torch.Tensor
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def extend(self, site: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, given those of the new ones; kept where there is a cache."""
        if self.keys_values is None:
            return keys, values
        if site in self.keys_values:
            before = self.keys_values[site]
            keys, values = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)
        self.keys_values[site] = keys, values
        return keys, values


@dataclass
class Features:
    """What the donors give for a batch: `aligned` [B, T, D_k] for every tap, and the tokens themselves."""

    aligned: list[torch.Tensor]
    memories: list[TapMemory] = field(default_factory=list)


class Norm(nn.Module):
    """RMS or layer norm with gain, in float32; or nothing. Without a donor's token the state is zero and stays zero."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(width)) if kind != "none" else None
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> the same."""
        if self.weight is None:
            return x
        if self.bias is None:
            return functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), EPS).to(self.weight.dtype)
        found = functional.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), EPS)
        return (found * (x != 0).any(-1, keepdim=True)).to(self.weight.dtype)


class Fuser(nn.Module):
    """Base of all modes: norms of the taps, the output matrix, dropout."""

    settings: ClassVar[tuple[str, ...]] = ("sites", "rank", "heads", "norm", "dropout")
    reads_tokens = False  # needs `Features.memories`

    def __init__(self, site: int, hidden: int, widths: list[int], rank: int, heads: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.site, self.rank, self.heads, self.kind = site, rank, heads, norm
        self.norms = nn.ModuleList(Norm(width, norm) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.build(hidden, widths)
        self.out = nn.Linear(self.inner(len(widths)), hidden, bias=False)
        self.reset_parameters()

    def build(self, hidden: int, widths: list[int]) -> None:
        """Adds what the mode needs."""
        raise NotImplementedError

    def inner(self, taps: int) -> int:
        """Width of what W_out reads."""
        return self.rank

    def join(self, h: torch.Tensor, found: list[torch.Tensor], features: Features) -> torch.Tensor:
        """z [B, T, inner] from the host's state and the normed taps."""
        raise NotImplementedError

    def forward(self, h: torch.Tensor, features: Features) -> torch.Tensor:
        """Delta [B, T, d], in the dtype and on the device of h."""
        weight = self.out.weight
        device, dtype = h.device if weight.is_meta else weight.device, weight.dtype  # meta: on its way from the disk
        found = [norm(x.to(device, dtype)) for norm, x in zip(self.norms, features.aligned, strict=True)]
        z = self.join(h.to(device, dtype), found, features)
        delta: torch.Tensor = self.out(self.dropout(z))
        return delta.to(h.device, h.dtype)

    def reset_parameters(self) -> None:
        """Matrices normal with variance 1 / inputs, W_out zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Norm) and module.weight is not None:
                nn.init.ones_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out.weight)

    def plain_norm(self, h: torch.Tensor) -> torch.Tensor:
        """The host's state at unit size, without gain: sizes grow through a model's layers."""
        return h if self.kind == "none" else functional.rms_norm(h.float(), h.shape[-1:], None, EPS).to(h.dtype)

    def heads_of(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, r] -> [B, H, S, r / H]."""
        found: torch.Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return found


def projections(widths: list[int], rank: int) -> nn.ModuleList:
    """W_k of all taps."""
    return nn.ModuleList(nn.Linear(width, rank, bias=False) for width in widths)


class Concat(Fuser):
    """All of them side by side, and a nonlinearity."""

    def build(self, hidden: int, widths: list[int]) -> None:
        self.host = nn.Linear(hidden, self.rank, bias=False)
        self.taps = projections(widths, self.rank)

    def inner(self, taps: int) -> int:
        return (taps + 1) * self.rank

    def join(self, h: torch.Tensor, found: list[torch.Tensor], features: Features) -> torch.Tensor:
        parts = [self.host(self.plain_norm(h)), *(tap(x) for tap, x in zip(self.taps, found, strict=True))]
        return functional.silu(torch.cat(parts, -1))


class Weighted(Fuser):
    """One learned weight for each tap."""

    def build(self, hidden: int, widths: list[int]) -> None:
        self.taps = projections(widths, self.rank)
        self.weights = nn.Parameter(torch.zeros(len(widths)))

    def join(self, h: torch.Tensor, found: list[torch.Tensor], features: Features) -> torch.Tensor:
        shares = self.weights.softmax(0)
        return torch.stack([share * tap(x) for share, tap, x in zip(shares, self.taps, found, strict=True)]).sum(0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weights)


class Gate(Fuser):
    """Weights that the host's state decides, "no donor" among them."""

    def build(self, hidden: int, widths: list[int]) -> None:
        self.taps = projections(widths, self.rank)
        self.gate = nn.Linear(hidden, len(widths) + 1)

    def join(self, h: torch.Tensor, found: list[torch.Tensor], features: Features) -> torch.Tensor:
        shares = self.gate(self.plain_norm(h)).softmax(-1)
        several = [shares[..., k + 1, None] * tap(x) for k, (tap, x) in enumerate(zip(self.taps, found, strict=True))]
        return torch.stack(several).sum(0)


class Attention(Fuser):
    """Attention over the taps at one position."""

    def build(self, hidden: int, widths: list[int]) -> None:
        self.host_norm = Norm(hidden, self.kind)
        self.query = nn.Linear(hidden, self.rank, bias=False)
        self.keys, self.values = projections(widths, self.rank), projections(widths, self.rank)
        self.none = nn.Parameter(torch.zeros(self.rank))

    def join(self, h: torch.Tensor, found: list[torch.Tensor], features: Features) -> torch.Tensor:
        q = self.query(self.host_norm(h))[..., None, :]
        keys = torch.stack([self.none.expand_as(q[..., 0, :]), *(w(x) for w, x in zip(self.keys, found, strict=True))], -2)
        several = [w(x) for w, x in zip(self.values, found, strict=True)]
        values = torch.stack([torch.zeros_like(several[0]), *several], -2)
        split = (self.heads, self.rank // self.heads)  # [B, T, K + 1, H, r / H] -> attention over K + 1
        q, keys, values = (x.unflatten(-1, split).transpose(-2, -3) for x in (q, keys, values))
        shares = (q @ keys.transpose(-1, -2) * split[1] ** -0.5).softmax(-1)
        mixed: torch.Tensor = (shares @ values).squeeze(-2).flatten(-2)
        return mixed

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.none)


class Cross(Fuser):
    """Attention over all donor tokens that have ended."""

    reads_tokens = True

    def build(self, hidden: int, widths: list[int]) -> None:
        self.host_norm = Norm(hidden, self.kind)
        self.query = nn.Linear(hidden, self.rank, bias=False)
        self.keys, self.values = projections(widths, self.rank), projections(widths, self.rank)
        self.slopes = nn.Parameter(torch.empty(self.heads))

    def join(self, h: torch.Tensor, found: list[torch.Tensor], features: Features) -> torch.Tensor:
        q = self.heads_of(self.query(self.host_norm(h)))
        nothing = q.new_zeros(q.shape[0], 1, self.rank)
        keys, values, bias = [nothing], [nothing], [q.new_zeros(q.shape[0], self.heads, q.shape[2], 1)]
        for norm, to_keys, to_values, memory in zip(self.norms, self.keys, self.values, features.memories, strict=True):
            tokens = norm(memory.new.to(q.device, q.dtype))
            k, v = memory.extend(self.site, to_keys(tokens), to_values(tokens))
            keys.append(k)
            values.append(v)
            distance = (memory.at[:, :, None] - memory.positions[:, None]).to(q.device)
            valid = memory.valid if memory.valid.ndim == 3 else memory.valid[:, None]
            seen = (distance >= 0) & valid.to(q.device)
            near = -self.slopes[:, None, None] * distance[:, None].to(q.dtype)
            bias.append(near.masked_fill(~seen[:, None], float("-inf")))
        k, v = self.heads_of(torch.cat(keys, 1)), self.heads_of(torch.cat(values, 1))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat(bias, -1))
        return mixed.transpose(1, 2).flatten(-2)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        initialization.copy_(self.slopes, 0.5 * 2.0 ** torch.arange(self.heads))


MODES: dict[str, type[Fuser]] = {"concat": Concat, "weighted": Weighted, "gate": Gate, "attention": Attention, "cross": Cross}
