"""What a search found, beside what costs nothing: tables with intervals, a verdict, files and pictures.

A measurement is what `objective.measure` gives; here they are kept as plan -> part -> name -> values, with the plans `original`
(nothing merged), `start`, `dropped` (the same layers dropped), other controls, and `found`.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merge.alphas import Alphas, alphas_to_dict
from merge.plan import Plan, plan_to_dict
from merge.publish import whole_file, write_whole
from merge.search import Trial

from .objective import Array, interval, scores
from .stats import CONFIDENCE, Mean, mcnemar

Measured = Mapping[str, Mapping[str, Mapping[str, Array]]]
LOWER_IS_BETTER = ("kl", "ce", "text")
WIDTH = 27  # of a column
HALF = 0.5  # between wrong and right
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
        found = measured["found"]["held-out"].get(name)
        if found is None or not len(found):
            said.append(f"{name}: nothing was held out, so nothing can be said")
            continue
        if not np.isfinite(found).all():
            said.append(f"{name}: not a number, so nothing was found")
            continue
        sign = 1.0 if name in LOWER_IS_BETTER else -1.0
        means = {plan: sign * float(measured[plan]["held-out"][name].mean()) for plan in controls}
        finite = {plan: value for plan, value in means.items() if math.isfinite(value)}
        if not finite:
            said.append(f"{name} {found.mean():.4f}, where no control has a number")
            continue
        best = min(finite, key=lambda plan: finite[plan])
        change = paired(measured, best, "held-out")[name]
        outcome = _outcome(name, found, measured[best]["held-out"][name], change, sign)
        unit = " nats per token" if name == "text" else " nats" if name in LOWER_IS_BETTER else ""
        known = f" [{change.low:+.4f}, {change.high:+.4f}]" if math.isfinite(change.low) else ""
        said.append(f"{name} {change.value:+.4f}{unit}{known} against {best}, {outcome}")
    return "held out, found minus the best control: " + "; ".join(said)


def _outcome(name: str, found: Array, other: Array, change: Mean, sign: float) -> str:
    if not math.isfinite(change.low):
        return "too few values for an interval: nothing can be said"
    if name in ("acc", "agreement"):  # right or wrong: an interval of means would claim too much
        one, two = found > HALF, other > HALF
        shown = mcnemar(int((one & ~two).sum()), int((two & ~one).sum())) < 1.0 - CONFIDENCE
    else:
        shown = change.low > 0 or change.high < 0
    if not shown:
        return "no difference shown: nothing was found"
    return "better" if sign * change.value < 0 else "worse: nothing was found"


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
    """Plans by parts, with 95 % intervals, and how much was held out."""
    names = [name for name in SHOWN if any(name in one for one in report["scores"]["found"].values())]
    held_out = report["scores"]["found"]["held-out"]
    sizes = {"questions": held_out.get("kl", {}).get("count"), "tokens of text": held_out.get("text", {}).get("count")}
    said = ", ".join(f"{what} {count:,}" for what, count in sizes.items() if count is not None)
    lines = [f"held out: {said}; in brackets 95 % intervals"]
    lines += [f"{'':12}{'part':12}" + "".join(f"{SHOWN[name]:>{WIDTH}}" for name in names)]
    for plan, parts in report["scores"].items():
        for part, one in parts.items():
            lines.append(f"{plan:12}{part:12}" + "".join(f"{_cell(one, name):>{WIDTH}}" for name in names))
    return "\n".join(lines)


def _cell(one: Mapping[str, Any], name: str) -> str:
    if name not in one:
        return ""
    found = one["perplexity"] if name == "text" else one[name]
    if found["value"] is None:
        return "not a number"
    digits = ".3g" if name == "text" else ".4f"
    interval = f" [{found['low']:{digits}}, {found['high']:{digits}}]" if found["low"] is not None else ""
    return (f"{found['value']:.5g}" if name == "text" else f"{found['value']:.4f}") + interval


def write_trials(path: Path, names: Sequence[str], trials: Sequence[Trial]) -> None:
    """Every trial with its parameters, as CSV."""
    with whole_file(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "start", "step", "loss", "over_limit", *names])
        for number, one in enumerate(trials):
            writer.writerow([number, one.start, one.step, one.loss, one.over, *one.x])


def begin_results(out: Path, plan: Plan, names: Sequence[str], trials: Sequence[Trial]) -> None:
    """plan.json, as scripts/merge.py --plan takes it, and trials.csv; what an earlier search left in the folder goes."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("search.json", "alphas.json", "plots/alphas.png", "plots/alphas.csv", "plots/slices.png", "plots/slices.csv"):
        (out / name).unlink(missing_ok=True)
    write_whole(out / "plan.json", json.dumps(plan_to_dict(plan), indent=2) + "\n")
    write_trials(out / "trials.csv", names, trials)


def write_results(out: Path, plan: Plan, report: Mapping[str, Any], study: str | None) -> None:
    """alphas.json where there are alphas, and search.json, which comes last."""
    if plan.steps:
        keys = ("target", "objective", "method", "seed", "split", "trials", "loss")
        provenance = {key: report[key] for key in keys} | {"study": study, "scores": report["scores"]["found"]}
        found = Alphas(plan.steps, plan.name, report["model"], plan.num_hidden_layers, provenance)
        write_whole(out / "alphas.json", json.dumps(alphas_to_dict(found), indent=2) + "\n")
    write_whole(out / "search.json", json.dumps(report, indent=2) + "\n")
