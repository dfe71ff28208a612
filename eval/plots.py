"""Pictures of searches and similarities, each with its data beside it as CSV. No display is needed and no state is kept.

Colours are Okabe and Ito's, which are told apart by the colour-blind; matrices are in viridis, signed ones in a map that is
grey at zero.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from merge.plan import Plan
from merge.publish import whole_file
from merge.search import Trial

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#999999"
DPI = 150
DECADE = 10.0  # values that span less have no powers of ten at their ticks
LABELLED = 40  # a matrix of more rows than this is labelled every few rows only


def save(figure: Figure, path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes `path` (PNG) and the same name with .csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=DPI, format="png", bbox_inches="tight")
    with whole_file(path.with_suffix(".csv")) as scratch, scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def axes(width: float = 7.0, height: float = 4.2, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with one or more axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in found:
        one.spines[["top", "right"]].set_visible(False)
    return figure, found


def log_axis(ax: Axes, which: str, values: Iterable[float]) -> None:
    """A logarithmic x or y axis; where the values span less than a decade its ticks are plain numbers, not 4.58 x 10^0."""
    ax.set(**{f"{which}scale": "log"})
    found = list(values)
    if max(found) < DECADE * min(found):
        axis: Axis = getattr(ax, f"{which}axis")
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.set_minor_locator(NullLocator())


def similarity_map(path: Path, similarity: npt.NDArray[np.float64], method: str) -> None:
    """Similarity of every pair of layers, as a heat map; pairs without a number stay white."""
    figure, (ax,) = axes(5.6, 4.8)
    image = ax.imshow(similarity, origin="lower", cmap="viridis")
    ax.set(xlabel="layer", ylabel="layer", title=f"Similarity of what enters two layers ({method})")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=ax, label="1 = the same" if method != "mka" else "normalised mutual information")
    rows = ((i, j, similarity[i, j]) for i in range(len(similarity)) for j in range(len(similarity)))
    save(figure, path, ("layer", "other", "similarity"), rows)


def influence_bars(path: Path, values: Sequence[float], removed: Sequence[int]) -> None:
    """Block influence of every layer; those removed are marked."""
    figure, (ax,) = axes()
    gone = set(removed)
    for label, colour, chosen in (
        ("kept", COLOURS[0], [i for i in range(len(values)) if i not in gone]),
        ("removed", COLOURS[1], sorted(gone)),
    ):
        ax.bar(chosen, [values[i] for i in chosen], color=colour, label=label, hatch="//" if label == "removed" else None)
    ax.set(xlabel="layer", ylabel="block influence, 1 - cos(input, output)", title="How far each layer turns its input")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    save(figure, path, ("layer", "influence", "removed"), ((i, v, int(i in gone)) for i, v in enumerate(values)))


def search_history(path: Path, trials: Sequence[Trial], what: str) -> None:
    """The loss of every trial in its order, and the best so far that met the limit."""
    figure, (ax,) = axes()
    save(figure, path, ("trial", "start", "step", "loss", "over_limit", "best"), draw_history(ax, trials, what))


def draw_history(ax: Axes, trials: Sequence[Trial], what: str) -> list[tuple[Any, ...]]:
    """Draws `search_history`; its data."""
    ways = list(dict.fromkeys(trial.start for trial in trials if trial.step > 0)) or [""]
    groups: dict[str, list[int]] = {}
    for i, trial in enumerate(trials):
        way = trial.start if trial.start in ways[: len(COLOURS) - 2] and trial.step > 0 else "starts and others"
        groups.setdefault(way, []).append(i)
    colours = iter(COLOURS)
    for way, chosen in groups.items():
        colour = GREY if way == "starts and others" else next(colours)
        finite = [i for i in chosen if math.isfinite(trials[i].loss)]
        met = [i for i in finite if trials[i].over <= 0]
        missed = [i for i in finite if trials[i].over > 0]
        ax.scatter(met, [trials[i].loss for i in met], s=12, color=colour, label=way or "trials")
        if missed:
            ax.scatter(
                missed,
                [trials[i].loss for i in missed],
                s=12,
                facecolors="none",
                edgecolors=colour,
                label=f"{way}: over the limit",
            )
    best, line = math.inf, []
    for trial in trials:
        best = min(best, trial.loss if trial.over <= 0 and math.isfinite(trial.loss) else math.inf)
        line.append(best)
    ax.step(range(len(line)), line, where="post", color="black", linewidth=1, label="best so far")
    losses = [trial.loss for trial in trials if math.isfinite(trial.loss)]
    if losses and min(losses) > 0:
        log_axis(ax, "y", losses)
    ax.set(xlabel="trial", ylabel=what, title="Loss of every trial")
    ax.legend(frameon=False, fontsize=8)
    return [(i, t.start, t.step, t.loss, t.over, b) for i, (t, b) in enumerate(zip(trials, line, strict=True))]


def alphas_by_step(path: Path, plans: Mapping[str, Plan]) -> None:
    """The alphas of several plans, step by step; those of other steps than the last plan's are left out."""
    figure, (ax,) = axes()
    save(figure, path, ("plan", "step", "into", "remove", "alpha"), draw_alphas(ax, plans))


def draw_alphas(ax: Axes, plans: Mapping[str, Plan]) -> list[tuple[Any, ...]]:
    """Draws `alphas_by_step`; its data."""
    steps = list(plans.values())[-1].steps
    same = [(step.into, step.remove) for step in steps]
    plans = {name: plan for name, plan in plans.items() if [(step.into, step.remove) for step in plan.steps] == same}
    rows: list[tuple[Any, ...]] = []
    markers = "os^Dv"
    for i, (name, plan) in enumerate(plans.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": markers[i % len(markers)], "label": name}
        ax.plot(range(len(plan.steps)), [step.alpha for step in plan.steps], linewidth=1, **style)
        rows += [(name, n, step.into, step.remove, step.alpha) for n, step in enumerate(plan.steps)]
    ax.set_xticks(range(len(steps)), [f"{s.into}<-{s.remove}" for s in steps], rotation=60, fontsize=8)
    ax.set(ylabel="alpha, weight of the kept layer", xlabel="step, in order", title="Alphas", ylim=(-0.03, 1.03))
    ax.legend(frameon=False)
    return rows


def mixtures(path: Path, plan: Plan) -> None:
    """The coefficients of every mixed row: what each surviving layer is made of, tensor group by tensor group."""
    found = draw_mixtures(plan)
    if found is not None:
        save(found[0], path, ("row", "group", "layer", "coefficient"), found[1])


def draw_mixtures(plan: Plan) -> tuple[Figure, list[tuple[Any, ...]]] | None:
    """Draws `mixtures` in a figure of its own; its data. None where nothing is mixed."""
    labels, values, rows = [], [], []
    for i, row in enumerate(plan.rows):
        for group, mix in row.groups.items() or ([("", row.mix)] if not row.is_unit else []):
            if dict(mix) == {row.base: 1.0} and not group:
                continue
            labels.append(f"{i} {group}".strip())
            values.append([mix.get(layer, 0.0) for layer in range(plan.num_hidden_layers)])
            rows += [(i, group or "all matrices", layer, c) for layer, c in mix.items()]
    if not values:
        return None
    table = np.array(values)
    used = np.flatnonzero(np.abs(table).sum(axis=0))
    first, last = int(used.min()), int(used.max())
    table = table[:, first : last + 1]
    figure, (ax,) = axes(2.6 + 0.32 * table.shape[1], 1.6 + 0.24 * min(len(table), LABELLED))
    reach = max(1e-9, float(np.abs(table).max()))
    image = ax.imshow(table, aspect="auto", cmap="PuOr_r", norm=TwoSlopeNorm(0.0, -reach, reach))
    every = -(-len(labels) // LABELLED)
    ax.set_yticks(range(0, len(labels), every), labels[::every], fontsize=7)
    ax.set_xticks(range(table.shape[1]), [str(layer) for layer in range(first, last + 1)], fontsize=7)
    ax.set(xlabel="original layer", title="Coefficients (row, tensor group)")
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, label="coefficient")
    return figure, rows


def slices(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], found: Mapping[str, float], what: str) -> None:
    """The loss along each of some parameters, the others as found; `found` marks where they were found."""
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = axes(2.6 * columns, 2.1 * rows + 0.4, columns, rows)
    for ax, (name, curve) in zip(grid, curves.items(), strict=False):
        ax.plot(*zip(*curve, strict=True), color=COLOURS[0], linewidth=1.2)
        ax.axvline(found[name], color=COLOURS[1], linewidth=1, linestyle="--")
        ax.set_title(name.replace(" layer", "\nlayer"), fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in grid[len(curves) :]:
        ax.set_visible(False)
    figure.suptitle("Loss along one parameter; dashed: as found", fontsize=10)
    figure.supylabel(what, fontsize=9)
    save(figure, path, ("parameter", "value", "loss"), ((name, *point) for name, curve in curves.items() for point in curve))


def loss_curve(log: Path, path: Path, held_out_before: float | None = None) -> None:
    """The loss of every update and on held-out text, from a training log; the log is its data.

    held_out_before: on held-out text before the first update, which a log of updates does not hold.
    """
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    update = [float(row["update"]) for row in rows]
    figure, (ax,) = axes()
    ax.plot(update, [float(row["loss"]) for row in rows], color=GREY, linewidth=1, label="training batch")
    measured = [(0.0, held_out_before)] if held_out_before is not None else []
    measured += [(x, float(row["held_out"])) for x, row in zip(update, rows, strict=True) if row["held_out"]]
    if measured:
        ax.plot(*zip(*measured, strict=True), color=COLOURS[0], marker="o", markersize=4, label="held-out text")
    ax.set(xlabel="update", ylabel="loss, nats per token", title="Training of the fusers")
    ax.legend(frameon=False)
    FigureCanvasAgg(figure)
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=DPI, format="png", bbox_inches="tight")


def differences(path: Path, rows: Sequence[Any], bench: Any) -> None:
    """Bits per byte of every arm of a fusion benchmark less its host's, by domain, with 95 % intervals over documents."""
    from .bits import difference
    from .fusion_bench import HOST, pooled, unit

    arms = [arm for arm in dict.fromkeys(row.arm for row in rows) if any(row.arm == arm and row.trained for row in rows)]
    domains = bench.measures
    figure, found = axes(4.2 * len(domains) + 1.5, 0.42 * len(arms) + 1.6, columns=len(domains))
    data = []
    for ax, domain in zip(found, domains, strict=True):
        for place, arm in enumerate(arms):
            one = difference(pooled(rows, arm, domain), pooled(rows, HOST, domain))
            control = arm.startswith((f"{bench.controlled}, ", "lora"))
            ax.errorbar(
                one.value, place, xerr=[[one.value - one.low], [one.high - one.value]], fmt="s" if control else "o",
                color=COLOURS[1] if control else COLOURS[0], capsize=3,
            )  # fmt: skip
            data.append((domain, arm, one.value, one.low, one.high))
        ax.axvline(0.0, color=GREY, linewidth=1)
        ax.set(title=domain, xlabel=f"{unit(domain)} less the host's (left is better)", yticks=range(len(arms)))
        ax.set_yticklabels(arms if ax is found[0] else [])
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.invert_yaxis()
    figure.suptitle("Arms (circles) and controls (squares); bars: 95 % intervals over documents", fontsize=10)
    save(figure, path, ("domain", "arm", "difference", "low", "high"), data)
