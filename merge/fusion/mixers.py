"""What the donors expect next, mixed into what the host expects: distributions over the host's vocabulary, by table.

    z, p_h         [B, T, V]    the host's logits and their softmax; T: the positions whose logits are asked for
    h              [B, T, d]    the host's last state, after its final norm
    f_m            [B, T, D_m]  the last state of donor m, after its final norm, at the last of its tokens that ended no later
                                than the host's; zero where there is none yet, and then q_m = p_h
    p_m            [B, T, U_m]  what donor m expects after that token
    q_m            [B, T, V]    the same carried to the host's vocabulary (`carry`; `vocabulary.Bridge` has the formula)
    begins, lands  [V], [U_m]   the tables of the bridge, -1 for nothing

    mixture      p = (1 - sum_m g_m) p_h + sum_m g_m q_m  with  g = s softmax(G [n(h); n(f_1); ..; n(f_M)] + b) over the host,
                 entry 0, and the donors; n: unit size, without gain
    linear       the same with g_m = weight / M at every position
    geometric    p ~ p_h^(1 - weight) prod_m q_m^(weight / M)

What comes back are logits whose softmax is p: z + log1p(sum_m g_m (q_m / p_h - 1)). s is zero at first, so that it is z that
comes back, bit for bit in any dtype. Distributions are in float32, whatever the models are in.

Memory: a float32 [B, T, V] for every donor, and three more for the sum; training keeps two for every donor. Llama-3's
vocabulary has 0.5 MB of them at a position, so that scoring 2,048 at once with one donor takes about 4 GB beside the host's own
logits, and generating nothing. What else it takes to carry a distribution, ROWS positions at a time, is small beside that.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from .fusers import EPS

ROWS = 256  # positions
LIMIT = 60.0  # of |log q - log p_h|: exp stays a float32
TINY = 1e-30  # of probabilities that something is divided by
LEAST = 2.0**-24  # of p / p_h, the least that float32 tells from nothing beside 1: logits stay finite
PACE = 10.0  # s per unit of its parameter: it has to come from 0 to about 1 at a learning rate that suits matrices


def carry(p_host: torch.Tensor, p_donor: torch.Tensor, begins: torch.Tensor, lands: torch.Tensor) -> torch.Tensor:
    """q [..., V] of p_h [..., V] and p_m [..., U]; sums to 1, or is 0 where nothing that the donor says has a counterpart."""
    weight = p_host.clamp(min=TINY) * (begins >= 0)  # tokens that all begin alike and are all without mass share evenly
    first, landing = (table.clamp(min=0).long() for table in (begins, lands))
    alike = torch.zeros_like(p_donor).scatter_add_(-1, first.expand_as(weight), weight)
    q = weight * (p_donor / alike.clamp(min=TINY)).gather(-1, first.expand_as(weight))
    q.scatter_add_(-1, landing.expand_as(p_donor), p_donor * (lands >= 0))
    return q / q.sum(-1, keepdim=True).clamp(min=TINY)


@torch.no_grad()
def log_ratio(
    z: torch.Tensor,
    state: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    begins: torch.Tensor,
    lands: torch.Tensor,
) -> torch.Tensor:
    """log (q_m / p_h) [B, T, V] within LIMIT; 0 where the donor says nothing.

    Args:
        state: f_m [B, T, D_m]; `head` makes logits [rows, U_m] of rows of it.
    """
    begins, lands = begins.to(z.device), lands.to(z.device)
    found = []
    for some, f in zip(z.flatten(0, 1).split(ROWS), state.flatten(0, 1).split(ROWS), strict=True):
        log_p = some.float().log_softmax(-1)
        q = carry(log_p.exp(), head(f).to(z.device).float().softmax(-1), begins, lands)
        heard = (f != 0).any(-1, keepdim=True).to(z.device) & (q > 0).any(-1, keepdim=True)
        found.append((q.log() - log_p).clamp(-LIMIT, LIMIT).where(heard, 0.0))
    return torch.cat(found).view(z.shape)


def weighed(shares: torch.Tensor, values: Iterable[torch.Tensor]) -> torch.Tensor:
    """sum_m g_m x_m [..., V] of shares [..., M]."""
    found = shares.new_zeros(())
    for m, value in enumerate(values):
        found = found + shares[..., m, None] * value
    return found


class _Held(torch.autograd.Function):
    """s from 0 to 1; at the ends, where `clamp` would have no gradient again, the gradient that leads back."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(s)
        return s.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (s,), (gradient,) = ctx.saved_tensors, gradients
        outward = ((s <= 0) & (gradient > 0)) | ((s >= 1) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0)


def held(s: torch.Tensor) -> torch.Tensor:
    """s within 0 and 1, from where training can lead it back."""
    found: torch.Tensor = _Held.apply(s)
    return found


class Mixer(nn.Module):
    """Base of the modes that fuse outputs: fixed weights, and the sum of distributions.

    Args:
        hidden, widths: d and all D_m.
        weight: what all donors have together, where it is fixed.
    """

    settings: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, hidden: int, widths: list[int], weight: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.build(hidden, widths)
        self.reset_parameters()

    def build(self, hidden: int, widths: list[int]) -> None:
        """Adds what the mode needs."""

    def reset_parameters(self) -> None:
        """Parameters before training: the result is the host's."""

    def shares(self, h: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """g [B, T, M], or what broadcasts to it."""
        return torch.full((len(states),), self.weight / len(states), device=h.device)

    def gain(self, shares: torch.Tensor, ratios: list[torch.Tensor]) -> torch.Tensor:
        """log (p / p_h) [B, T, V], but for a constant at every position."""
        return weighed(shares, (ratio.expm1() for ratio in ratios)).clamp(min=LEAST - 1).log1p()

    def forward(self, z: torch.Tensor, h: torch.Tensor, states: list[torch.Tensor], ratios: list[torch.Tensor]) -> torch.Tensor:
        """Logits [B, T, V] in the dtype of z; `ratios` of all donors by `log_ratio`."""
        gain = self.gain(self.shares(h, states).to(z.device), ratios)
        return (z + gain).to(z.dtype)


class Mixture(Mixer):
    """Weights that the states decide."""

    settings = ()

    def build(self, hidden: int, widths: list[int]) -> None:
        self.gate = nn.Linear(hidden + sum(widths), len(widths) + 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate.weight, std=self.gate.in_features**-0.5)
        nn.init.zeros_(self.gate.bias)
        nn.init.zeros_(self.scale)

    def shares(self, h: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        units = [functional.rms_norm(x.to(h.device).float(), x.shape[-1:], None, EPS) for x in (h, *states)]
        shares = self.gate(torch.cat(units, -1).to(self.gate.weight.dtype)).float().softmax(-1)[..., 1:]
        found: torch.Tensor = held(PACE * self.scale.float()) * shares
        return found


class Linear(Mixer):
    """The same weights everywhere."""


class Geometric(Mixer):
    """The same weights everywhere, for logarithms: what one of them excludes is excluded, within LIMIT."""

    def gain(self, shares: torch.Tensor, ratios: list[torch.Tensor]) -> torch.Tensor:
        return weighed(shares, ratios)


MODES: dict[str, type[Mixer]] = {"mixture": Mixture, "linear": Linear, "geometric": Geometric}
