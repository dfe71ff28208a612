"""A merge is a matrix: one row per surviving layer, coefficients over the original layers.

Notation
    L       layers of the source, numbered 0..L-1; L' rows = layers of the result
    row     (base, mix): the surviving layer keeps everything of layer `base` that is not mixed, and each mixed
            tensor is W' = sum_j c_j W_j with c = mix; the unit row c = {base: 1} keeps the layer as it is
    step    (into, remove, alpha): W_into <- alpha W_into + (1 - alpha) W_remove, then layer `remove` is gone;
            alpha weighs the kept, lower layer (Liu et al., arXiv 2406.16330)

Steps have a closed form (`compose`), so a chain of n steps is one weighted sum: every source tensor is read once and the
result is rounded once. This module is data and algebra in Python floats: it imports no torch and knows no file formats.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import PlanError, RecordError
from .records import SCHEMA_VERSION, Fields, named, read_json

TENSOR_MODES = {
    "projections": "attention and MLP matrices with their biases; norms stay the base layer's",
    "all": "norms too",
    "fold-norms": "each norm's weight is folded into the matrices that read it, so the layer's map is what is averaged",
}
ARITHMETICS = {
    "float32": "one sum in float32, rounded once",
    "sequential": "rounded to the storage dtype after every step, as the original tool does",
}
MAX_LAYERS = 100_000  # far beyond any model; keeps a slip of the fingers from filling the memory
SUM_TOLERANCE = 1e-9  # between the rows of a plan and the closed form of its steps; float64 algebra errs by about 1e-15

Mix = Mapping[int, float]  # original layer -> coefficient


@dataclass(frozen=True)
class Step:
    """W_into <- alpha W_into + (1 - alpha) W_remove, in original numbering."""

    into: int
    remove: int
    alpha: float


@dataclass(frozen=True)
class Row:
    """One surviving layer: `mix` for all mixed tensors, `groups` for those tensor groups that have their own."""

    base: int
    mix: Mix
    groups: Mapping[str, Mix] = field(default_factory=dict)

    @property
    def is_unit(self) -> bool:
        """Whether the layer is kept as it is."""
        return not self.groups and self.mix == {self.base: 1.0}


def unit_row(layer: int) -> Row:
    """The row that keeps `layer` as it is."""
    return Row(layer, {layer: 1.0})


@dataclass(frozen=True)
class Plan:
    """What a merge does, as data: enough to execute it, to verify it and to repeat it.

    `steps` are the alphas that the rows came from, when they came from alphas. `model` and `revision` name the source.
    """

    rows: tuple[Row, ...]
    num_hidden_layers: int  # of the source
    name: str = ""
    method: str = ""
    tensors: str = "projections"
    arithmetic: str = "float32"
    steps: tuple[Step, ...] = ()
    model: str | None = None
    revision: str | None = None

    @property
    def keep(self) -> list[int]:
        """The base layer of each row, in order: what per-layer config lists are cut with."""
        return [row.base for row in self.rows]

    def dropped(self) -> "Plan":
        """The control: the same layers survive and nothing is mixed."""
        rows = tuple(unit_row(row.base) for row in self.rows)
        return replace(self, rows=rows, steps=(), arithmetic="float32", name=f"{self.name}-dropped", method="drop")


# ---------------------------------------------------------------------------------------------------------------------
# Algebra


def compose(steps: Sequence[Step], num_hidden_layers: int) -> tuple[Row, ...]:
    """The rows that `steps`, applied in order, amount to (closed form).

    For the chain into the t-th layer from the top, with a_j the alpha of the step into j:
    c_t = a_t, c_j = a_j prod_{i=t}^{j-1} (1 - a_i), c_{L-1} = prod_i (1 - a_i); any other order works by the same rule.

    Raises:
        PlanError: a step is impossible; all problems are named.
    """
    problems = step_problems(steps, num_hidden_layers)
    if problems:
        raise PlanError("; ".join(problems))
    mixes: dict[int, dict[int, float]] = {layer: {layer: 1.0} for layer in range(num_hidden_layers)}
    for step in steps:
        mixed = {layer: step.alpha * c for layer, c in mixes[step.into].items()}
        mixed |= {layer: (1.0 - step.alpha) * c for layer, c in mixes.pop(step.remove).items()}
        mixes[step.into] = mixed
    return tuple(Row(base, _clean(mix)) for base, mix in mixes.items())


def step_problems(steps: Sequence[Step], num_hidden_layers: int) -> list[str]:
    """What makes `steps` impossible for a model with that many layers; empty when nothing does."""
    problems = []
    remain = list(range(num_hidden_layers))
    removed_in: dict[int, int] = {}
    for number, step in enumerate(steps):
        here = f"step {number} ({step.into} <- {step.remove})"
        if not (math.isfinite(step.alpha) and 0.0 <= step.alpha <= 1.0):
            problems.append(f"{here}: alpha is {step.alpha}, expected a number from 0 to 1")
        impossible = False
        for layer in (step.into, step.remove):
            if layer in removed_in:
                problems.append(f"{here}: layer {layer} was removed in step {removed_in[layer]}")
                impossible = True
            elif layer not in remain:
                problems.append(f"{here}: there is no layer {layer}; the model has layers 0 to {num_hidden_layers - 1}")
                impossible = True
        if impossible:
            continue
        if step.into >= step.remove:
            problems.append(f"{here}: the kept layer must be the lower of the two")
        elif (above := remain[remain.index(step.into) + 1]) != step.remove:
            problems.append(f"{here}: not neighbours; above layer {step.into} the next that remains is {above}")
        remain.remove(step.remove)
        removed_in[step.remove] = number
    return problems


def stick_breaking(coefficients: Sequence[float]) -> list[float]:
    """The alphas of a chain whose closed form is `coefficients` (lowest layer first): a_j = c_j / (1 - sum_{i<j} c_i).

    n+1 coefficients on the simplex give n alphas. Where nothing is left to share out, alpha has no effect and is 1.

    Raises:
        PlanError: a coefficient is negative or not finite, or they do not sum to 1.
    """
    if any(not math.isfinite(c) or c < 0 for c in coefficients) or abs(sum(coefficients) - 1.0) > 1e-6:
        raise PlanError(f"coefficients {list(coefficients)} are not on the simplex: none below 0, and their sum 1")
    alphas = []
    for index in range(len(coefficients) - 1):
        rest = sum(coefficients[index:])  # = 1 - sum of those before, without the cancellation
        alphas.append(coefficients[index] / rest if rest > 0.0 else 1.0)
    return alphas


def chain(alphas: Sequence[float], num_hidden_layers: int) -> tuple[Step, ...]:
    """Steps that collapse the top len(alphas)+1 layers into one, top pair first; alphas are given lowest layer first."""
    lowest = num_hidden_layers - 1 - len(alphas)
    return tuple(Step(lowest + i, lowest + i + 1, alphas[i]) for i in reversed(range(len(alphas))))


def sensitivities(steps: Sequence[Step], num_hidden_layers: int) -> list[float]:
    """|dc/da_s|_1 for each step s: how far all coefficients together move per unit of that alpha (2 at most).

    The coefficients are linear in each single alpha, so the derivative is the difference of the two ends.
    For a chain this is 2 prod_{i<s} (1 - a_i), i over the layers below.
    """
    result = []
    for index, step in enumerate(steps):
        ends = []
        for alpha in (1.0, 0.0):
            changed = [*steps[:index], replace(step, alpha=alpha), *steps[index + 1 :]]
            ends.append({row.base: row.mix for row in compose(changed, num_hidden_layers)})
        one, zero = ends
        result.append(
            sum(
                abs(one[base].get(layer, 0.0) - zero[base].get(layer, 0.0))
                for base in one
                for layer in {*one[base], *zero[base]}
            )
        )
    return result


def effective_layers(mix: Mix) -> float:
    """How many layers a mixture really holds: exp of the entropy of |c| / sum |c| (1 for a unit row)."""
    total = sum(abs(c) for c in mix.values())
    shares = [abs(c) / total for c in mix.values() if c]
    return math.exp(-sum(p * math.log(p) for p in shares))


def _clean(mix: Mapping[int, float]) -> dict[int, float]:
    """Sorted by layer, without zeros: what is not needed is not read."""
    return {layer: mix[layer] for layer in sorted(mix) if mix[layer] != 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_plan(path: Path) -> Plan:
    """The plan in a JSON file.

    Raises:
        RecordError: not a plan; all problems are named.
    """
    data = read_json(path)
    with named(str(path)):
        return plan_from_dict(data)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; `plan_from_dict` is the inverse."""
    rows: list[dict[str, Any]] = []
    for row in plan.rows:
        entry: dict[str, Any] = {"base": row.base}
        if row.mix != {row.base: 1.0}:
            entry["mix"] = _mix_to_dict(row.mix)
        if row.groups:
            entry["groups"] = {group: _mix_to_dict(mix) for group, mix in row.groups.items()}
        rows.append(entry)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": plan.name,
        "method": plan.method,
        "model": plan.model,
        "revision": plan.revision,
        "num_hidden_layers": plan.num_hidden_layers,
        "tensors": plan.tensors,
        "arithmetic": plan.arithmetic,
        "rows": rows,
    }
    if plan.steps:
        result["steps"] = [{"into": s.into, "remove": s.remove, "alpha": s.alpha} for s in plan.steps]
    return result


def plan_from_dict(data: Any) -> Plan:
    """The plan that JSON values describe.

    Raises:
        RecordError: unknown, missing or mistyped keys, layers out of range, coefficients that are not finite, steps that
            disagree with the rows; all problems are named.
    """
    fields = Fields("plan")
    version, layers, raw_rows, name, method, model, revision, tensors, arithmetic, raw_steps = fields.take(
        data,
        schema_version=int,
        num_hidden_layers=int,
        rows=list,
        name=(str, None),
        method=(str, None),
        model=(str, None),
        revision=(str, None),
        tensors=(str, None),
        arithmetic=(str, None),
        steps=(list, None),
    )
    fields.check_version(version)
    for key, value, known in (("tensors", tensors, TENSOR_MODES), ("arithmetic", arithmetic, ARITHMETICS)):
        if value is not None and value not in known:
            fields.problem(f"{key!r} is {value!r}, expected one of {', '.join(known)}")
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        fields.problem(f"'num_hidden_layers' is {layers}, expected 1 to {MAX_LAYERS:,}")
        layers = None
    if raw_rows is not None and not raw_rows:
        fields.problem("'rows' is empty; a model needs at least one layer")
    rows = [_row(fields, raw, f"row {i}", layers) for i, raw in enumerate(raw_rows or [])]
    steps = [read_step(fields, raw, f"step {i}") for i, raw in enumerate(raw_steps or [])]
    fields.done()
    plan = Plan(
        rows=tuple(rows),
        num_hidden_layers=layers,
        name=name or "",
        method=method or "",
        tensors=tensors or "projections",
        arithmetic=arithmetic or "float32",
        steps=tuple(steps),
        model=model,
        revision=revision,
    )
    check_arithmetic(plan)
    return plan


def check_arithmetic(plan: Plan) -> None:
    """Raises RecordError where the steps of a plan are impossible, disagree with its rows, or are needed and missing."""
    if plan.arithmetic == "sequential":
        if not plan.steps:
            raise RecordError("arithmetic 'sequential' needs 'steps'; give an alphas file, or use 'float32'")
        if plan.tensors == "fold-norms":
            raise RecordError("arithmetic 'sequential' rounds after every step, which fold-norms cannot; use 'float32'")
    if not plan.steps:
        return
    problems = step_problems(plan.steps, plan.num_hidden_layers)
    if problems:
        raise RecordError("; ".join(problems))
    composed = compose(plan.steps, plan.num_hidden_layers)
    agree = len(composed) == len(plan.rows) and all(
        one.base == two.base
        and not one.groups
        and all(abs(one.mix.get(k, 0.0) - two.mix.get(k, 0.0)) <= SUM_TOLERANCE for k in {*one.mix, *two.mix})
        for one, two in zip(plan.rows, composed, strict=True)
    )
    if not agree:
        raise RecordError("'rows' are not what 'steps' amount to; remove 'steps' to keep the rows as they are")


def read_step(fields: Fields, raw: Any, at: str) -> Step:
    """A step from its JSON object; problems are collected in `fields`."""
    into, remove, alpha = fields.take(raw, at, into=int, remove=int, alpha=float)
    return Step(_or(into, 0), _or(remove, 0), float(_or(alpha, 0.0)))


def _row(fields: Fields, raw: Any, at: str, layers: int | None) -> Row:
    base, mix, groups = fields.take(raw, at, base=int, mix=(dict, None), groups=(dict, None))
    base = _or(base, 0)
    _check_layers(fields, at, [base], layers)
    read = {base: 1.0} if mix is None else _mix(fields, mix, at, layers)
    read_groups = {group: _mix(fields, one, f"{at}, group {group!r}", layers) for group, one in (groups or {}).items()}
    return Row(base, read, read_groups)


def _mix(fields: Fields, raw: Any, at: str, layers: int | None) -> dict[int, float]:
    if not isinstance(raw, Mapping) or not raw:
        fields.problem(f"{at}: found {raw!r}, expected coefficients such as {{'18': 0.6, '19': 0.4}}")
        return {}
    mix: dict[int, float] = {}
    for key, value in raw.items():
        if not str(key).isdecimal() or str(int(key)) != str(key):
            fields.problem(f"{at}: key {key!r} is not a layer number")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            fields.problem(f"{at}: the coefficient of layer {key} is {value!r}, expected a finite number")
        else:
            mix[int(key)] = float(value)
    _check_layers(fields, at, mix, layers)
    cleaned = _clean(mix)
    if mix and not cleaned:
        fields.problem(f"{at}: all coefficients are zero")
    return cleaned


def _check_layers(fields: Fields, at: str, layers: Iterable[int], total: int | None) -> None:
    for layer in layers:
        if total is not None and not 0 <= layer < total:
            fields.problem(f"{at}: there is no layer {layer}; the model has layers 0 to {total - 1}")


def _mix_to_dict(mix: Mix) -> dict[str, float]:
    return {str(layer): c for layer, c in mix.items()}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
