"""The report of a study: one HTML file that needs no network, with the answer first; and its table as text."""

import importlib.resources
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from merge.card import plan_in_words
from merge.plan import Plan, plan_from_dict
from merge.publish import write_whole

from ..compare import flipped
from ..results import all_or_none
from . import charts
from .arms import ORIGINAL
from .summary import (
    MEASURES,
    Comparison,
    Study,
    Verdict,
    answer,
    compare,
    drops_at,
    mmlu_differences,
    table_rows,
    too_little,
    verdicts,
)

TEMPLATE = "report.html"
SHOWN_FLIPS = 60  # questions named for each merge and direction; more are counted
KINDS = {
    ORIGINAL: "original", "merge": "merge", "drop-last": "top layers dropped", "drop-greedy": "dropped greedily",
    "dropped": "its layers dropped", "drop-given": "dropped, as given", "uniform": "top layers averaged",
}  # fmt: skip
OUTCOMES = {"better": "beats dropping", "worse": "worse than dropping", "not shown": "no difference shown"}


def write_report(study: Study, path: Path | None = None) -> Path:
    """Writes the page and returns where; `report.html` in the study's folder by default."""
    path = path or study.folder / TEMPLATE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(study))
    return path


def page(study: Study) -> str:
    """The page as text."""
    source = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "share": _share, "signed": _signed, "size": _size, "interval": _interval}
    found = verdicts(study)
    rows = table_rows(study)
    said = answer(study, found)
    return environment.from_string(source).render(
        study=study.record,
        models=study.models,
        rows=rows,
        measured=set().union(*rows),
        kinds=KINDS,
        outcomes=OUTCOMES,
        measures=MEASURES,
        answer=said[0],
        details=said[1:],
        verdicts=found,
        sections=_sections(study, rows, found),
        plans=_plans(study),
        subjects=_subjects(study),
        flips=_flips(study),
        generation=_generation(study),
        speeds=_speeds(study),
    )


def text_table(study: Study) -> str:
    """The summary as plain text, one line per model."""
    rows = table_rows(study)
    shown = [(key, *column) for key, column in COLUMNS.items() if any(key in row for row in rows)]
    lines = [f"{'model':24}{'layers':>7}{'parameters':>16}" + "".join(f"{name:>{width}}" for _, name, width, _ in shown)]
    for row in rows:
        cells = "".join(f"{show(row[key]) if key in row else '':>{width}}" for key, _, width, show in shown)
        lines.append(f"{row['name']:24.24}{row['layers']:>7}{row['parameters']:>16,}{cells}")
    return "\n".join([*lines, "+- is one standard error; where all or none are right, brackets are a 95 % interval"])


def _sections(study: Study, rows: Sequence[dict[str, Any]], found: Sequence[Verdict]) -> dict[str, Any]:
    """The pictures, by what they show."""
    plans = {one.name: plan_from_dict(one.record["plan"]) for one in study.models if one.kind == "merge"}
    files = {arm["name"]: arm["file"] for arm in study.record["arms"] if arm["file"]}
    histories = {name: charts.history(Path(file)) for name, file in files.items()}
    return {
        "overview": charts.overview(rows),
        "differences": {measure: charts.differences(_against_drops(study, measure), measure) for measure in MEASURES},
        "groups": charts.groups(study.models),
        "alphas": charts.alphas(plans),
        "mixtures": {name: charts.mixture(plan) for name, plan in plans.items()},
        "layers": charts.layer_losses(study.record["layers"], [layer for layer, _ in study.record["greedy"]]),
        "histories": {name: picture for name, picture in histories.items() if picture},
    }


def _against_drops(study: Study, measure: str) -> list[Comparison]:
    """Every merge less every way of dropping at its depth, and less the original."""
    found = []
    for merge in (one for one in study.models if one.kind == "merge"):
        original = study.model(ORIGINAL)
        others = [*drops_at(study, merge), *([original] if original else [])]
        found += [one for other in others if (one := compare(merge, other, measure)) is not None]
    return found


def _plans(study: Study) -> list[dict[str, Any]]:
    """Every plan in words, with the command that makes it."""
    commands = {arm["name"]: arm["command"] for arm in study.record["arms"]}
    spec = study.record["model"]["spec"]
    found = []
    for one in study.models:
        if one.record["plan"] is None:
            continue
        plan: Plan = plan_from_dict(one.record["plan"])
        command = commands[one.name].replace("MODEL", spec)
        found.append({"name": one.name, "kind": KINDS[one.kind], "words": plan_in_words(plan), "command": command})
    return found


def _subjects(study: Study) -> dict[str, Any] | None:
    """Accuracy of every model on every subject, and what is shown to differ from the original."""
    models = [one for one in study.models if one.record.get("scores")]
    if not models:
        return None
    original = study.model(ORIGINAL)
    changed: dict[tuple[str, str], str] = {}
    for one in models:
        if original is None or one is original or not original.record.get("scores"):
            continue
        for test in mmlu_differences(one, original)[1:]:
            if test.verdict in ("better", "worse"):
                changed[one.name, test.name] = test.verdict
    scores = {one.name: one.record["scores"] for one in models}
    first = scores[models[0].name]
    lines = [("groups", name) for name in first["groups"]] + [("subjects", name) for name in first["subjects"]]
    return {
        "names": [one.name for one in models],
        "lines": [
            {
                "name": name.replace("_", " "),
                "kind": kind,
                "count": first[kind][name]["count"],
                "cells": [
                    {**scores[one.name][kind][name], "changed": changed.get((one.name, name))}
                    for one in models
                ],
            }
            for kind, name in lines
        ],
    }  # fmt: skip


def _flips(study: Study) -> list[dict[str, Any]]:
    """For every merge: questions that only it, or only another model, answers right."""
    found = []
    for merge in (one for one in study.models if one.kind == "merge" and one.answers):
        original = study.model(ORIGINAL)
        others = [*([original] if original else []), *drops_at(study, merge)]
        for other in (one for one in others if one.answers):
            lost, won = flipped(other.answers, merge.answers)
            found.append(
                {
                    "merge": merge.name, "other": other.name, "count": len(merge.answers),
                    "both": sum(a.right and b.right for a, b in zip(other.answers, merge.answers, strict=True)),
                    "lost": len(lost), "won": len(won),
                    "lost_names": [f"{one.subject} {one.index}" for one in lost[:SHOWN_FLIPS]],
                    "won_names": [f"{one.subject} {one.index}" for one in won[:SHOWN_FLIPS]],
                }
            )  # fmt: skip
    return found


def _generation(study: Study) -> list[dict[str, Any]]:
    """Prompts with what every model wrote."""
    models = [one for one in study.models if "generation" in one.parts]
    if not models:
        return []
    prompts = [sample["prompt"] for sample in models[0].parts["generation"]["samples"]]
    return [
        {
            "prompt": prompt,
            "texts": [(one.name, one.parts["generation"]["samples"][number]["text"]) for one in models],
        }
        for number, prompt in enumerate(prompts)
    ]


def _speeds(study: Study) -> list[dict[str, Any]]:
    """One line per model and batch size, beside the original."""
    original = study.model(ORIGINAL)
    base = {one["batch"]: one for one in original.parts.get("speed", {}).get("batches", [])} if original else {}
    found = []
    for model in study.models:
        for one in model.parts.get("speed", {}).get("batches", []):
            against = base.get(one["batch"])
            ratios = {
                name: one[f"{name}_per_s"] / against[f"{name}_per_s"] if against else math.nan for name in ("prefill", "decode")
            }
            found.append({"name": model.name, **one, "ratios": ratios})
    return sorted(found, key=lambda one: one["batch"])


def _plain(score: dict[str, Any]) -> str:
    if (interval := all_or_none(score)) is not None:
        return f"{score['acc']:.4f} [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{score['acc']:.4f}" + (f" +- {score['stderr']:.4f}" if score["stderr"] is not None else "")


def _number(value: float | None) -> str:
    """A number of any size in few characters."""
    if value is None or math.isnan(value):
        return "–"  # noqa: RUF001 (a dash in a table)
    if value >= 1e5:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _share(score: dict[str, Any] | None) -> str:
    """An accuracy in per cent with its standard error; where all or none are right, with its interval."""
    if score is None:
        return "–"  # noqa: RUF001
    if (interval := all_or_none(score)) is not None:
        return f"{100 * score['acc']:.1f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    error = f" ± {100 * score['stderr']:.1f}" if score["stderr"] is not None else ""
    return f"{100 * score['acc']:.1f}{error}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _interval(one: Comparison) -> str:
    return f"{_signed(one.low)} to {_signed(one.high)}" if one.has_interval else too_little(one)


COLUMNS: dict[str, tuple[str, int, Callable[[Any], str]]] = {  # of `text_table`: what of a row, under which name, how wide
    "mmlu_micro": ("MMLU", 21, _plain),
    "perplexity": ("perplexity", 12, _number),
    "cloze": ("LAMBADA", 21, _plain),
    "speed": ("decode tok/s", 14, lambda batches: _number(batches[0]["decode_per_s"])),
}


def _size(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:.2f} GB"
    return f"{value / 1e6:.0f} MB" if value >= 1e7 else f"{value / 1e3:,.0f} kB"
