"""The pictures of a report, as SVG inside the page: text stays text, and lines take the colour of the page's text."""

import csv
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from merge.plan import Plan
from merge.search import Trial

from ..plots import COLOURS, DECADE, GREY, axes, draw_alphas, draw_history, draw_mixtures
from ..stats import wilson
from .arms import ORIGINAL
from .summary import MEASURES, Comparison, Model

INK = "#010203"  # drawn in this, and replaced by the page's own colour
LOOKS = {  # kind of model -> colour, marker
    ORIGINAL: (INK, "D"), "merge": (COLOURS[0], "o"), "uniform": (COLOURS[2], "^"),
}  # fmt: skip
DROPPED = (COLOURS[1], "s")
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10,
}  # fmt: skip


def overview(models: Sequence[dict[str, Any]]) -> str | None:
    """Every model's accuracy and perplexity with 95 % intervals; rows of `summary.table_rows`."""
    panels = []
    if any("mmlu_micro" in row for row in models):
        panels.append(("MMLU accuracy (micro)", False, lambda row: _accuracy(row.get("mmlu_micro"))))
    if any("cloze" in row for row in models):
        panels.append(("LAMBADA accuracy", False, lambda row: _accuracy(row.get("cloze"))))
    if any("perplexity" in row for row in models):
        panels.append(("perplexity (left is better)", True, _perplexity))
    if not panels:
        return None
    with rc_context(STYLE):
        figure, found = axes(3.1 * len(panels) + 1.6, 0.34 * len(models) + 1.3, columns=len(panels))
        for ax, (title, log, value) in zip(found, panels, strict=True):
            for place, row in enumerate(models):
                one = value(row)
                if one is None:
                    continue
                middle, low, high = one
                colour, marker = LOOKS.get(row["kind"], DROPPED)
                span = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
                ax.errorbar(middle, place, xerr=span, fmt=marker, color=colour, capsize=3, markersize=5)
            _rows(ax, [row["name"] for row in models], labelled=ax is found[0])
            ax.set_xlabel(title)
            values = [one[0] for row in models if (one := value(row)) is not None]
            if log and max(values) > DECADE * min(values):
                ax.set_xscale("log")
            else:
                ax.xaxis.set_major_locator(MaxNLocator(4))
        return svg(figure, "accuracy and perplexity of every model with 95 % intervals")


def differences(comparisons: Sequence[Comparison], measure: str) -> str | None:
    """Merges less their controls on one measurement, with 95 % intervals; what has none is left out."""
    comparisons = [one for one in comparisons if one.has_interval]
    if not comparisons:
        return None
    name, unit, more = MEASURES[measure]
    with rc_context(STYLE):
        figure, (ax,) = axes(7.0, 0.34 * len(comparisons) + 1.2)
        for place, one in enumerate(comparisons):
            shown = one.low > 0 or one.high < 0
            colour = (COLOURS[0] if one.better else COLOURS[1]) if shown else GREY
            marker = ("o" if one.better else "s") if shown else "D"
            span = [[max(0.0, one.value - one.low)], [max(0.0, one.high - one.value)]]
            ax.errorbar(one.value, place, xerr=span, fmt=marker, color=colour, capsize=3, markersize=5)
        ax.axvline(0.0, color=INK, linewidth=0.8)
        _rows(ax, [f"{one.model} - {one.other}" for one in comparisons])
        ax.set_xlabel(f"{name}, {unit}; {'right' if more else 'left'} of zero the merge is better")
        return svg(figure, f"differences on {name}")


def groups(models: Sequence[Model]) -> str | None:
    """Accuracy by group of subjects, with 95 % intervals."""
    models = [one for one in models if one.record.get("scores")]
    if not models:
        return None
    names = list(models[0].record["scores"]["groups"])
    with rc_context(STYLE):
        figure, found = axes(2.3 * len(names) + 1.6, 0.34 * len(models) + 1.3, columns=len(names))
        for ax, group in zip(found, names, strict=True):
            for place, one in enumerate(models):
                accuracy = _accuracy(one.record["scores"]["groups"].get(group))
                if accuracy is None:
                    continue
                middle, low, high = accuracy
                colour, marker = LOOKS.get(one.kind, DROPPED)
                span = [[middle - low], [high - middle]]
                ax.errorbar(middle, place, xerr=span, fmt=marker, color=colour, capsize=3, markersize=5)
            ax.axvline(0.25, color=GREY, linewidth=0.8, linestyle=":")
            _rows(ax, [one.name for one in models], labelled=ax is found[0])
            ax.set_xlabel(group.replace("_", " "))
            ax.xaxis.set_major_locator(MaxNLocator(3))
        return svg(figure, "MMLU accuracy by group of subjects; dotted: chance")


def alphas(plans: dict[str, Plan]) -> dict[str, str]:
    """Alphas step by step, one picture for all merges of the same steps, by their names."""
    alike: dict[tuple[tuple[int, int], ...], dict[str, Plan]] = {}
    for name, plan in plans.items():
        if plan.steps:
            alike.setdefault(tuple((step.into, step.remove) for step in plan.steps), {})[name] = plan
    found = {}
    for same in alike.values():
        with rc_context(STYLE):
            figure, (ax,) = axes()
            draw_alphas(ax, same)
            found[", ".join(same)] = svg(figure, f"the alpha of every step of {', '.join(same)}")
    return found


def mixture(plan: Plan) -> str | None:
    """What each mixed layer is made of."""
    with rc_context(STYLE):
        found = draw_mixtures(plan)
        return None if found is None else svg(found[0], f"coefficients of {plan.name}")


def layer_losses(layers: Sequence[Sequence[float]], removed: Sequence[int]) -> str | None:
    """The text's nats per token without each layer alone; marked are the layers that greedy removal takes."""
    if not layers:
        return None
    gone = set(removed)
    with rc_context(STYLE):
        figure, (ax,) = axes(7.0, 3.2)
        for label, colour, hatch, chosen in (
            ("kept", COLOURS[0], None, [(i, v) for i, v in layers if i not in gone]),
            ("among those that greedy removal takes", COLOURS[1], "//", [(i, v) for i, v in layers if i in gone]),
        ):
            ax.bar([i for i, _ in chosen], [v for _, v in chosen], color=colour, label=label, hatch=hatch)
        ax.set(xlabel="layer left out", ylabel="nats per token", ylim=(0.9 * min(v for _, v in layers), None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False)
        return svg(figure, "loss without each layer")


def history(file: Path) -> str | None:
    """The search that a merge came from, where its trials lie beside it."""
    path = file.with_name("trials.csv")
    if not path.is_file():
        return None
    try:
        with path.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        trials = [Trial(one["start"], int(one["step"]), (), float(one["loss"]), float(one["over_limit"])) for one in rows]
    except (KeyError, ValueError, TypeError, UnicodeDecodeError, OSError):
        return None
    if not trials:
        return None
    with rc_context(STYLE):
        figure, (ax,) = axes()
        draw_history(ax, trials, "loss")
        return svg(figure, f"loss of every trial of the search for {file.parent.name}")


def svg(figure: Figure, label: str) -> str:
    """A figure as SVG for the inside of a page: no names that another figure has, and a label for those who cannot see it."""
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    found = text.getvalue()
    found = found[found.index("<svg") :].replace(INK, "currentColor")
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', found))
    found = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", found)
    found = re.sub(r"'[^']*(?:DejaVu|Sans)[^']*'(?:, '[^']*')*(?:, sans-serif)?", "inherit", found)
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', found)[:2])
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f"max-width:{width * 1.25:.0f}px;min-width:min({width:.0f}px, 34rem)"
    head = f'<svg {names} viewBox="0 0 {width:g} {height:g}" style="{style}" role="img" aria-label="{label}">'
    return re.sub(r"<svg [^>]*>", lambda _: head, found, count=1)


def _rows(ax: Axes, names: Sequence[str], *, labelled: bool = True) -> None:
    """One row for each name, the first on top."""
    ax.set_yticks(range(len(names)), names if labelled else [])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", alpha=0.15)


def _accuracy(score: dict[str, Any] | None) -> tuple[float, float, float] | None:
    """(accuracy, 95 % interval)."""
    return None if score is None else (score["acc"], *wilson(round(score["acc"] * score["count"]), score["count"]))


def _perplexity(row: dict[str, Any]) -> tuple[float, float, float] | None:
    if "perplexity" not in row:
        return None
    return (row["perplexity"], *(row["perplexity_interval"] or (row["perplexity"], row["perplexity"])))
