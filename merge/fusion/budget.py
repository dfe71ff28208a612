"""Which models fit together below a parameter budget, worked out from their configs alone.

A fused model is a host (with its head, perhaps with layers fused away), donors (no head, no layer above the last tap) and
fusers: adapters at some of the host's layers, the sites, which read the hidden states that the donors' taps give. Where outputs
are mixed, donors keep all layers and their heads, and there is one mixer in place of the fusers. What counts is every unique
parameter of the saved model, strictly below the budget; buffers such as vocabulary maps do not count.

d   hidden size of the host
D   sum of the hidden sizes of all K taps; every site reads every tap
r   rank of a fuser, the width in which it works; H its attention heads
A tap is named by the layers that it follows: a donor tapped at 26 runs its first 26 layers.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..families import FAMILIES, Config
from ..shapes import tensor_shapes
from .errors import FusionError

BUDGET = 8_000_000_000
TAPS = (0.5, 0.75, 1.0)  # relative depths in a donor
MAX_FUSED = 0.5  # share of a host's layers; the published merge of Llama-3-8B fuses away 13 of 32
DEPTHS = (1.0, 0.8, 0.6, 0.4, 0.2)  # at which a short list cuts donors
HALF = 0.5  # a donor cut below this depth is in a short list only where nothing deeper fits

FUSER_MODES = ("concat", "weighted", "gate", "attention", "cross")
MIXER_MODES = ("mixture", "linear", "geometric")  # these read outputs
ATTENDING = ("attention", "cross")  # these norm the host's hidden state too, with a gain
NORMS = {"none": 0, "rms": 1, "layer": 2}  # parameters per channel


class BudgetError(FusionError):
    """A fused model has too many parameters; the message says which single change would fit."""


# ---------------------------------------------------------------------------------------------------------------------
# Counting


@dataclass(frozen=True)
class Backbone:
    """A model as the budget sees it, in parameters: `layer` of one layer, `rest` of embeddings and final norm.

    head: parameters of the output layer, 0 where it is tied to the embeddings.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    layer: int
    rest: int
    head: int

    def parameters(self, layers: int, *, head: bool = True) -> int:
        """Parameters with `layers` layers, as a host (with head) or as a donor (without).

        Raises:
            FusionError: the model does not have so many layers, or `layers` is below 1.
        """
        if not 1 <= layers <= self.num_hidden_layers:
            raise FusionError(f"{self.name} cannot have {layers} layers; expected 1 to {self.num_hidden_layers}")
        return self.rest + layers * self.layer + (self.head if head else 0)


def read_backbone(config: Config, name: str = "the model") -> Backbone:
    """The sizes of the model that `config` describes; `name` stands for it in messages.

    Raises:
        FusionError: the config lacks a size, or its model type is not one of FAMILIES.
    """
    if config.get("model_type") not in FAMILIES:
        found = config.get("model_type")
        raise FusionError(f"{name}: the sizes of model_type {found!r} are not known; known: {', '.join(FAMILIES)}")
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for key in (*required, "num_key_value_heads", "head_dim"):
        value = config.get(key)
        if (value is not None or key in required) and (type(value) is not int or value < 1):
            raise FusionError(f"{name}: {key!r} of its config is {value!r}, expected a whole number of at least 1")
    sizes = {key: math.prod(shape) for key, shape in tensor_shapes({**config, "num_hidden_layers": 1}).items()}
    layer = sum(size for key, size in sizes.items() if key.startswith("model.layers."))  # all layers are equally large
    head = sizes.get("lm_head.weight", 0)
    rest = sum(sizes.values()) - layer - head
    return Backbone(name, config["hidden_size"], config["num_hidden_layers"], layer, rest, head)


def backbone_parameters(config: Config, *, layers: int | None = None, head: bool = True) -> int:
    """Unique parameters of a host (`head=True`) or donor (`head=False`) with its first `layers` layers, by default all."""
    backbone = read_backbone(config)
    return backbone.parameters(backbone.num_hidden_layers if layers is None else layers, head=head)


def fuser_parameters(mode: str, hidden: int, widths: Sequence[int], rank: int, heads: int = 4, norm: str = "rms") -> int:
    """Parameters of the fuser at one site.

    Args:
        hidden: hidden size of the host.
        widths: hidden size behind every tap.
        heads: into which attention and cross split the rank; it has to divide the rank in every mode.
        norm: of every tap, and in attention and cross of the host's state: none, rms (gains) or layer (gains and offsets).

    Raises:
        FusionError: an unknown mode or norm, no taps, a size below 1, or heads that do not divide the rank.
    """
    if mode not in FUSER_MODES:
        raise FusionError(f"fusion mode {mode!r} is not known; known: {', '.join(FUSER_MODES)}")
    if norm not in NORMS:
        raise FusionError(f"norm {norm!r} is not known; known: {', '.join(NORMS)}")
    if not widths:
        raise FusionError("a fuser has no taps to read; expected at least one")
    for what, size in (("rank", rank), ("number of heads", heads), ("hidden size", min(hidden, *widths))):
        if size < 1:
            raise FusionError(f"a fuser's {what} is {size}, expected at least 1")
    if rank % heads:
        raise FusionError(f"rank {rank} is not divided by {heads} heads; expected a multiple of {heads}")
    d, D, K, r, H = hidden, sum(widths), len(widths), rank, heads
    matrices = {
        "concat": r * (d + D) + (K + 1) * r * d,
        "weighted": r * (d + D) + K,
        "gate": r * (d + D) + (K + 1) * (d + 1),
        "attention": 2 * r * (d + D) + r,  # r: the key of "no donor"
        "cross": 2 * r * (d + D) + H,  # H: how fast each head forgets older tokens
    }
    return matrices[mode] + NORMS[norm] * (D + (d if mode in ATTENDING else 0))


def mixer_parameters(mode: str, hidden: int, widths: Sequence[int]) -> int:
    """Parameters of a mixer: those of the mixture's gate over host and donors, and the scalar that it grows by; else none.

    Args:
        hidden: hidden size of the host.
        widths: hidden size of every donor.
    """
    return (len(widths) + 1) * (hidden + sum(widths) + 1) + 1 if mode == "mixture" else 0


# ---------------------------------------------------------------------------------------------------------------------
# A fused model as numbers


@dataclass(frozen=True)
class Fusers:
    """The setting of all fusers of a fused model: one fuser at each of `sites` layers of the host, each reads all taps.

    Of a mode that mixes outputs, the mode is all there is.
    """

    mode: str = "attention"
    rank: int = 256
    sites: int = 3
    heads: int = 4
    norm: str = "rms"

    @property
    def fuses_outputs(self) -> bool:
        """Whether donors keep all layers and their heads."""
        return self.mode in MIXER_MODES

    def parameters(self, hidden: int, widths: Sequence[int]) -> int:
        """Parameters of the fusers at all sites, or of the mixer."""
        if self.fuses_outputs:
            return mixer_parameters(self.mode, hidden, widths)
        if self.sites < 1:
            raise FusionError(f"the number of sites is {self.sites}, expected at least 1")
        return self.sites * fuser_parameters(self.mode, hidden, widths, self.rank, self.heads, self.norm)


@dataclass(frozen=True)
class Part:
    """What a fused model has of one model: its first `layers` layers or, of a host, as many after fusing others away.

    taps: of a donor, the layers after which its hidden state is read, ascending; the last is `layers`.
    """

    backbone: Backbone
    layers: int
    taps: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.backbone.name}[{self.layers}]"


@dataclass(frozen=True)
class Combination:
    """A host and its donors, none where the host stands alone, with the fusers and the budget that all together have."""

    host: Part
    donors: tuple[Part, ...] = ()
    fusers: Fusers = field(default_factory=Fusers)
    budget: int = BUDGET

    @property
    def fused_away(self) -> int:
        """Layers that the host has lost."""
        return self.host.backbone.num_hidden_layers - self.host.layers

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden size behind every tap."""
        return tuple(donor.backbone.hidden_size for donor in self.donors for _ in donor.taps)

    @property
    def backbone_parameters(self) -> int:
        """Parameters of the host with its head and of the donors, with theirs only where outputs are mixed."""
        donors = sum(donor.backbone.parameters(donor.layers, head=self.fusers.fuses_outputs) for donor in self.donors)
        return self.host.backbone.parameters(self.host.layers) + donors

    @property
    def fuser_parameters(self) -> int:
        """Parameters of all fusers."""
        return self.fusers.parameters(self.host.backbone.hidden_size, self.widths) if self.donors else 0

    @property
    def parameters(self) -> int:
        """All unique parameters."""
        return self.backbone_parameters + self.fuser_parameters

    @property
    def room(self) -> int:
        """What the backbones leave of the budget; fusers have to stay below it."""
        return self.budget - self.backbone_parameters

    @property
    def fits(self) -> bool:
        """Whether the parameters are strictly below the budget."""
        return self.parameters < self.budget

    def __str__(self) -> str:
        return " + ".join(str(part) for part in (self.host, *self.donors))


# ---------------------------------------------------------------------------------------------------------------------
# The largest that fits


def largest_host(combination: Combination) -> int:
    """The most host layers with which the combination fits, donors and fusers as they are; 0 where none do."""
    backbone = combination.host.backbone
    others = combination.parameters - combination.host.layers * backbone.layer
    return _most(combination.budget, others, backbone.layer, backbone.num_hidden_layers)


def largest_donor(combination: Combination, index: int) -> int:
    """The most layers of donor `index` with which the combination fits, with as many taps as it has; 0 where none do.

    All or none where outputs are mixed: a donor without its last layers says nothing of use.
    """
    donor = combination.donors[index]
    if combination.fusers.fuses_outputs:
        return donor.layers if combination.fits else 0
    others = combination.parameters - donor.layers * donor.backbone.layer
    most = _most(combination.budget, others, donor.backbone.layer, donor.backbone.num_hidden_layers)
    return most if most >= len(donor.taps) else 0


def largest_rank(combination: Combination) -> int:
    """The largest rank with which the combination fits; 0 where none does, or where outputs are mixed."""
    fusers = combination.fusers
    if fusers.fuses_outputs:
        return 0
    step = fusers.heads
    hidden = combination.host.backbone.hidden_size
    one, two = (replace(fusers, rank=n * step).parameters(hidden, combination.widths) for n in (1, 2))
    others = combination.backbone_parameters + one - (two - one)  # parameters are a + b r in every mode
    return step * _most(combination.budget, others, two - one, combination.budget)


def _most(budget: int, others: int, each: int, limit: int) -> int:
    """The most of `each` that stay strictly below the budget beside `others`; at most `limit`, at least 0."""
    return max(0, min(limit, (budget - 1 - others) // each))


def check_budget(combination: Combination) -> None:
    """Refuses a combination that does not fit.

    Raises:
        BudgetError: the combination has too many parameters; the message names every single change that would fit.
    """
    if combination.fits:
        return
    host, rank, changes = combination.host, largest_rank(combination) if combination.donors else 0, []
    if (layers := largest_host(combination)) >= (combination.fusers.sites if combination.donors else 1):
        away = host.layers - layers
        changes.append(f"{away} more host layer{'s' if away > 1 else ''} fused away (down to {layers})")
    for index, donor in enumerate(combination.donors):
        if layers := largest_donor(combination, index):
            changes.append(f"{donor.backbone.name} cut to its first {layers} layers, with no tap above")
    if rank:
        changes.append(f"rank {rank} or less")
    excess = combination.parameters - combination.budget + 1
    raise BudgetError(
        f"{combination} has {combination.parameters:,} parameters, {combination.fuser_parameters:,} of them in fusers: "
        f"{excess:,} too many to be below {combination.budget:,}; "
        + (f"what fits: {', or '.join(changes)}" if changes else "no single change fits; see scripts/plan_budget.py")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Everything that fits


@dataclass(frozen=True)
class Budgeted:
    """What fits, each with as many layers of the host as do, and the hosts with donors of which nothing fits."""

    combinations: list[Combination]
    too_large: list[tuple[Backbone, tuple[Backbone, ...]]]


def plan_budget(
    hosts: Sequence[Backbone],
    pairs: Sequence[tuple[Backbone, tuple[Backbone, ...]]] | None = None,
    *,
    budget: int = BUDGET,
    fusers: Fusers = Fusers(),
    taps: Sequence[float] = TAPS,
    max_fused: float = MAX_FUSED,
    every_cut: bool = False,
) -> Budgeted:
    """Every host alone and every host with its donors, as far as they fit below a budget of parameters.

    Args:
        hosts: of `read_backbone`.
        pairs: hosts with their donors, fewer donors first; by default `pairings` of the hosts.
        budget, fusers, taps, max_fused, every_cut: as for `fitting`.

    Raises:
        FusionError: a setting that no model can have.
    """
    fusers.parameters(1, [1])  # refused here, even where nothing fits
    rows = [row for host in hosts if (row := alone(host, budget=budget, max_fused=max_fused)) is not None]
    fit_alone = {row.host.backbone for row in rows}
    too_large: list[tuple[Backbone, tuple[Backbone, ...]]] = [(host, ()) for host in hosts if host not in fit_alone]
    for host, donors in pairings(hosts) if pairs is None else pairs:
        if any(one is host and set(others) <= set(donors) for one, others in too_large):
            continue  # more donors fit even less
        found = fitting(host, donors, budget=budget, fusers=fusers, taps=taps, max_fused=max_fused, every_cut=every_cut)
        rows += found
        too_large += [] if found else [(host, donors)]
    return Budgeted(rows, too_large)


def pairings(models: Sequence[Backbone], most_donors: int = 2) -> list[tuple[Backbone, tuple[Backbone, ...]]]:
    """Every model as host with one to `most_donors` of the others as donors; fewer donors first."""
    return [
        (host, donors)
        for count in range(1, most_donors + 1)
        for index, host in enumerate(models)
        for donors in itertools.combinations([*models[:index], *models[index + 1 :]], count)
    ]


def alone(host: Backbone, *, budget: int = BUDGET, max_fused: float = MAX_FUSED) -> Combination | None:
    """The host without donors and with as many layers as fit, a baseline at this budget; None where too few fit."""
    layers = largest_host(Combination(Part(host, host.num_hidden_layers), budget=budget))
    return Combination(Part(host, layers), budget=budget) if layers >= _fewest(host, max_fused) else None


def fitting(
    host: Backbone,
    donors: Sequence[Backbone],
    *,
    budget: int = BUDGET,
    fusers: Fusers = Fusers(),
    taps: Sequence[float] = TAPS,
    max_fused: float = MAX_FUSED,
    every_cut: bool = False,
) -> list[Combination]:
    """Combinations of a host and donors that fit, each with the largest host; every one fits with fewer host layers too.

    Donors are cut at the DEPTHS, all at the same. Cutting further down is listed only where it leaves room for a larger host,
    and below HALF only where nothing above fits. Donors whose output is read are not cut.

    Args:
        taps: relative depths in each donor; where it is cut below the last one, all move down with it.
        max_fused: the largest share of the host's layers that may be fused away.
        every_cut: all combinations to which neither a host layer nor a donor layer can be added: what fits at all is one of
            these, or one of them with layers taken away.
    """
    if fusers.sites > host.num_hidden_layers:
        raise FusionError(f"{host.name} has {host.num_hidden_layers} layers, too few for {fusers.sites} sites")
    fewest = max(fusers.sites, _fewest(host, max_fused))
    found: list[Combination] = []
    if fusers.fuses_outputs:
        cuts: Iterable[tuple[Part, ...]] = [tuple(Part(one, one.num_hidden_layers, (one.num_hidden_layers,)) for one in donors)]
    else:
        cuts = _every_cut(donors, taps) if every_cut else _few_cuts(donors, taps)
    for parts in cuts:
        whole = Combination(Part(host, host.num_hidden_layers), parts, fusers, budget)
        layers = largest_host(whole)
        if layers < fewest:
            continue
        one = replace(whole, host=Part(host, layers))
        if every_cut:
            deepest = [_deepest(donor, taps) for donor in donors]
            if all(largest_donor(one, i) == part.layers or part.layers == deepest[i] for i, part in enumerate(parts)):
                found.append(one)
        elif not found or (found[-1].host.layers < layers and _depth(one, taps) >= HALF):
            found.append(one)
    return found


def tap_layers(taps: Sequence[float], layers: int) -> tuple[int, ...]:
    """Taps at relative depths, the last after layer `layers` and no two after the same: (0.5, 0.75, 1), 26 -> 13, 20, 26.

    Raises:
        FusionError: a depth is not above 0 and at most 1, or there are fewer layers than taps.
    """
    ordered = sorted(set(taps))
    if not ordered or ordered[0] <= 0 or ordered[-1] > 1:
        raise FusionError(f"the taps are {', '.join(map(str, taps)) or 'none'}, expected relative depths above 0 and up to 1")
    if layers < len(ordered):
        raise FusionError(f"{len(ordered)} taps need as many layers, found {layers}")
    result = [layers]
    for count, depth in zip(range(len(ordered) - 1, 0, -1), ordered[-2::-1], strict=True):
        result.append(max(count, min(_round(depth / ordered[-1] * layers), result[-1] - 1)))
    return tuple(reversed(result))


def _fewest(host: Backbone, max_fused: float) -> int:
    """The layers that a host keeps when the largest share of them is fused away."""
    if not 0 <= max_fused < 1:
        raise FusionError(f"the share of layers to fuse away is {max_fused}, expected at least 0 and below 1")
    return host.num_hidden_layers - math.floor(max_fused * host.num_hidden_layers + 1e-9)  # 0.7 of 10 layers are 7


def _few_cuts(donors: Sequence[Backbone], taps: Sequence[float]) -> Iterator[tuple[Part, ...]]:
    for depth in DEPTHS:
        cuts = [max(len(set(taps)), _round(depth * _deepest(donor, taps))) for donor in donors]
        yield tuple(Part(donor, cut, tap_layers(taps, cut)) for donor, cut in zip(donors, cuts, strict=True))


def _every_cut(donors: Sequence[Backbone], taps: Sequence[float]) -> Iterator[tuple[Part, ...]]:
    for cuts in itertools.product(*(range(_deepest(donor, taps), len(set(taps)) - 1, -1) for donor in donors)):
        yield tuple(Part(donor, cut, tap_layers(taps, cut)) for donor, cut in zip(donors, cuts, strict=True))


def _deepest(donor: Backbone, taps: Sequence[float]) -> int:
    """The layers that a donor keeps when it is cut nowhere below its last tap."""
    if donor.num_hidden_layers < len(set(taps)):
        raise FusionError(f"{donor.name} has {donor.num_hidden_layers} layers, too few for {len(set(taps))} taps")
    return max(len(set(taps)), _round(max(taps, default=1.0) * donor.num_hidden_layers))


def _depth(combination: Combination, taps: Sequence[float]) -> float:
    """How deep the most cut donor is, relative to its last possible tap."""
    return min(part.layers / _deepest(part.backbone, taps) for part in combination.donors)


def _round(value: float) -> int:
    return math.floor(value + 0.5)  # halves up: the taps of neighbouring depths are evenly far apart
