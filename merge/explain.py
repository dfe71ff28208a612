"""What a plan really does: which layers it changes, how many each of them effectively is, and what each alpha moves."""

from collections.abc import Mapping
from dataclasses import dataclass

from .plan import Plan, effective_layers, sensitivities


@dataclass(frozen=True)
class Explanation:
    """A plan explained.

    effective_layers   of every row that differs from an original layer, by its index: how many layers it effectively mixes
    sensitivities      of every step: how far its alpha moves all coefficients together, at most 2
    """

    plan: Plan
    effective_layers: Mapping[int, float]
    sensitivities: tuple[float, ...]


def explain_plan(plan: Plan) -> Explanation:
    """The mixture of a plan in numbers; needs no model."""
    changed = {index: effective_layers(row.mix) for index, row in enumerate(plan.rows) if not row.is_unit}
    moves = sensitivities(plan.steps, plan.num_hidden_layers) if plan.steps else []
    return Explanation(plan, changed, tuple(moves))
