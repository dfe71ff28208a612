# PYTHON_ARGCOMPLETE_OK
"""Says what a list of alphas, or a plan, really does: the mixture in every changed layer and what each alpha moves."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from pathlib import Path
from typing import Any

from _cli import UsageError, parser, run

from merge.alphas import plan_from_alphas, read_alphas
from merge.card import plan_in_words, terms_in_words
from merge.explain import Explanation, explain_plan
from merge.plan import Plan, read_plan
from merge.records import read_json

EXAMPLES = """\
  python scripts/explain.py alphas/base.json
  python scripts/explain.py merged/Meta-Llama-3-8B-base/plan.json
  python scripts/explain.py list.json --layers 32        the original tool's list format does not say how many there are"""
SHOWN = 0.0005  # coefficients below are summed up in one line


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("file", type=Path, help="an alphas file or a plan")
    result.add_argument("--layers", type=int, metavar="L", help="layers of the model, where the file does not say")
    result.add_argument("--json", action="store_true", help="rows and sensitivities as JSON")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Prints the explanation."""
    plan = _plan(arguments)
    found = explain_plan(plan)
    if arguments.json:
        print(json.dumps(_record(found), indent=2))
        return
    changed, moves = found.effective_layers, found.sensitivities
    print(f"{plan.name}: {plan.num_hidden_layers} -> {len(plan.rows)} layers; {len(changed)} of them differ from the original")
    for line in plan_in_words(plan):
        if "unchanged" in line or "dropped" in line:
            print(f"  {line}")
    for index, effective in changed.items():
        row = plan.rows[index]
        print(f"\nlayer {index} (base {row.base}): effectively {effective:.2f} layers")
        small = {layer: c for layer, c in row.mix.items() if abs(c) < SHOWN}
        for layer, c in row.mix.items():
            if layer not in small:
                print(f"  layer {layer:>3} {c:>8.4f}  {'#' * round(40 * min(abs(c), 1))}")
        if small:
            print(f"  {len(small)} more {sum(small.values()):>8.4f}  together")
        for group, mix in row.groups.items():
            print(f"  {group} = {terms_in_words(mix)}")
    if moves:
        print("\nalpha of each step, and how far it moves all coefficients together (2 is the most possible)")
        for step, move in zip(plan.steps, moves, strict=True):
            print(f"  {step.into:>3} <- {step.remove:<3} {step.alpha:.4f}   {move:.2g}")
        print(f"{sum(move > 0.1 for move in moves)} of {len(moves)} alphas move the mixture by more than 0.1")


def _plan(arguments: argparse.Namespace) -> Plan:
    data = read_json(arguments.file)
    if isinstance(data, dict) and "rows" in data:
        return read_plan(arguments.file)
    alphas = read_alphas(arguments.file)
    if alphas.num_hidden_layers is None and arguments.layers is None:
        raise UsageError(f"{arguments.file} does not say how many layers the model has; give --layers")
    return plan_from_alphas(alphas, arguments.layers)


def _record(found: Explanation) -> dict[str, Any]:
    rows = {index: found.plan.rows[index] for index in found.effective_layers}
    return {
        "name": found.plan.name,
        "num_hidden_layers": found.plan.num_hidden_layers,
        "rows": [
            {"base": row.base, "mix": row.mix, "groups": row.groups, "effective_layers": found.effective_layers[index]}
            for index, row in rows.items()
        ],
        "steps": [
            {"into": s.into, "remove": s.remove, "alpha": s.alpha, "sensitivity": move}
            for s, move in zip(found.plan.steps, found.sensitivities, strict=True)
        ],
    }


if __name__ == "__main__":
    run(main, options())
