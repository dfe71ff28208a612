"""Sums over positions of products of two models' states, and what follows from them: similarity, bases, steps.

Texts are streamed; no activations are kept but those of one batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .decoders import WRITES, Decoder, Hooks
from .errors import FusionError
from .positions import Aligned

SKETCH = 256  # directions in which wider states are compared, so that all pairs of layers fit in memory


class Moments:
    """Sums over positions of products x^T y, in float64, whatever pieces the positions come in.

    >>> moments = Moments("zz", "yz")
    >>> moments.add(z=torch.ones(3, 2), y=torch.ones(3, 1))
    >>> moments["yz"].tolist()
    [[3.0, 3.0]]
    """

    def __init__(self, *pairs: str) -> None:
        self.pairs = pairs
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, **values: torch.Tensor) -> None:
        """More positions: [n, D] for each quantity, all on one device."""
        wide = {name: value.double() for name, value in values.items()}
        for pair in self.pairs:
            product = wide[pair[0]].T @ wide[pair[1]]
            self._sums[pair] = self._sums[pair].add_(product) if pair in self._sums else product

    def __getitem__(self, pair: str) -> torch.Tensor:
        return self._sums[pair]


STATE_PAIRS = ("rd", "dd")  # r: R, d: R_d
WRITE_PAIRS = ("zz", "yz", "dz", "yy", "dy", "dd")  # z: Z, y: Y, d: Y_d
States = dict[int, Moments]  # by host layer
Writes = dict[tuple[int, str], Moments]  # by host layer and place


def collect(
    host: Decoder,
    donor: Decoder,
    batches: Sequence[Aligned],
    pairs: Mapping[int, int],
    progress: Callable[[int], object] = lambda positions: None,
) -> tuple[States, Writes]:
    """The moments of some host layers with their donor layers, in one pass over the texts."""
    states = {layer: Moments(*STATE_PAIRS) for layer in pairs}
    writes = {(layer, place): Moments(*WRITE_PAIRS) for layer in pairs for place in WRITES}
    for batch in batches:
        _add_batch(host, donor, batch, pairs, states, writes)
        progress(len(batch.host_positions))
    return states, writes


def _add_batch(host: Decoder, donor: Decoder, batch: Aligned, pairs: Mapping[int, int], states: States, writes: Writes) -> None:
    """The donor's states of the batch are held; the host's are summed up layer by layer, as they come."""
    left: dict[int, torch.Tensor] = {}
    written: dict[tuple[int, str], torch.Tensor] = {}

    def keep(found: dict[Any, torch.Tensor], key: Any, _: torch.Tensor, output: torch.Tensor) -> None:
        found[key] = _rows(output, batch.donor_positions)

    def add_state(layer: int, _: torch.Tensor, output: torch.Tensor) -> None:
        state = _rows(output, batch.host_positions)
        states[layer].add(r=state, d=left[pairs[layer]].to(state.device))

    def add_write(layer: int, place: str, read: torch.Tensor, output: torch.Tensor) -> None:
        z, y = _rows(read, batch.host_positions), _rows(output, batch.host_positions)
        writes[layer, place].add(z=z, y=y, d=written[pairs[layer], place].to(y.device))

    of_donor: Hooks = {donor.layers[m]: partial(keep, left, m) for m in pairs.values()}
    of_donor |= {donor.writer(m, place): partial(keep, written, (m, place)) for m in pairs.values() for place in WRITES}
    donor.run(batch.donor_ids, of_donor)
    of_host: Hooks = {host.layers[layer]: partial(add_state, layer) for layer in pairs}
    of_host |= {host.matrix(layer, place): partial(add_write, layer, place) for layer, place in writes}
    host.run(batch.host_ids, of_host)


def _rows(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[b, T, D] -> [n, D], the states at some positions."""
    at = at.to(states.device)
    found = states[at[:, 0], at[:, 1]]
    if not bool(found.isfinite().all()):
        raise FusionError("a model's states are not finite on these texts; run it in bfloat16 or float32, not in float16")
    return found


def layer_cka(
    host: Decoder,
    donor: Decoder,
    batches: Sequence[Aligned],
    progress: Callable[[int], object] = lambda positions: None,
) -> torch.Tensor:
    """Linear CKA of the residual streams that leave every host layer and every donor layer: float64 [L, M].

    |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred states (Kornblith et al., arXiv 1905.00414, section 3). Where states are wider
    than SKETCH, |X^T Y|^2 is estimated from P^T X^T Y Q with random orthonormal columns P, Q, which keep a known share of it.
    """
    sides = (host, donor)
    own = [[Moments("xx", "ox") for _ in side.layers] for side in sides]  # o: ones, for the means
    cross = [[Moments("xy", "ox", "oy") for _ in donor.layers] for _ in host.layers]
    sketches = [_sketch(side.width, seed=seed) for seed, side in enumerate(sides)]
    left: dict[int, torch.Tensor] = {}

    def see(side: int, layer: int, at: torch.Tensor, _: torch.Tensor, output: torch.Tensor) -> None:
        x = _rows(output, at).double()
        ones = x.new_ones(len(x), 1)
        own[side][layer].add(x=x, o=ones)
        x = x @ sketches[side].to(x.device)
        if side == 1:
            left[layer] = x
        else:
            for m, y in left.items():
                cross[layer][m].add(x=x, y=y.to(x.device), o=ones)

    for batch in batches:  # the donor first: its states of a batch wait for the host's
        for side, ids, at in ((1, batch.donor_ids, batch.donor_positions), (0, batch.host_ids, batch.host_positions)):
            sides[side].run(ids, {layer: partial(see, side, i, at) for i, layer in enumerate(sides[side].layers)})
        progress(len(batch.host_positions))
    positions = sum(len(batch.host_positions) for batch in batches)
    norms = [[float(_centred(one, "xx", positions).norm()) for one in side] for side in own]
    found = [[float(_centred(one, "xy", positions).square().sum()) for one in row] for row in cross]
    share = math.prod(sketch.shape[1] / sketch.shape[0] for sketch in sketches)
    squares, one, two = (torch.tensor(values, dtype=torch.float64) for values in (found, *norms))
    return squares / share / torch.outer(one, two).clamp(min=1e-300)


def _centred(moments: Moments, pair: str, positions: int) -> torch.Tensor:
    """A sum of products as if the means had been taken off first."""
    one, two = (moments[f"o{name}"] for name in pair)
    return moments[pair] - one.T @ two / positions


def _sketch(width: int, *, seed: int) -> torch.Tensor:
    """SKETCH random orthonormal directions [width, SKETCH]; the identity for states that are not wider."""
    if width <= SKETCH:
        return torch.eye(width, dtype=torch.float64)
    drawn = torch.randn(width, SKETCH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found: torch.Tensor = torch.linalg.qr(drawn).Q
    return found


def match_depths(similarity: torch.Tensor) -> tuple[int, ...]:
    """The non-decreasing map of host layers to donor layers with the largest sum of similarities [L, M], in O(L M)."""
    best, back = similarity[0], []
    for row in similarity[1:]:
        reached, come_from = best.cummax(0)
        best = row + reached
        back.append(come_from)
    path = [int(best.argmax())]
    for come_from in reversed(back):
        path.append(int(come_from[path[-1]]))
    return tuple(reversed(path))


def ridge_basis(cross: torch.Tensor, gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """B = R^T R_d (R_d^T R_d + lambda I)^-1: the best linear map from the donor's stream to the host's; [d, e]."""
    return _solved(gram, cross, ridge)


def procrustes_basis(cross: torch.Tensor, gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """B = U V^T of R^T R_d = U S V^T: the best map that keeps lengths, as far as d and e allow; [d, e]."""
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    found: torch.Tensor = left @ right
    return found


BASES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "ridge": ridge_basis,
    "procrustes": procrustes_basis,
}


def write_step(moments: Moments, basis: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """(Y_d B^T - Y)^T Z (Z^T Z + lambda I)^-1, [d, f], and |Y_d B^T - Y| / |Y|, both from moments alone.

    The squared gap is tr(B Y_d^T Y_d B^T) - 2 tr(B Y_d^T Y) + tr(Y^T Y), so gaps below 1e-8 are rounding.
    """
    basis = basis.to(moments["zz"].device)
    step = _solved(moments["zz"], basis @ moments["dz"] - moments["yz"], ridge)
    own = float(moments["yy"].trace())
    gap = float(((basis @ moments["dd"]) * basis).sum()) - 2.0 * float((basis * moments["dy"].T).sum()) + own
    return step, math.sqrt(max(gap, 0.0) / max(own, 1e-300))


def _solved(gram: torch.Tensor, rows: torch.Tensor, ridge: float) -> torch.Tensor:
    """rows (gram + ridge mean(diag gram) I)^-1; 0 where nothing was read."""
    size = max(ridge * float(gram.diagonal().mean()), torch.finfo(gram.dtype).tiny)
    raised = gram.clone()
    raised.diagonal().add_(size)
    return torch.cholesky_solve(rows.T, torch.linalg.cholesky(raised)).T.contiguous()
