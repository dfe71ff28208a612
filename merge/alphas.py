"""Alphas files: the weights of a chain of two-layer merges.

Two formats are read. Ours:

    {"schema_version": 1, "name": "base", "model": "org/name", "num_hidden_layers": 32,
     "steps": [{"into": 30, "remove": 31, "alpha": 0.6258}, ...], "provenance": {...}}

and the list of the original tool, which names neither model nor layer count:

    [{"layer_to_merge_into": 30, "layer_to_remove": 31, "ratio_i_alpha": 0.6258}, ...]
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PlanError
from .plan import MAX_LAYERS, Plan, Step, compose, read_step, step_problems
from .records import SCHEMA_VERSION, Fields, named, read_json


@dataclass(frozen=True)
class Alphas:
    """Steps to apply in order; `model` and `num_hidden_layers` are None where the file does not say."""

    steps: tuple[Step, ...]
    name: str
    model: str | None = None
    num_hidden_layers: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def read_alphas(path: Path) -> Alphas:
    """The alphas in a JSON file of either format.

    Raises:
        RecordError: not an alphas file; every problem is named.
    """
    data = read_json(path)
    with named(str(path)):
        return _from_list(data, path.stem) if isinstance(data, list) else alphas_from_dict(data)


def alphas_from_dict(data: Any) -> Alphas:
    """Alphas from JSON values in our format; `alphas_to_dict` is the inverse."""
    fields = Fields("alphas")
    version, name, model, layers, raw_steps, provenance = fields.take(
        data,
        schema_version=int,
        name=str,
        model=(str, None),
        num_hidden_layers=int,
        steps=list,
        provenance=(dict, None),
    )
    fields.check_version(version)
    steps = [read_step(fields, raw, f"step {i}") for i, raw in enumerate(raw_steps or [])]
    if not fields.problems:  # the steps can be judged only where they were read
        fields.problems += _problems(steps, layers)
    fields.done()
    return Alphas(tuple(steps), name, model, layers, provenance or {})


def alphas_to_dict(alphas: Alphas) -> dict[str, Any]:
    """Alphas as JSON values in our format."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": alphas.name,
        "model": alphas.model,
        "num_hidden_layers": alphas.num_hidden_layers,
        "steps": [{"into": s.into, "remove": s.remove, "alpha": s.alpha} for s in alphas.steps],
        "provenance": alphas.provenance,
    }


def plan_from_alphas(
    alphas: Alphas, num_hidden_layers: int | None = None, *, tensors: str = "projections", arithmetic: str = "float32"
) -> Plan:
    """The plan that alphas amount to for a model with `num_hidden_layers` layers (default: what the file says).

    `tensors` and `arithmetic` are those of the plan (`plan.TENSOR_MODES`, `plan.ARITHMETICS`).

    Raises:
        PlanError: the layer count is unknown, differs from the file's, or does not fit the steps.
    """
    layers = alphas.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
    if layers is None:
        raise PlanError(f"alphas {alphas.name!r} do not say how many layers the model has; give the number")
    if alphas.num_hidden_layers not in (None, layers):
        raise PlanError(
            f"alphas {alphas.name!r} are for {alphas.num_hidden_layers} layers but the model has {layers}; "
            "use alphas made for this model"
        )
    rows = compose(alphas.steps, layers)
    return Plan(
        rows,
        layers,
        name=alphas.name,
        method="alphas",
        tensors=tensors,
        arithmetic=arithmetic,
        steps=alphas.steps,
        model=alphas.model,
    )


def _from_list(data: list[Any], name: str) -> Alphas:
    fields = Fields("alphas in the original tool's list format")
    steps = []
    for index, raw in enumerate(data):
        into, remove, alpha, _ = fields.take(
            raw,
            f"step {index}",
            layer_to_merge_into=int,
            layer_to_remove=int,
            ratio_i_alpha=float,
            step=(int, None),
        )
        steps.append(Step(into, remove, alpha))
    if not fields.problems:
        fields.problems += _problems(steps, None)
    fields.done()
    return Alphas(tuple(steps), name)


def _problems(steps: list[Step], layers: int | None) -> list[str]:
    if not steps:
        return ["there are no steps; for the unchanged model no merge is needed"]
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        return [f"'num_hidden_layers' is {layers}, expected 1 to {MAX_LAYERS:,}"]
    if max(max(step.into, step.remove) for step in steps) >= MAX_LAYERS:
        return [f"a step names a layer beyond {MAX_LAYERS:,}"]
    if layers is None:  # judge what can be judged: no step may need more layers than the highest that is named
        layers = max(max(step.into, step.remove) for step in steps) + 1
    return step_problems(steps, layers)
