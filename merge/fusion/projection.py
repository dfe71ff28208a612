"""Projected RegMean: the write matrices of a host moved towards what a donor of any architecture writes.

Every layer adds to the residual stream twice, through `self_attn.o_proj` and `mlp.down_proj`. For the host's layer l and the
donor's layer pi(l), at n aligned positions (rows; both tokens end at the same byte):

    R [n, d], R_d [n, e]    the residual streams as they leave the two layers
    B [d, e]                the donor's basis in the host's: R ~ R_d B^T
    Z [n, f], Y [n, d]      what the host's write matrix W [d, f] reads, and what it writes
    Y_d [n, e]              what the donor writes at that place, behind its post-norm where it has one

    W <- W + alpha (Y_d B^T - Y)^T Z (Z^T Z + lambda I)^-1

which is the W' that is best for |Z W'^T - (Y + alpha (Y_d B^T - Y))|^2 + lambda |W' - W|^2: the regression of RegMean (Jin et
al., arXiv 2212.09849) with a target that comes from another architecture. What reads the stream, norms, embeddings and head
stay the host's. The formulas need nothing but sums over positions of products of two of these quantities, so texts are
streamed and no activations are kept.

The honest expectation is that this does not help without training afterwards (docs/weight-projection.md): independently trained
layers write different things. It is exact where there is something to find: a donor that is the host in another basis, with
neurons and heads in another order, changes nothing at any alpha.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..publish import check_target, new_folder
from ..records import SCHEMA_VERSION
from .byte_tables import Encode
from .errors import FusionError
from .vocabulary import VocabularyMap

ALPHAS = (0.0, 0.05, 0.1, 0.25)
RIDGE = 1e-6  # lambda over the mean diagonal of what it is added to; small, as a few huge states of first tokens make that mean
MAX_TOKENS = 512  # of a text, in host tokens
SKETCH = 256  # directions in which wider states are compared, so that all pairs of layers fit in memory
UNEXPLAINED = 0.05  # share of a state that may differ from the sum of what was read, for bfloat16; other designs miss more
REPORT_FILE = "projection.json"

WRITES = {  # where a layer writes -> its matrix, and the norm between matrix and residual stream that some families have
    "attention": ("self_attn.o_proj", "post_attention_layernorm"),
    "mlp": ("mlp.down_proj", "post_feedforward_layernorm"),
}
POST_NORMED = "post_feedforward_layernorm"  # only layers that have it use the other one behind attention, not before the MLP


# ---------------------------------------------------------------------------------------------------------------------
# Alignment: which positions of two token sequences stand for the same bytes


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


def same_tokens(encode: Encode, max_tokens: int = MAX_TOKENS) -> Align:
    """For models with one tokenizer: every token is aligned with itself. `encode` gives the ids of texts."""

    def align(texts: Sequence[str]) -> Aligned:
        rows = [list(row)[:max_tokens] for row in encode(texts)]
        ids, positions = _padded(rows), _pairs([range(len(row)) for row in rows])
        return Aligned(ids, ids, positions, positions)

    return align


def mapped_tokens(encode: Encode, table: VocabularyMap, max_tokens: int = MAX_TOKENS) -> Align:
    """For a donor with another vocabulary, which reads the host's tokens through `table`: each with the last it became.

    Host tokens that the donor does not see have no position.
    """

    lengths = table.counts.tolist()

    def align(texts: Sequence[str]) -> Aligned:
        host = [list(row)[:max_tokens] for row in encode(texts)]
        donor = [table.expand(row) for row in host]
        counts = [[lengths[token] for token in row] for row in host]
        ends = [list(itertools.accumulate(row)) for row in counts]
        seen = [[i for i, count in enumerate(row) if count] for row in counts]
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


# ---------------------------------------------------------------------------------------------------------------------
# Records


@dataclass(frozen=True)
class LayerReport:
    """Layer l of the host and pi(l) of the donor.

    cka    similarity of their residual streams; None where the depth map was given
    gaps   |Y_d B^T - Y| / |Y| for attention and mlp: 0 for the same function, 1 for as far as writing nothing
    """

    layer: int
    donor_layer: int
    cka: float | None
    gaps: dict[str, float]


@dataclass(frozen=True)
class ProjectionReport:
    """How a projection was made and how far the donor's writes are from the host's; `positions` is n."""

    basis: str
    ridge: float
    positions: int
    layers: tuple[LayerReport, ...]

    @property
    def depth_map(self) -> tuple[int, ...]:
        """pi, for every layer of the host."""
        return tuple(one.donor_layer for one in self.layers)

    @property
    def mean_gap(self) -> float:
        """The mean relative gap over all write matrices."""
        gaps = [gap for one in self.layers for gap in one.gaps.values()]
        return sum(gaps) / len(gaps)


@dataclass(frozen=True)
class Projection:
    """The full step (alpha = 1) of every write matrix by its parameter's name in the host, and how it came about."""

    deltas: Mapping[str, torch.Tensor]
    report: ProjectionReport

    def weights(self, host: PreTrainedModel, alpha: float) -> dict[str, torch.Tensor]:
        """W + alpha delta for every write matrix, in the host's dtype; bit for bit the host's where alpha is 0.

        Raises:
            FusionError: alpha is not in 0..1, or the host is not the one of the projection.
        """
        if not 0.0 <= alpha <= 1.0:
            raise FusionError(f"alpha is {alpha}; expected 0 (the host) to 1 (the donor's writes, as far as they can be had)")
        own = dict(host.named_parameters())
        found = {}
        for name, delta in self.deltas.items():
            if name not in own or own[name].shape != delta.shape:
                shape = tuple(own[name].shape) if name in own else "absent"
                raise FusionError(f"{name} is {shape} in this model, expected {tuple(delta.shape)}; give the projection's host")
            weight = own[name].detach()
            moved = (weight.to(delta.dtype) + alpha * delta.to(weight.device)).to(weight.dtype)
            found[name] = moved if alpha else weight.clone()
        return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss by alpha, that of the host (0) among them."""

    losses: Mapping[float, float]

    def __post_init__(self) -> None:
        if 0.0 not in self.losses:
            raise FusionError(f"held-out loss was measured at alpha {[*self.losses]}; expected 0, the host, among them")

    @property
    def alpha(self) -> float:
        """The best alpha: 0 unless another one's loss is lower."""
        return min((alpha for alpha in sorted(self.losses) if not self.rises(alpha)), key=lambda alpha: self.losses[alpha])

    def rises(self, alpha: float) -> bool:
        """Whether the loss is above the host's, or not a number.

        Raises:
            FusionError: the loss at this alpha was not measured.
        """
        if alpha not in self.losses:
            raise FusionError(f"held-out loss at alpha {alpha} is not known; it was measured at {[*self.losses]}")
        return alpha != 0.0 and not self.losses[alpha] <= self.losses[0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Project, choose, save


def merge_projected(
    host: PreTrainedModel, donor: PreTrainedModel, texts: Sequence[str], align: Align, *, alpha: float, **options: Any
) -> tuple[dict[str, torch.Tensor], ProjectionReport]:
    """The write matrices of the merged model by name, and the report; every other tensor is the host's.

    `options` and errors are those of `project`, which is to be preferred where several alphas are tried.
    """
    projection = project(host, donor, texts, align, **options)
    return projection.weights(host, alpha), projection.report


def project(
    host: PreTrainedModel,
    donor: PreTrainedModel,
    texts: Sequence[str],
    align: Align,
    *,
    basis: str = "ridge",
    ridge: float = RIDGE,
    depth_map: Sequence[int] | None = None,
    batch_size: int = 8,
    layers_per_pass: int | None = None,
) -> Projection:
    """Moments of texts through both models, then the step of every write matrix; neither model is changed.

    Args:
        host, donor: decoders in evaluation mode; of the donor, the head is not used.
        basis: one of BASES.
        ridge: lambda, relative to the mean diagonal.
        depth_map: pi; by default the non-decreasing map with the largest sum of CKA, which takes one more pass.
        batch_size: texts that are run at once.
        layers_per_pass: host layers whose moments (f x f in float64 for each write matrix) are held at once; by default all,
            with fewer the texts are run several times.

    Raises:
        FusionError: a host with post-norms, a model of a kind whose writes cannot be read, states that are not finite, no
            aligned position, an unknown basis, or a depth map that does not fit.
    """
    if basis not in BASES:
        raise FusionError(f"there is no basis {basis!r}; known: {', '.join(BASES)}")
    if not (math.isfinite(ridge) and ridge > 0):
        raise FusionError(f"ridge is {ridge}; expected a number above 0")
    for what, number in (("batch_size", batch_size), ("layers_per_pass", layers_per_pass)):
        if number is not None and number < 1:
            raise FusionError(f"{what} is {number}; expected at least 1")
    into, out_of = _decoder(host, "host"), _decoder(donor, "donor")
    _check_host(into)
    if depth_map is not None:
        _check_depth_map(depth_map, into, out_of)
    batches = [align(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    batches = [batch for batch in batches if len(batch.host_positions)]
    if not batches:
        raise FusionError(
            f"the alignment of {len(texts)} texts has no positions; expected some tokens that end at the same byte"
        )
    _check_writes(into, batches[0].host_ids)
    _check_writes(out_of, batches[0].donor_ids)

    if depth_map is None:
        cka = layer_cka(into, out_of, batches)
        pi = match_depths(cka)
    else:
        cka, pi = None, tuple(depth_map)
    names = {module: name for name, module in host.named_modules()}
    deltas, reports = {}, []
    step = layers_per_pass or len(pi)
    for first in range(0, len(pi), step):
        states, writes = collect(
            into, out_of, batches, {layer: m for layer, m in enumerate(pi) if first <= layer < first + step}
        )
        for layer, state in states.items():
            turn = BASES[basis](state["rd"], state["dd"], ridge)
            gaps = {}
            for place in WRITES:
                matrix = into.matrix(layer, place)
                delta, gaps[place] = write_step(writes.pop((layer, place)), turn, ridge)
                deltas[f"{names[matrix]}.weight"] = delta.to(torch.promote_types(matrix.weight.dtype, torch.float32))
            score = None if cka is None else float(cka[layer, pi[layer]])
            reports.append(LayerReport(layer, pi[layer], score, gaps))
    positions = sum(len(batch.host_positions) for batch in batches)
    return Projection(deltas, ProjectionReport(basis, ridge, positions, tuple(reports)))


def choose_alpha(
    host: PreTrainedModel,
    projection: Projection,
    loss: Callable[[PreTrainedModel], float],
    alphas: Sequence[float] = ALPHAS,
) -> HeldOut:
    """`loss`, without gradients, of the host and of the merged models; the host is left as it was, bit for bit."""
    losses = {}
    for alpha in sorted({0.0, *alphas}):
        with replaced(host, projection.weights(host, alpha)), torch.no_grad():
            losses[alpha] = float(loss(host))
    return HeldOut(losses)


def save(
    host: PreTrainedModel,
    projection: Projection,
    held_out: HeldOut,
    folder: Path,
    *,
    alpha: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> float:
    """Writes the merged model as a folder that `from_pretrained` opens, with projection.json; returns alpha.

    Args:
        alpha: by default the best of `held_out`.
        force: save although held-out loss rises.

    Raises:
        FusionError: held-out loss rises, or was not measured at this alpha; nothing was written.
        OutputError: the folder is in use or cannot be written; nothing is left.
    """
    alpha = held_out.alpha if alpha is None else alpha
    if held_out.rises(alpha) and not force:
        raise FusionError(
            f"held-out loss rises from {held_out.losses[0.0]:.4f} to {held_out.losses[alpha]:.4f} at alpha {alpha}; "
            f"the best alpha is {held_out.alpha}; to save it nonetheless, give force (--force)"
        )
    check_target(folder, overwrite=overwrite, marker=REPORT_FILE)
    record = {"schema_version": SCHEMA_VERSION, "alpha": alpha, **asdict(projection.report)}
    record["held_out"] = [
        {"alpha": one, "loss": loss if math.isfinite(loss) else None} for one, loss in held_out.losses.items()
    ]
    with new_folder(folder, overwrite=overwrite, marker=REPORT_FILE) as scratch:
        with replaced(host, projection.weights(host, alpha)):
            host.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        (scratch / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return alpha


@contextmanager
def replaced(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model with other values for some parameters; afterwards it has the very tensors that it had before."""
    own = dict(model.named_parameters())
    kept = {name: own[name].data for name in weights}
    try:
        for name, value in weights.items():
            own[name].data = value
        yield
    finally:
        for name, value in kept.items():
            own[name].data = value


# ---------------------------------------------------------------------------------------------------------------------
# Moments


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


def collect(host: "Decoder", donor: "Decoder", batches: Sequence[Aligned], pairs: Mapping[int, int]) -> tuple[States, Writes]:
    """The moments of some host layers with their donor layers, in one pass over the texts."""
    states = {layer: Moments(*STATE_PAIRS) for layer in pairs}
    writes = {(layer, place): Moments(*WRITE_PAIRS) for layer in pairs for place in WRITES}
    for batch in batches:
        _add_batch(host, donor, batch, pairs, states, writes)
    return states, writes


def _add_batch(
    host: "Decoder", donor: "Decoder", batch: Aligned, pairs: Mapping[int, int], states: States, writes: Writes
) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# From moments to maps and steps


def layer_cka(host: "Decoder", donor: "Decoder", batches: Sequence[Aligned]) -> torch.Tensor:
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


# ---------------------------------------------------------------------------------------------------------------------
# The models


Hooks = dict[nn.Module, Callable[[torch.Tensor, torch.Tensor], None]]
"""By module, what is called with its first input and its output."""


@dataclass(frozen=True)
class Decoder:
    """A model as its layers; `side` is host or donor."""

    side: str
    base: nn.Module
    layers: tuple[nn.Module, ...]

    def matrix(self, layer: int, place: str) -> nn.Linear:
        """The write matrix at a place of WRITES."""
        found = self.layers[layer].get_submodule(WRITES[place][0])
        assert isinstance(found, nn.Linear)
        return found

    def writer(self, layer: int, place: str) -> nn.Module:
        """The module whose output enters the residual stream: the matrix, or the norm behind it."""
        return getattr(self.layers[layer], WRITES[place][1]) if self.post_normed else self.matrix(layer, place)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.matrix(0, "mlp").out_features

    @property
    def post_normed(self) -> bool:
        """Whether norms stand between write matrices and the residual stream (Gemma 2 and 3)."""
        return hasattr(self.layers[0], POST_NORMED)

    @torch.no_grad()
    def run(self, ids: torch.Tensor, hooks: Hooks) -> None:
        """One pass without the head."""

        def call(see: Callable[[torch.Tensor, torch.Tensor], None], _: nn.Module, inputs: Any, output: Any) -> None:
            see(inputs[0], output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(partial(call, see)) for module, see in hooks.items()]
        try:
            embedding: nn.Module = self.base.get_input_embeddings()  # type: ignore[operator]
            self.base(input_ids=ids.to(next(embedding.parameters()).device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


def _decoder(model: PreTrainedModel, side: str) -> Decoder:
    """Raises FusionError for a model without the layers and matrices that are known here, or in training mode."""
    base = model.base_model
    layers = getattr(base, "layers", None)
    name = f"the {side} ({getattr(model.config, 'model_type', type(model).__name__)})"
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise FusionError(
            f"{name} has no list of layers `model.layers`; expected a decoder such as Llama, Mistral, Phi-3, Gemma 2"
        )
    for number, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for path, _ in WRITES.values():
            matrix = modules.get(path)
            if not isinstance(matrix, nn.Linear) or not matrix.weight.is_floating_point() or matrix.weight.is_meta:
                found = "absent" if matrix is None else f"a {type(matrix).__name__}"
                raise FusionError(f"{name}: {path} of layer {number} is {found}; expected a plain, loaded matrix of floats")
    if model.training:
        raise FusionError(f"{name} is in training mode, where dropout changes what layers write; call its eval()")
    return Decoder(side, base, tuple(layers))


def _check_host(host: Decoder) -> None:
    """Raises FusionError for a host with post-norms: what it writes is no linear function of its write matrices."""
    if host.post_normed:
        raise FusionError(
            "the host has norms behind its write matrices (post_attention_layernorm, post_feedforward_layernorm), so no matrix "
            "can be solved for what enters the residual stream; take it as donor, and a model without them as host"
        )


def _check_writes(decoder: Decoder, ids: torch.Tensor) -> None:
    """Raises FusionError unless each layer adds to its input what was read as written.

    Families that scale what they write, or write elsewhere too, have the same names of modules.
    """
    written: dict[int, torch.Tensor] = {}

    def write(layer: int, _: torch.Tensor, output: torch.Tensor) -> None:
        written[layer] = output + written[layer] if layer in written else output

    def leave(layer: int, entered: torch.Tensor, left: torch.Tensor) -> None:
        missing = float((left - entered - written.pop(layer)).float().norm()) / max(float(left.float().norm()), 1e-30)
        if missing > UNEXPLAINED:
            raise FusionError(
                f"the {decoder.side}: layer {layer} does not add to its input what its {' and '.join(WRITES)} write "
                f"({missing:.0%} of its output is something else); this family cannot be projected"
            )

    hooks: Hooks = {
        decoder.writer(layer, place): partial(write, layer) for layer in range(len(decoder.layers)) for place in WRITES
    }
    decoder.run(ids, hooks | {layer: partial(leave, number) for number, layer in enumerate(decoder.layers)})


def _check_depth_map(depth_map: Sequence[int], host: Decoder, donor: Decoder) -> None:
    L, M = len(host.layers), len(donor.layers)
    fits = all(type(m) is int and 0 <= m < M for m in depth_map) and list(depth_map) == sorted(depth_map)
    if len(depth_map) != L or not fits:
        raise FusionError(f"the depth map is {list(depth_map)}; expected {L} donor layers from 0 to {M - 1}, in order")
