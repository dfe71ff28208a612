"""What a search found, beside what costs nothing: tables with intervals, a verdict, files and pictures.

A measurement is what `objective.measure` gives; here they are kept as plan -> part -> name -> values, with the plans `original`
(nothing merged), `start`, `dropped` (the same layers dropped), other controls, and `found`.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge.plan import Plan, plan_to_dict
from merge.search import Trial

from .objective import Array, interval, scores
from .results import whole_file, write_whole
from .stats import Mean

Measured = Mapping[str, Mapping[str, Mapping[str, Array]]]
LOWER_IS_BETTER = ("kl", "ce", "text")
SHOWN = {"kl": "KL, nats", "ce": "CE, nats", "acc": "accuracy", "agreement": "agreement", "text": "perplexity"}


def summary(measured: Measured) -> dict[str, Any]:
    """`scores` of every plan and part, and `differences`: found minus every other plan, question by question."""
    differences = {
        part: {
            plan: {name: found.to_dict() for name, found in paired(measured, plan, part).items()}
            for plan in measured
            if plan not in ("found", "original")
        }
        for part in measured["found"]
    }
    return {
        "scores": {plan: {part: scores(values) for part, values in parts.items()} for plan, parts in measured.items()},
        "differences": differences,
    }


def paired(measured: Measured, plan: str, part: str) -> dict[str, Mean]:
    """Found minus `plan`, mean of the differences with 95 % interval."""
    one, two = measured["found"][part], measured[plan][part]
    return {name: interval(name, one[name] - two[name]) for name in one}


def verdict(measured: Measured, terms: Sequence[str]) -> str:
    """Whether what was found is better than all controls, on questions and text that nothing was tuned on."""
    controls = [plan for plan in measured if plan not in ("found", "original")]
    said = []
    for name in terms:
        if name not in measured["found"]["held-out"]:
            continue
        sign = 1.0 if name in LOWER_IS_BETTER else -1.0
        best = min(controls, key=lambda plan: sign * float(measured[plan]["held-out"][name].mean()))
        change = paired(measured, best, "held-out")[name]
        worse, better = (change.low > 0, change.high < 0) if sign > 0 else (change.high < 0, change.low > 0)
        outcome = "better" if better else "worse: nothing was found" if worse else "no difference shown: nothing was found"
        unit = "nats per token" if name == "text" else "nats" if name in LOWER_IS_BETTER else ""
        said.append(f"{name} {change.value:+.4f} {unit} [{change.low:+.4f}, {change.high:+.4f}] against {best}, {outcome}")
    return "held out, found minus the best control: " + "; ".join(said)


def others_line(measured: Measured) -> str | None:
    """What a search for some subjects did to the others."""
    if "others" not in measured["found"]:
        return None
    said = []
    for plan in ("original", "dropped"):
        found = paired(measured, plan, "others")
        parts = [f"{n} {found[n].value:+.4f} [{found[n].low:+.4f}, {found[n].high:+.4f}]" for n in ("kl", "ce", "acc")]
        said.append(f"against {plan} " + ", ".join(parts))
    count = len(measured["found"]["others"]["kl"])
    return f"the other subjects ({count} held-out questions), found " + "; ".join(said)


def table(report: Mapping[str, Any]) -> str:
    """Plans by parts; after +- half of the 95 % interval."""
    names = [name for name in SHOWN if any(name in one for one in report["scores"]["found"].values())]
    lines = [f"{'':12}{'part':12}" + "".join(f"{SHOWN[name]:>22}" for name in names)]
    for plan, parts in report["scores"].items():
        for part, one in parts.items():
            lines.append(f"{plan:12}{part:12}" + "".join(f"{_cell(one, name):>22}" for name in names))
    return "\n".join(lines)


def _cell(one: Mapping[str, Any], name: str) -> str:
    if name not in one:
        return ""
    known = one[name]["high"] is not None
    if name == "text":
        found = one["perplexity"]
        return f"{found['value']:.5g}" + (f" [{found['low']:.3g}, {found['high']:.3g}]" if known else "")
    return f"{one[name]['value']:.4f}" + (f" +- {one[name]['high'] - one[name]['value']:.4f}" if known else "")


def write_trials(path: Path, names: Sequence[str], trials: Sequence[Trial]) -> None:
    """Every trial with its parameters, as CSV."""
    with whole_file(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "start", "step", "loss", "over_limit", *names])
        for number, one in enumerate(trials):
            writer.writerow([number, one.start, one.step, one.loss, one.over, *one.x])


def write_plan(path: Path, plan: Plan) -> None:
    """A plan as scripts/merge.py --plan takes it."""
    write_whole(path, json.dumps(plan_to_dict(plan), indent=2) + "\n")
