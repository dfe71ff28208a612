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

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..publish import check_target, new_folder
from ..records import SCHEMA_VERSION
from .decoders import WRITES, check_depth_map, check_host, check_writes, decoder_of
from .errors import FusionError
from .moments import BASES, collect, layer_cka, match_depths, write_step
from .positions import Align

ALPHAS = (0.0, 0.05, 0.1, 0.25)
RIDGE = 1e-6  # lambda over the mean diagonal of what it is added to; small, as a few huge states of first tokens make that mean
REPORT_FILE = "projection.json"


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
    progress: Callable[[int], object] = lambda positions: None,
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
        progress: told of every batch's number of positions, in each of `passes`.

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
    into, out_of = decoder_of(host, "host"), decoder_of(donor, "donor")
    check_host(into)
    if depth_map is not None:
        check_depth_map(depth_map, into, out_of)
    batches = [align(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    batches = [batch for batch in batches if len(batch.host_positions)]
    if not batches:
        raise FusionError(
            f"the alignment of {len(texts)} texts has no positions; expected some tokens that end at the same byte"
        )
    check_writes(into, batches[0].host_ids)
    check_writes(out_of, batches[0].donor_ids)

    if depth_map is None:
        cka = layer_cka(into, out_of, batches, progress)
        pi = match_depths(cka)
    else:
        cka, pi = None, tuple(depth_map)
    names = {module: name for name, module in host.named_modules()}
    deltas, reports = {}, []
    step = layers_per_pass or len(pi)
    for first in range(0, len(pi), step):
        states, writes = collect(
            into, out_of, batches, {layer: m for layer, m in enumerate(pi) if first <= layer < first + step}, progress
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


def passes(layers: int, layers_per_pass: int | None, depth_map: Sequence[int] | None = None) -> int:
    """How often `project` runs the texts for a host with that many layers."""
    return (depth_map is None) + -(-layers // (layers_per_pass or layers))


def moment_bytes(host: PreTrainedModel) -> int:
    """What the moments of one host layer take, but for the small ones."""
    own = decoder_of(host, "host")
    return 8 * sum(own.matrix(0, place).in_features ** 2 for place in WRITES)


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
    names: Sequence[str] = ("host", "donor"),
    command: str = "",
    force: bool = False,
    overwrite: bool = False,
) -> float:
    """Writes the merged model as a folder that `from_pretrained` opens, with projection.json; returns alpha.

    Args:
        alpha: by default the best of `held_out`.
        names, command: of host and donor, for the model card.
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
        (scratch / "README.md").write_text(card(projection, held_out, alpha, names, command), encoding="utf-8")
    return alpha


def card(projection: Projection, held_out: HeldOut, alpha: float, names: Sequence[str], command: str) -> str:
    """The text of README.md, with what held-out loss says of the merge."""
    host, donor = names
    losses = "\n".join(f"| {one:g} | {loss:.4f} |" for one, loss in held_out.losses.items())
    verdict = "higher than the host's" if held_out.rises(alpha) else "no higher than the host's"
    return (
        f"---\nlibrary_name: transformers\ntags:\n- merge\n- layerfuse\n---\n\n# {host}, moved towards what {donor} writes\n\n"
        f"Made by layerfuse: projected RegMean at alpha {alpha:g}, {projection.report.basis} bases, "
        f"{projection.report.positions:,} positions; mean relative gap {projection.report.mean_gap:.3g}. Only `o_proj` and "
        f"`down_proj` differ from {host}. Held-out loss is {verdict}:\n\n| alpha | held-out loss |\n|---|---|\n{losses}\n\n"
        f"`{REPORT_FILE}` has every layer's match.\n\n## Command\n\n```\n{command}\n```\n"
    )


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
