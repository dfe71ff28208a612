"""The arithmetic study in one call: its cells made, compared and drawn, or drawn again from what is on disk."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge.publish import in_turn

from .execute import Finished, Progress, check, make_all, silent
from .plots import draw_all
from .report import Row, on_disk, summarise, write_report
from .study import Study, checked, chosen, read_study


@dataclass(frozen=True)
class Made:
    """A study's results: a row for every run and data set, why cells failed, and how long making them took."""

    study: Study
    rows: list[Row]
    failed: Mapping[str, str]
    time_s: float


def arithmetic_study(
    config: Path,
    *,
    runs: Sequence[str] = (),
    datasets: Sequence[str] = (),
    seeds: int | None = None,
    steps: int | None = None,
    modulus: int | None = None,
    matmul_precision: str | None = None,
) -> Study:
    """The study of a YAML file, or the part of it that is named.

    Args:
        runs: these and what they are made of.
        datasets: these; runs with data sets of their own stay where one of theirs is among them.
        seeds: seeds 0 to `seeds` - 1.
        steps: updates of runs that do not say how many.
        modulus: of the modular tasks.
        matmul_precision: of runs that do not say in which.

    Raises:
        RecordError, StudyError: the file is wrong, or has no such run or data set.
    """
    study = read_study(config)
    if runs:
        study = chosen(study, runs)
    changes: dict[str, Any] = {}
    if seeds:
        changes["seeds"] = seeds
    if modulus:
        changes["modulus"] = modulus
    recipe: dict[str, Any] = {"updates": steps, "matmul_precision": matmul_precision}
    changes["recipe"] = replace(study.recipe, **{key: value for key, value in recipe.items() if value})
    if datasets:
        changes["datasets"] = tuple(datasets)
        # Runs with data sets of their own stay only where one of these is asked for.
        kept = [
            replace(one, datasets=tuple(d for d in one.datasets if d in datasets)) if one.datasets else one
            for one in study.runs
        ]
        changes["runs"] = tuple(new for old, new in zip(study.runs, kept, strict=True) if new.datasets or not old.datasets)
    return checked(replace(study, **changes))


def run_arithmetic(
    study: Study,
    out: Path,
    *,
    whole: Study | None = None,
    published: Mapping[str, Any] | None = None,
    workers: int | None = None,
    device: str = "cpu",
    compiled: bool = False,
    plots: bool = True,
    progress: Progress = silent,
    finished: Finished = lambda cell, result: None,
) -> Made:
    """Makes what is not in the folder `out` yet, and reports on everything that is.

    Args:
        whole: the study that `study` is a part of; what else is there of it is reported too.
        published: of `read_published`, to compare with.
        workers: processes on a CPU, which import the calling script: it needs `if __name__ == "__main__"`. None: this one.
        compiled: by torch.compile, which makes long runs of workers faster.
        progress: called with a cell and the number of its updates just made; with all at once that a checkpoint holds.
        finished: called with every cell and its result.

    Raises:
        StudyError: `out` holds other runs of the same names, this machine does not make products in a run's precision, or a
            worker process died.
        OutputError: another process makes cells of one of these runs, or nothing can be written there.
    """
    started = time.perf_counter()
    if whole is not None:
        check(whole, out)  # the report is of everything that is there; what has other settings would be missing in it
    failed = make_all(study, out, workers=workers, device=device, compiled=compiled, progress=progress, finished=finished)
    seconds = time.perf_counter() - started
    with in_turn(out):
        found = on_disk(whole or study, out)
        rows = summarise(found, out, published)
        write_report(found, out, rows, plots=plots)
    return Made(found, rows, failed, seconds)


def draw_arithmetic(
    study: Study, out: Path, *, published: Mapping[str, Any] | None = None, log_x: bool = False, with_page: bool = True
) -> tuple[list[Row], list[Path]]:
    """(the rows of what is on disk, the figures drawn from it); no rows where there is no result of these runs.

    Raises:
        StudyError: `out` holds other runs of the same names.
    """
    check(study, out)
    rows = summarise(study, out, published)
    if not rows:
        return rows, []
    with in_turn(out):
        return rows, draw_all(study, out, rows, log_x=log_x, with_page=with_page)
