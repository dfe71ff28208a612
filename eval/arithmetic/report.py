"""The study's results in one table, beside the published numbers and the noise.

For every run and data set: the five metrics over seeds; how many seeds reached 0.99 at all (times of those that did not are
unknown, not long, so they are counted and not averaged); medians of the last evaluations; all validation pairs; what it cost.

    paired   step_val_acc_99 minus that of the run it is compared with, seed by seed: split, batches and the initial values of
             what they have in common are the same, which takes out most of the variance
    z        (mean - mean of the baseline) / (sd sqrt(1/n + 1/m)), sd and m of the baseline's replicates; |z| < 2 shows nothing
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merge.records import read_json

from ..results import write_whole
from ..stats import Mean, mean
from .batches import Recipe
from .execute import read_result
from .results import METRICS, Spread, spread
from .study import Cell, Run, Study
from .tasks import MODULUS, PERMUTED

BASELINES = ("baseline", "baseline-b", "baseline-c")  # replicates of each other
ENOUGH = 3  # pairs for an interval


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
    parameters: int
    trained_parameters: int
    gflop_per_update: float
    updates: int
    cpu_s: float

    @property
    def verdict(self) -> str:
        """What may be concluded about the number of updates."""
        if self.paired is None:
            return "too few pairs"
        if self.paired.high < 0:
            return "earlier"
        return "later" if self.paired.low > 0 else "no difference shown"


def summarise(study: Study, out: Path, published: Mapping[str, Any] | None = None) -> list[Row]:
    """A row for every run and data set of which there is a result."""
    found = []
    for run in study.runs:
        for dataset in study.datasets_of(run):
            results = _results(study, out, run.name, dataset)
            if results:
                found.append(_row(study, out, run, dataset, results, published or {}))
    return found


def _results(study: Study, out: Path, run: str, dataset: str) -> list[dict[str, Any]]:
    several = [read_result(out, Cell(run, dataset, seed)) for seed in range(study.seeds)]
    return [one for one in several if one is not None]


def _row(
    study: Study, out: Path, run: Run, dataset: str, results: Sequence[dict[str, Any]], published: Mapping[str, Any]
) -> Row:
    good = [one for one in results if one["diverged_at"] is None]
    values = {
        name: spread([one[name] for one in good if one[name] is not None])
        for name in (*METRICS, "full_val_acc", "median_val_acc", "start_full_val_acc")
    }
    first = results[0]
    if (study.modulus, study.permuted, study.recipe_of(run)) != (MODULUS, PERMUTED, Recipe()):
        published = {}  # of another experiment
    theirs = published.get("runs", {}).get(run.published or "", {}).get("results", {}).get(dataset)
    replicates = published.get("replicates", {}).get(dataset)
    published_z = None
    if theirs is not None and replicates is not None:
        error = replicates["sd"] * math.sqrt(1 / published["seeds"] + 1 / replicates["count"])
        published_z = (theirs["step_val_acc_99"] - replicates["mean"]) / error
    return Row(
        run.name, run.title, dataset, run.mode, tuple(one["seed"] for one in results), values,
        sum(one["reached"] for one in good),
        tuple(one["step_val_acc_99"] if one["reached"] and one["diverged_at"] is None else None for one in results),
        len(results) - len(good), theirs, published_z, _z(study, out, run, dataset, good), run.compare,
        _paired(study, out, run, dataset, good), first["parameters"], first["trained_parameters"], first["gflop_per_update"],
        first["updates"], float(np.mean([one["cpu_s"] for one in results])),
    )  # fmt: skip


def _times(results: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["step_val_acc_99"] for one in results if one["reached"] and one["diverged_at"] is None]


def _z(study: Study, out: Path, run: Run, dataset: str, results: Sequence[Mapping[str, Any]]) -> float | None:
    """Against our own baselines; None where a time is unknown or there are too few."""
    base = [one for name in BASELINES for one in _results(study, out, name, dataset)]
    times, others = _times(results), _times(base)
    if run.name in BASELINES or len(times) < len(results) or len(others) < len(base) or min(len(times), len(others) - 1) < 1:
        return None
    error = float(np.std(others, ddof=1)) * math.sqrt(1 / len(times) + 1 / len(others))
    return (float(np.mean(times)) - float(np.mean(others))) / error if error else None


def _paired(study: Study, out: Path, run: Run, dataset: str, results: Sequence[Mapping[str, Any]]) -> Mean | None:
    """Seeds that both reached 0.99 with."""
    if run.name == run.compare or run.compare not in {one.name for one in study.runs}:
        return None
    other = {one["seed"]: one for one in _results(study, out, run.compare, dataset)}
    pairs = [
        one["step_val_acc_99"] - other[one["seed"]]["step_val_acc_99"]
        for one in results
        if one["seed"] in other and one["reached"] and other[one["seed"]]["reached"]
    ]
    return mean(pairs) if len(pairs) >= ENOUGH else None


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


def _published(row: Row) -> str:
    return "" if row.published is None else f"{row.published['step_val_acc_99']:.0f}"


def _difference(row: Row) -> str:
    return "" if row.paired is None else f"{row.paired.value:+.0f} [{row.paired.low:.0f}, {row.paired.high:.0f}]"


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
            "| run | 0.99 at update | reached | paired difference, updates | z | val acc, median of last 20 | last | all pairs "
            "| val loss | published: 0.99 at | z | last val acc | parameters | GFLOP per update |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
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
                f"{row.parameters:,}", f"{row.gflop_per_update:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def read_published(path: Path) -> dict[str, Any]:
    """The numbers of the published study."""
    return dict(read_json(path))
