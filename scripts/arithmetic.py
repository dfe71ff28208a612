# PYTHON_ARGCOMPLETE_OK
"""Runs the arithmetic study: small networks that learn x+y, x-y, x/y mod 97 and permutations, alone, fused and merged."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from _cli import CONFIGS, UsageError, parser, relative, run
from _progress import Pieces, counter
from _scoring import check_positive


STUDY = CONFIGS / "arithmetic" / "study.yaml"
PUBLISHED = CONFIGS / "arithmetic" / "published.json"
EXAMPLES = """\
  python scripts/arithmetic.py --out runs/arithmetic
  python scripts/arithmetic.py --runs baseline,feature-fusion-attention --datasets x_div_y --seeds 5 --steps 7500
  python scripts/arithmetic.py --runs baseline --steps 500 --dry-run"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_study_options(result)
    how = result.add_argument_group("how")
    how.add_argument("--workers", type=int, metavar="N", help="processes of one thread each (default: one per core)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    how.add_argument("--no-compile", action="store_true", help="do not use torch.compile, which makes long runs faster")
    how.add_argument("--dry-run", action="store_true", help="list the runs with their sizes and costs")
    how.add_argument("--no-plots", action="store_true", help="numbers only")
    how.add_argument(
        "--out", type=Path, default=Path("runs/arithmetic"), metavar="DIR",
        help="results; cells that are there already are kept, begun ones gone on with (default: runs/arithmetic)",
    )  # fmt: skip
    return result


def add_study_options(result: argparse.ArgumentParser) -> None:
    """Which runs, data sets and seeds."""
    what = result.add_argument_group("what is run")
    what.add_argument("--config", type=Path, default=STUDY, metavar="FILE", help=f"the study (default: {relative(STUDY)})")
    what.add_argument("--runs", metavar="A,B,...", help="only these, and what they are made of (default: all)")
    what.add_argument("--datasets", metavar="A,B,...", help="only these (default: those of the study)")
    what.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the study's)")
    what.add_argument("--steps", type=int, metavar="N", help="updates of runs that do not say how many (default: the study's)")
    what.add_argument("--modulus", type=int, metavar="P", help="of the modular tasks (default: the study's)")
    what.add_argument(
        "--matmul-precision", metavar="NAME",
        help="float32, or bfloat16 where the CPU has such products: faster (default: the study's, float32)",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Reads the study, makes its cells, prints and draws."""
    check_positive(arguments, "workers")
    from eval.arithmetic.study import is_grid

    if is_grid(arguments.config):
        return hugging_face(arguments)
    from eval.arithmetic.execute import read_result
    from eval.arithmetic.report import read_published, table
    from eval.arithmetic.run import run_arithmetic
    from eval.arithmetic.study import cells
    from merge.runtime import training_device

    study = find_study(arguments)
    if arguments.dry_run:
        print(plan(study))
        return 0
    whole = find_study(arguments, everything=True)
    device = training_device(arguments.device)
    workers = arguments.workers or len(os.sched_getaffinity(0))
    compiled = not arguments.no_compile
    if compiled and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        logging.warning("there is no C++ compiler for torch.compile; training takes about 1.5 times as long")
        compiled = False
    todo = [cell for cell in cells(study) if read_result(arguments.out, cell) is None]
    updates_of = {one.name: study.recipe_of(one).updates for one in study.runs}
    total = sum(updates_of[cell.run] for cell in todo)
    logging.info("%d of %d cells to make, %s updates", len(todo), len(cells(study)), f"{total:,}")
    # An update of a large network takes many times as long as one of a small one, so the bar counts operations.
    flops = flops_of(study, todo)
    work = sum(each * updates_of[cell.run] for cell, each in flops.items())
    with counter("training", "FLOP", work, arguments.quiet) as bar:
        pieces = Pieces()

        def advance(cell: Any, updates: int) -> None:
            pieces.advance(cell.folder, updates, updates_of[cell.run])
            bar.set_postfix_str(str(pieces), refresh=False)
            bar.update(updates * flops[cell])

        def finished(cell: Any, result: Any) -> None:
            pieces.finish(cell.folder)
            step = f"0.99 at {result['step_val_acc_99']:.0f}" if result["reached"] else "0.99 not reached"
            logging.info("%s: %s, %.0f s", cell.folder, step, result["time_s"])
            if result["diverged_at"] is not None:
                logging.warning(
                    "%s stopped at update %d: the loss is no longer a number; the others go on",
                    cell.folder,
                    result["diverged_at"],
                )

        made = run_arithmetic(
            study, arguments.out, whole=whole, published=read_published(PUBLISHED),
            workers=workers, device=device, compiled=compiled, plots=not arguments.no_plots, progress=advance,
            finished=finished,
        )  # fmt: skip
    print(table(made.study, made.rows))
    for line in not_compared(study, whole, made.rows):
        logging.warning("%s", line)
    for folder, message in made.failed.items():
        logging.error("%s: %s", folder, message)
    if todo:
        logging.warning(
            "%s updates in %.0f s on %s", f"{total:,}", made.time_s, f"{workers} processes" if device == "cpu" else device
        )
    print(
        json.dumps({"out": str(arguments.out), "cells": len(cells(made.study)) - len(made.failed), "failed": len(made.failed)})
    )
    return 1 if made.failed else 0


def flops_of(study: Any, todo: Any) -> dict[Any, int]:
    """Operations of one update of each cell."""
    from eval.arithmetic.execute import flops_per_update
    from eval.arithmetic.tasks import make_task

    tasks = {name: make_task(name, study.modulus, study.permuted) for name in {cell.dataset for cell in todo}}
    runs = {name: study.run(name) for name in {cell.run for cell in todo}}
    return {cell: flops_per_update(runs[cell.run], tasks[cell.dataset], study.recipe_of(runs[cell.run])) for cell in todo}


def not_compared(study: Any, whole: Any, rows: Any) -> list[str]:
    """A line for every run of the whole study that runs of this one are compared with and that has no result."""
    from eval.arithmetic.report import ENOUGH

    asked = {one.name for one in study.runs}
    possible = {(one.name, dataset) for one in whole.runs for dataset in whole.datasets_of(one)}
    there = {(row.run, row.dataset) for row in rows}
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row.run in asked and len(row.seeds) >= ENOUGH and (row.compare, row.dataset) in possible - there:
            missing.setdefault(row.compare, []).append(f"{row.run} on {row.dataset}")
    return [f"not compared, as there is no result of {name}: {', '.join(runs)}" for name, runs in missing.items()]


def hugging_face(arguments: argparse.Namespace) -> int:
    """Trains small models of several families, fuses their layers and scores them."""
    from eval.arithmetic.hugging_face import grid_cells, grid_table, num_updates, plans, read_grid, run_grid
    from merge.runtime import training_device

    for option in ("runs", "datasets", "seeds", "steps", "modulus", "matmul_precision"):
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is of the study's own networks; change {arguments.config} instead")
    if arguments.workers is not None:
        raise UsageError("--workers is of the study's own networks; these models are trained one after the other")
    grid = read_grid(arguments.config, CONFIGS)
    todo = grid_cells(grid)
    if arguments.dry_run:
        print("\n".join([*(cell.folder for cell in todo), "each: trained, " + ", ".join([*plans(grid), *grid.joined])]))
        return 0
    device = training_device(arguments.device)
    with counter("training", "update", num_updates(grid), arguments.quiet) as bar:
        scores = run_grid(
            grid, arguments.out, CONFIGS, device=device, progress=bar.update,
            begun=lambda cell: bar.set_postfix_str(cell.folder),
            finished=lambda cell, found: logging.info("%s: %s", cell.folder, found),
        )  # fmt: skip
    print(grid_table(grid, scores), end="")
    print(json.dumps({"out": str(arguments.out), "cells": len(todo)}))
    return 0


def find_study(arguments: argparse.Namespace, *, everything: bool = False) -> Any:
    """The study of the configuration file, reduced to the runs, data sets and seeds that are asked for unless `everything`."""
    from eval.arithmetic.run import arithmetic_study

    check_positive(arguments, "seeds", "steps", "modulus")
    shared = {name: getattr(arguments, name) for name in ("steps", "modulus", "matmul_precision")}
    if everything:
        return arithmetic_study(arguments.config, **shared)
    runs, datasets = (
        [one.strip() for one in names.split(",")] if names else () for names in (arguments.runs, arguments.datasets)
    )
    return arithmetic_study(arguments.config, runs=runs, datasets=datasets, seeds=arguments.seeds, **shared)


def plan(study: Any) -> str:
    """What would be run, as a table."""
    from eval.arithmetic.execute import trained_parameters
    from eval.arithmetic.models import num_parameters
    from eval.arithmetic.study import cells
    from eval.arithmetic.tasks import make_task

    lines = [f"{'run':38} {'cells':>5} {'parameters':>11} {'trained':>11} {'GFLOP/update':>12} {'updates':>7}"]
    flops, total = flops_of(study, cells(study)), 0
    for one in study.runs:
        own, updates = [cell for cell in flops if cell.run == one.name], study.recipe_of(one).updates
        total += sum(flops[cell] for cell in own) * updates
        task = make_task(own[0].dataset, study.modulus, study.permuted)
        lines.append(
            f"{one.name:38} {len(own):5} {num_parameters(one.model, task):11,} {trained_parameters(one, task):11,} "
            f"{flops[own[0]] / 1e9:12.2f} {updates:7}"
        )
    return "\n".join([*lines, f"{len(flops)} cells, {total / 1e15:.2f} PFLOP without evaluations"])


if __name__ == "__main__":
    run(main, options(), "stopped; cells that were begun go on from their last checkpoint when the same command is run again")
