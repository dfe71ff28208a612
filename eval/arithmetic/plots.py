"""The study's sixteen figures, each with its data beside it as CSV, and a page that shows them all."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merge.publish import write_whole

from ..plots import COLOURS, axes, log_axis, save
from ..stats import stderr
from .execute import read_log, read_result
from .report import Row, markdown
from .results import columns
from .study import Cell, Run, Study

QUANTITIES = {  # column of the log -> name of the figure's file, axis
    "train_loss": "training loss (nats per answer)",
    "val_loss": "validation loss (nats per answer)",
    "train_acc": "training accuracy",
    "val_acc": "validation accuracy",
}
STYLES = ("-", "--", "-.", ":", (0, (7, 2)), (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2)), (0, (3, 4)))  # 56 looks with the colours
SMOOTHED = 5  # evaluations per drawn point: spikes of single evaluations would hide the lines
BESIDE = 4  # more runs than this, and the legend stands beside the axes


def draw_all(study: Study, out: Path, rows: Sequence[Row], *, log_x: bool = False, with_page: bool = True) -> list[Path]:
    """OUT/plots/{quantity}_{data set}.png and OUT/index.html; the figures' paths."""
    paths = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        runs = [study.run(row.run) for row in rows if row.dataset == dataset and row.updates > 0]
        for quantity in QUANTITIES:
            path = out / "plots" / f"{quantity}_{dataset}.png"
            if runs and curves(path, study, out, runs, dataset, quantity, log_x=log_x):
                paths.append(path)
    if with_page:
        write_whole(out / "index.html", page(study, rows, paths, out))
    return paths


def curves(path: Path, study: Study, out: Path, runs: Sequence[Run], dataset: str, quantity: str, *, log_x: bool) -> bool:
    """One figure: a line per run, the mean over seeds, with the standard error as a band; False if there is nothing."""
    beside = len(runs) > BESIDE
    figure, (ax,) = axes(11.0 if beside else 8.0, max(4.8, 0.21 * len(runs) + 1.0) if beside else 4.8)
    data, most = [], 0
    for i, run in enumerate(runs):
        series = _series(study, out, run, dataset, quantity)
        if series is None:
            continue
        steps, values = series
        middle = values.mean(0)
        error = np.array([stderr(column) for column in values.T.tolist()])
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        ax.plot(steps, middle, linestyle=style, color=colour, linewidth=1.3, label=f"{run.title} (n = {len(values)})")
        if len(values) > 1:
            ax.fill_between(steps, middle - error, middle + error, color=colour, alpha=0.15, linewidth=0)
        data += [[run.name, int(s), m, e] for s, m, e in zip(steps, middle.tolist(), error.tolist(), strict=True)]
        most = max(most, len(values))
    if not data:
        return False
    if log_x:
        log_axis(ax, "x", [step for _, step, _, _ in data])
    band = "band: standard error over seeds (n - 1, root n)" if most > 1 else "one seed: no band"
    ax.set(
        xlabel=f"updates{' (log)' if log_x else ''}; every point is the mean of {SMOOTHED} evaluations where there are as many",
        ylabel=QUANTITIES[quantity], title=f"{dataset}: {QUANTITIES[quantity].split(' (')[0]}",
    )  # fmt: skip
    if quantity.endswith("loss"):
        log_axis(ax, "y", [mean for _, _, mean, _ in data])
    else:
        ax.set_ylim(-0.02, 1.02)
    ax.grid(alpha=0.2)
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if beside else {"loc": "best"}
    ax.legend(title=band, fontsize=7, title_fontsize=7, frameon=False, **place)
    save(figure, path, ["run", "step", "mean", "stderr"], data)
    return True


def _series(
    study: Study, out: Path, run: Run, dataset: str, quantity: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """(steps [T], values [seeds, T]) of the seeds that are done and did not diverge."""
    logs = []
    for seed in range(study.seeds):
        cell = Cell(run.name, dataset, seed)
        result = read_result(out, cell)
        if result is not None and result["diverged_at"] is None:
            logs.append(columns(read_log(out, cell)[1:]))
    if not logs or not len(logs[0]["step"]):
        return None
    size = SMOOTHED if len(logs[0]["step"]) >= SMOOTHED else 1
    count = len(logs[0]["step"]) // size * size
    steps = logs[0]["step"][:count].reshape(-1, size).mean(1)
    return steps, np.stack([one[quantity][:count].reshape(-1, size).mean(1) for one in logs])


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Modular arithmetic study</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 12px; white-space: nowrap; }}
td, th {{ border-bottom: 1px solid #8886; padding: .25rem .6rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }}
img {{ width: 100%; background: #fff; }}
</style></head><body>
<h1>Modular arithmetic study</h1>
<p>{settings}</p>
<p>A time until validation accuracy 0.99 is a mean over the seeds that reached it. Paired differences are over seeds, with 95 %
intervals by Student's t; z compares with the baseline's replicates, |z| below 2 shows nothing. &plusmn; is the standard
error over seeds. Click a figure for its full size; its data lies beside it as CSV.</p>
{sections}
</body></html>
"""


def page(study: Study, rows: Sequence[Row], paths: Sequence[Path], out: Path) -> str:
    """The overview: for every data set its table and figures."""
    sections = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        figures = [path for path in paths if path.stem.endswith(f"_{dataset}")]
        images = "".join(
            f'<a href="{path.relative_to(out)}"><img loading="lazy" src="{path.relative_to(out)}" alt="{path.stem}"></a>'
            for path in figures
        )
        table = _html_table(markdown([row for row in rows if row.dataset == dataset]))
        sections.append(f'<h2>{dataset}</h2><div class="wide">{table}</div><div class="figures">{images}</div>')
    recipe = study.recipe
    settings = (
        f"{len(study.runs)} runs, {study.seeds} seeds, {recipe.updates:,} updates of {recipe.batch} pairs, "
        f"modulus {study.modulus}."
    )
    return PAGE.format(settings=settings, sections="\n".join(sections))


def _html_table(text: str) -> str:
    """A markdown table as HTML."""
    head, *body = [
        line.strip().removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line.startswith("| ")
    ]
    cells = ["".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) for row in body]
    return (
        "<table><thead><tr>" + "".join(f"<th>{html.escape(one)}</th>" for one in head) + "</tr></thead><tbody>"
        + "".join(f"<tr>{row}</tr>" for row in cells) + "</tbody></table>"
    )  # fmt: skip
