"""What a search may change about a plan, as a vector of numbers: the alphas of a chain, or one coefficient per tensor group.

    x       the parameters [n] that a search moves; u the same without bounds, which a gradient moves; x = bound(u)
    mixes   for every mixed row: tensor group -> coefficients over the row's layers, as tensors that gradients flow through

Alphas are badly conditioned: in a chain of n steps the coefficients of most layers hardly depend on any one alpha
(`effective_dimensions`). Coefficients are free: they need not be positive nor sum to 1, except where norms demand it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .errors import PlanError
from .families import FAMILIES, GROUPS
from .plan import Plan, Row, Step, compose, sensitivities, stick_breaking, unit_row

ALPHA_EDGE = 0.01  # a gradient starts this far from alphas of 0 and 1, where it would vanish
SMALLEST_NORM = 0.01  # factor of a layer's own norm
COEFFICIENT_BOUNDS = (-0.5, 1.5)  # for searches that need bounds; best ones found by gradient lie well within


@dataclass(frozen=True)
class RowSpec:
    """A surviving layer: everything that is not mixed comes from `base`; tensors are mixed over `layers`."""

    base: int
    layers: tuple[int, ...]
    scaled: bool = False  # search also where there is nothing to mix in: the layer's own tensors get coefficients

    @property
    def mixed(self) -> bool:
        """Whether anything of this row is searched."""
        return self.scaled or self.layers != (self.base,)


Mixes = list[dict[str, torch.Tensor]]  # one per mixed row


class Space(Protocol):
    """What searches need to know of a space."""

    rows: tuple[RowSpec, ...]
    groups: tuple[str, ...]  # the tensor groups that are mixed
    names: tuple[str, ...]  # of the parameters
    bounds: tuple[float, float]

    def bound(self, u: torch.Tensor) -> torch.Tensor:
        """The parameters that unbounded ones stand for."""

    def unbound(self, x: torch.Tensor) -> torch.Tensor:
        """Unbounded parameters near `x`."""

    def mixes(self, x: torch.Tensor) -> Mixes:
        """The coefficients of every mixed row."""

    def plan(self, x: Sequence[float], name: str) -> Plan:
        """The plan that the parameters stand for."""

    def starts(self) -> dict[str, torch.Tensor]:
        """Named starting points: every row that keeps one of its layers as it is."""


class Alphas:
    """The alphas of given steps: what alphas files hold. Tensors of kind projection are mixed; norms stay the base layer's."""

    bounds = (0.0, 1.0)

    def __init__(self, steps: Sequence[Step], num_hidden_layers: int, groups: Sequence[str]) -> None:
        self.steps = tuple(steps)
        self.num_hidden_layers = num_hidden_layers
        self.groups = tuple(groups)
        half = [replace(step, alpha=0.5) for step in self.steps]
        self.rows = tuple(RowSpec(row.base, tuple(row.mix)) for row in compose(half, num_hidden_layers))
        self.names = tuple(f"{step.into}<-{step.remove}" for step in self.steps)

    def bound(self, u: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(u)

    def unbound(self, x: torch.Tensor) -> torch.Tensor:
        return torch.logit(x.clamp(ALPHA_EDGE, 1 - ALPHA_EDGE))

    def mixes(self, x: torch.Tensor) -> Mixes:
        """As `plan.compose`, on tensors."""
        found: dict[int, dict[int, torch.Tensor]] = {layer: {layer: x.new_ones(())} for layer in range(self.num_hidden_layers)}
        for step, alpha in zip(self.steps, x, strict=True):
            into = {layer: alpha * c for layer, c in found[step.into].items()}
            found[step.into] = into | {layer: (1 - alpha) * c for layer, c in found.pop(step.remove).items()}
        return [
            dict.fromkeys(self.groups, torch.stack([found[row.base][layer] for layer in row.layers]))
            for row in self.rows
            if row.mixed
        ]

    def plan(self, x: Sequence[float], name: str) -> Plan:
        steps = tuple(replace(step, alpha=float(alpha)) for step, alpha in zip(self.steps, x, strict=True))
        return Plan(compose(steps, self.num_hidden_layers), self.num_hidden_layers, name=name, method="alphas", steps=steps)

    def starts(self) -> dict[str, torch.Tensor]:
        if sum(row.mixed for row in self.rows) != 1:
            return {"0.5 everywhere": torch.full((len(self.steps),), 0.5), "keep the lower": torch.ones(len(self.steps))}
        layers = next(row.layers for row in self.rows if row.mixed)
        order = [step.into for step in self.steps]
        found = {}
        for i, layer in enumerate(layers):
            alphas = dict(zip(layers, stick_breaking([float(j == i) for j in range(len(layers))]), strict=False))
            if sorted(order) == list(layers[:-1]):
                found[f"only layer {layer}"] = torch.tensor([alphas[into] for into in order])
        return found or {"0.5 everywhere": torch.full((len(self.steps),), 0.5)}


class Coefficients:
    """One coefficient for each layer, tensor group and mixed row.

    Norms are mixed with coefficients that are not negative, and that sum to 1 where the family stores weight - 1.
    """

    bounds = COEFFICIENT_BOUNDS

    def __init__(self, rows: Sequence[RowSpec], num_hidden_layers: int, groups: Sequence[str], model_type: str) -> None:
        self.rows = tuple(rows)
        self.num_hidden_layers = num_hidden_layers
        self.groups = tuple(groups)
        self.norms_sum_to_one = bool(FAMILIES[model_type].norm_offset) if model_type in FAMILIES else False
        self.names = tuple(
            f"row {i} {group} layer {layer}"
            for i, row in enumerate(self.rows)
            if row.mixed
            for group in self.groups
            if self._searched(row, group)
            for layer in row.layers
        )

    def _searched(self, row: RowSpec, group: str) -> bool:
        """Not where only one value is possible: a single coefficient of norms that must sum to 1."""
        return len(row.layers) > 1 or GROUPS[group] != "norm" or not self.norms_sum_to_one

    def bound(self, u: torch.Tensor) -> torch.Tensor:
        return u

    def unbound(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def mixes(self, x: torch.Tensor) -> Mixes:
        result, start = [], 0
        for row in self.rows:
            if not row.mixed:
                continue
            table = {}
            for group in self.groups:
                if not self._searched(row, group):
                    continue
                c = x[start : start + len(row.layers)]
                start += len(row.layers)
                if GROUPS[group] == "norm" and len(row.layers) == 1:  # a factor for the layer's own norm
                    c = c + (c.clamp(min=SMALLEST_NORM) - c).detach()
                elif GROUPS[group] == "norm":
                    # Gradients pass as if there were no clamp: what was pushed below zero can come back.
                    c = c + (c.clamp(min=0.0) - c).detach()
                    if self.norms_sum_to_one or not bool((c > 0).any()):
                        c = (c + 1e-6) / (c + 1e-6).sum()
                table[group] = c
            result.append(table)
        return result

    def plan(self, x: Sequence[float], name: str) -> Plan:
        values = self.mixes(torch.as_tensor(x, dtype=torch.float64))
        rows, mixed = [], iter(values)
        for row in self.rows:
            if not row.mixed:
                rows.append(unit_row(row.base))
                continue
            table = next(mixed)
            groups = {}
            for group, c in table.items():
                mix = dict(zip(row.layers, c.tolist(), strict=True))
                groups[group] = {layer: value for layer, value in mix.items() if value} or {row.base: 0.0}
            rows.append(Row(row.base, {row.base: 1.0}, groups))
        return Plan(tuple(rows), self.num_hidden_layers, name=name, method="coefficients")

    def starts(self) -> dict[str, torch.Tensor]:
        mixed = [row for row in self.rows if row.mixed]
        kept = [row.base for row in mixed]
        found = {"dropped": self._one_hot(mixed, kept, kept)}
        for i, row in enumerate(mixed):
            for layer in row.layers:
                if layer != row.base:
                    name = f"layer {layer} in the place of {row.base}"
                    chosen = [*kept[:i], layer, *kept[i + 1 :]]
                    found[name] = self._one_hot(mixed, chosen, chosen)
                    if any(GROUPS[group] == "norm" for group in self.groups):  # often better: they fit what comes from below
                        found[f"{name}, norms of {row.base}"] = self._one_hot(mixed, chosen, kept)
        return found

    def _one_hot(self, rows: Sequence[RowSpec], chosen: Sequence[int], norms: Sequence[int]) -> torch.Tensor:
        values = [
            float(layer == (two if GROUPS[group] == "norm" else one))
            for row, one, two in zip(rows, chosen, norms, strict=True)
            for group in self.groups
            if self._searched(row, group)
            for layer in row.layers
        ]
        return torch.tensor(values)


def windows(plan: Plan, reach: int | None = None, *, scale_kept: bool = False) -> tuple[RowSpec, ...]:
    """For a plan that drops layers: each kept layer may mix in the dropped ones that lie between it and the next kept one.

    Those below the first kept layer go to it. `reach` limits how many. With `scale_kept`, kept layers that have nothing to
    mix in get coefficients for their own tensors, from the first gap on: below it hidden states stay what they were.

    Raises:
        PlanError: the rows are not in the order of the layers.
    """
    kept = plan.keep
    if kept != sorted(set(kept)):
        raise PlanError("rows must be different layers in their order")
    ends = [*kept[1:], plan.num_hidden_layers]
    rows: list[RowSpec] = []
    for i, (base, end) in enumerate(zip(kept, ends, strict=True)):
        below = range(0 if i == 0 else base, base)
        above = range(base + 1, end if reach is None else min(end, base + 1 + reach))
        scaled = scale_kept and any(row.mixed for row in rows)
        rows.append(RowSpec(base, (*below, base, *above), scaled))
    return tuple(rows)


def groups_of(names_in_layer: Sequence[str], norms: bool) -> list[str]:
    """The tensor groups of a layer that can be mixed, in the order of GROUPS."""
    present = {name.rpartition(".")[0] for name in names_in_layer}
    kinds = ("projection", "norm") if norms else ("projection",)
    return [group for group, kind in GROUPS.items() if group in present and kind in kinds]


def effective_dimensions(steps: Sequence[Step], num_hidden_layers: int) -> float:
    """How many of the alphas really move the mixture: exp of the entropy of their sensitivities' squares.

    1 where a single alpha decides everything, n where all n matter alike.
    """
    squares = [s * s for s in sensitivities(steps, num_hidden_layers)]
    total = math.fsum(squares)
    if total == 0.0:
        return 0.0
    return math.exp(-math.fsum(p * math.log(p) for p in (s / total for s in squares) if p > 0))
