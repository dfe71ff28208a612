"""The study's results in one table, beside the published numbers and the noise.

For every run and data set: the five metrics over seeds; how many seeds reached 0.99 at all (times of those that did not are
unknown, not long, so they are counted and not averaged); medians of the last evaluations; all validation pairs; what it cost.

    paired   against the run it is compared with, seed by seed: split, batches and the initial values of what they have in
             common are the same, which takes out most of the variance. Of step_val_acc_99 where both are trained from scratch
             and every seed reached 0.99, else of the accuracy over all validation pairs
    verdict  by that interval, and by Holm's correction over all rows
    z        of step_val_acc_99 against 18 published replicates of the baseline, whose splits are others:
             (mean - their mean) / (sd sqrt(1/n + 1/18)); |z| < 2 shows nothing. None where a time is not known
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from merge.publish import write_whole
from merge.records import read_json

from ..compare import SIGNIFICANT
from ..stats import Mean, holm, mean
from .batches import Recipe
from .execute import read_result
from .precision import PRECISIONS
from .results import METRICS, Spread, spread
from .study import Cell, Run, Study, definition
from .tasks import MODULUS, PERMUTED, TASKS

ENOUGH = 3  # pairs for an interval
ROUTING = ("routing_entropy", "unshuffled_acc", "shuffled_acc")
HEADER = (
    *(
        "run",
        "0.99 at update",
        "reached",
        "paired difference (updates, or accuracy)",
        "z",
        "val acc, median of last 20",
        "last",
    ),
    *("all pairs", "val loss", "published: 0.99 at", "z", "last val acc", "parameters", "GFLOP per update", "TFLOP to 0.99"),
    "CPU s",
)


@dataclass(frozen=True)
class Row:
    """One run on one data set, over its seeds."""

    run: str
    title: str
    dataset: str
    mode: str
    seeds: tuple[int, ...]
    metrics: dict[str, Spread]  # the study's five, and full_val_acc, median_val_acc
    reached: int
    steps: tuple[float | None, ...]  # of each seed; None: not reached
    diverged: int
    published: dict[str, float] | None
    published_z: float | None
    z: float | None
    compare: str
    paired: Mean | None
    paired_in: str  # updates, or accuracy
    parameters: int
    trained_parameters: int
    gflop_per_update: float
    updates: int
    cpu_s: float
    adjusted_p: float | None = None

    @property
    def verdict(self) -> str:
        """What may be concluded from the pairs."""
        if self.paired is None:
            return "not paired"
        if self.paired.low <= 0 <= self.paired.high:
            return "no difference shown"
        words = ("earlier", "later") if self.paired_in == "updates" else ("worse", "better")
        found = words[self.paired.value > 0]
        return found if self.adjusted_p is not None and self.adjusted_p < SIGNIFICANT else f"{found}, but not after correction"


def on_disk(study: Study, out: Path) -> Study:
    """The study reduced to runs of which there are results there under the same definition; all their data sets and seeds."""
    runs, datasets, seeds = [], set(), 0
    for run in study.runs:
        path = out / run.name / "definition.json"
        if not path.exists() or read_json(path) != definition(study, run):
            continue
        found = [read_json(one) for one in (out / run.name).glob("*/result.json")]
        if found:
            here = {one["dataset"] for one in found}
            runs.append(replace(run, datasets=tuple(name for name in TASKS if name in here)))
            datasets |= here
            seeds = max(seeds, 1 + max(one["seed"] for one in found))
    return replace(study, runs=tuple(runs), datasets=tuple(name for name in TASKS if name in datasets), seeds=max(1, seeds))


def summarise(study: Study, out: Path, published: Mapping[str, Any] | None = None) -> list[Row]:
    """A row for every run and data set of which there is a result."""
    found = []
    for run in study.runs:
        for dataset in study.datasets_of(run):
            results = _results(study, out, run.name, dataset)
            if results:
                found.append(_row(study, out, run, dataset, results, published or {}))
    tested = [row for row in found if row.paired is not None]
    adjusted = holm([_p_value(row.paired) for row in tested if row.paired is not None])
    corrected = {id(row): p for row, p in zip(tested, adjusted, strict=True)}
    return [replace(row, adjusted_p=corrected.get(id(row))) for row in found]


def _p_value(found: Mean) -> float:
    """Two-sided, by Student's t."""
    if found.stderr == 0.0:
        return 1.0 if found.value == 0.0 else 0.0
    return float(2 * student.sf(abs(found.value) / found.stderr, found.count - 1))


def _results(study: Study, out: Path, run: str, dataset: str) -> list[dict[str, Any]]:
    several = [read_result(out, Cell(run, dataset, seed)) for seed in range(study.seeds)]
    return [one for one in several if one is not None]


def _row(
    study: Study, out: Path, run: Run, dataset: str, results: Sequence[dict[str, Any]], published: Mapping[str, Any]
) -> Row:
    good = [one for one in results if one["diverged_at"] is None]
    values = {
        name: spread([one[name] for one in good if one[name] is not None])
        for name in (*METRICS, "full_val_acc", "median_val_acc", "start_full_val_acc", *ROUTING)
        if all(name in one for one in results)
    }
    first = results[0]
    precision = study.recipe_of(run).matmul_precision
    title = run.title if precision == PRECISIONS[0] else f"{run.title} ({precision} products)"
    recipe = replace(study.recipe_of(run), matmul_precision=PRECISIONS[0])  # the function learned is the same one
    if (study.modulus, study.permuted, recipe) != (MODULUS, PERMUTED, Recipe()):
        published = {}  # of another experiment
    theirs = published.get("runs", {}).get(run.published or "", {}).get("results", {}).get(dataset)
    replicates = published.get("replicates", {}).get(dataset)
    times = _times(results)
    published_z = z = None
    if replicates is not None and replicates["reached"] == replicates["count"]:
        if theirs is not None:
            published_z = _z(theirs["step_val_acc_99"], published["seeds"], replicates)
        if run.mode == "cotrain" and len(times) == len(results):
            z = _z(float(np.mean(times)), len(times), replicates)
    paired, paired_in = _paired(study, out, run, dataset, results)
    return Row(
        run.name, title, dataset, run.mode, tuple(one["seed"] for one in results), values,
        sum(one["reached"] for one in good),
        tuple(one["step_val_acc_99"] if one["reached"] and one["diverged_at"] is None else None for one in results),
        len(results) - len(good), theirs, published_z, z, run.compare, paired, paired_in,
        first["parameters"], first["trained_parameters"], first["gflop_per_update"],
        first["updates"], float(np.mean([one["cpu_s"] for one in results])),
    )  # fmt: skip


def _times(results: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["step_val_acc_99"] for one in results if one["reached"] and one["diverged_at"] is None]


def _z(value: float, count: int, replicates: Mapping[str, Any]) -> float:
    """Against the published replicates."""
    return float((value - replicates["mean"]) / (replicates["sd"] * math.sqrt(1 / count + 1 / replicates["count"])))


def _paired(study: Study, out: Path, run: Run, dataset: str, results: Sequence[Mapping[str, Any]]) -> tuple[Mean | None, str]:
    """(the differences over seeds, of what); leaving seeds out because of how they ended would be a choice by the outcome."""
    control = next((one for one in study.runs if one.name == run.compare), None)
    if control is None or control.name == run.name:
        return None, ""
    others = {one["seed"]: one for one in _results(study, out, control.name, dataset)}
    pairs = [(one, others[one["seed"]]) for one in results if one["seed"] in others]
    if len(pairs) < ENOUGH or any(one["diverged_at"] is not None for pair in pairs for one in pair):
        return None, ""
    if run.mode == control.mode == "cotrain" and all(one["reached"] for pair in pairs for one in pair):
        return mean([a["step_val_acc_99"] - b["step_val_acc_99"] for a, b in pairs]), "updates"
    return mean([a["full_val_acc"] - b["full_val_acc"] for a, b in pairs]), "accuracy"


def table(study: Study, rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        lines.append(
            f"\n{dataset}\n{'run':36} {'n':>2} {'0.99 at':>16} {'reached':>7} {'median val':>10} {'all pairs':>9} "
            f"{'paired to':>24} {'difference':>20} {'z':>5} {'published':>9}"
        )
        for row in (one for one in rows if one.dataset == dataset):
            lines.append(
                f"{row.run:36} {len(row.seeds):2} {_time(row):>16} {f'{row.reached}/{len(row.seeds)}':>7} "
                f"{row.metrics['median_val_acc'].mean:10.4f} {row.metrics['full_val_acc'].mean:9.4f} "
                f"{row.compare if row.paired else '':>24} {_difference(row):>20} {'' if row.z is None else f'{row.z:.1f}':>5} "
                f"{_published(row):>9}"
            )
    return "\n".join(lines).lstrip("\n")


def _time(row: Row) -> str:
    known = [one for one in row.steps if one is not None]
    if not row.updates:
        return "untrained" if row.mode == "cotrain" else "not trained on"
    return str(spread(known)) if known else f"> {row.updates}"


def _cost(row: Row) -> str:
    """Of matrix products until 0.99, training alone, without what trained sources had cost before."""
    known = [one for one in row.steps if one is not None]
    whole = row.updates and row.mode == "cotrain" and len(known) == len(row.steps)
    return f"{float(np.mean(known)) * row.gflop_per_update / 1e3:.1f}" if whole else ""


def _published(row: Row) -> str:
    if row.published is None:
        return ""
    return f"{row.published['step_val_acc_99']:.0f}" if row.published["any_reached"] else "never"


def _difference(row: Row) -> str:
    if row.paired is None:
        return ""
    digits = ".0f" if row.paired_in == "updates" else ".3f"
    return f"{row.paired.value:+{digits}} [{row.paired.low:{digits}}, {row.paired.high:{digits}}]"


def write_report(study: Study, out: Path, rows: Sequence[Row], *, plots: bool = True) -> None:
    """OUT/results.json, OUT/table.md, and the figures with their overview page."""
    record = [
        asdict(row)
        | {
            "metrics": {name: [_finite(one.mean), _finite(one.stderr), one.count] for name, one in row.metrics.items()},
            "paired": row.paired.to_dict() if row.paired else None,
            "verdict": row.verdict,
        }
        for row in rows
    ]
    write_whole(out / "results.json", json.dumps(record, indent=2) + "\n")
    write_whole(out / "table.md", markdown(rows))
    if plots:
        from .plots import draw_all

        draw_all(study, out, rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def markdown(rows: Sequence[Row]) -> str:
    """One table per data set."""
    lines = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        lines += [
            f"### {dataset}\n",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
        ]
        for row in (one for one in rows if one.dataset == dataset):
            theirs, m = row.published, row.metrics
            cells = [
                row.title, _time(row), f"{row.reached}/{len(row.seeds)}",
                "" if row.paired is None else f"{_difference(row)} to {row.compare}: {row.verdict}",
                "" if row.z is None else f"{row.z:.1f}",
                str(m["median_val_acc"]), str(m["final_val_acc"]), str(m["full_val_acc"]), str(m["final_val_loss"]),
                _published(row),
                "" if row.published_z is None else f"{row.published_z:.1f}",
                "" if theirs is None else f"{theirs['final_val_acc']:.4f}",
                f"{row.parameters:,}", f"{row.gflop_per_update:.2f}", _cost(row), f"{row.cpu_s:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if routed := [row for row in rows if set(ROUTING) <= row.metrics.keys()]:
        lines += [
            "### Routing of dynamic fusion\n",
            "| run | data set | entropy / ln K | accuracy | with another pair's weights |",
        ]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {row.title} | {row.dataset} | " + " | ".join(str(row.metrics[x]) for x in ROUTING) + " |" for row in routed
        ]
        lines.append("")
    return "\n".join(lines)


def read_published(path: Path) -> dict[str, Any]:
    """The numbers of the published study."""
    return dict(read_json(path))
