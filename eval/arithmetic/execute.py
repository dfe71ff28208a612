"""Makes a study's cells, in worker processes of one thread each, and keeps what is done.

OUT/RUN/DATASET_SEED/log.csv               every round's losses and accuracies
                     weights.safetensors   the trained network
                     result.json           its metrics; written last, so that a cell is done where it exists
OUT/RUN/definition.json                    what the run is; another definition in its place is refused
OUT/RUN/final_info.json                    the study's own summary of a run
"""

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from merge.publish import in_turn, whole_file, work_folder, write_whole
from merge.records import read_json

from ..errors import EvalError, StudyError, short
from .average import average
from .batches import Member, Recipe
from .layers import Sequences
from .models import Model, initialise, logits, num_parameters, shapes
from .precision import PRECISIONS, check_precision, matmul_precision
from .results import final_info, metrics
from .routing import routing
from .study import OPERATIONS, Cell, Run, Study, cells, definition, needs
from .tasks import Split, Task, generator, make_task, split
from .train import COLUMNS, Outcome, train

LONG = 1000  # updates from which compiling is worth its time
Progress = Callable[[Cell, int], None]  # told how many updates were just made of a cell


def silent(cell: Cell, updates: int) -> None:
    """Progress that nobody asked for."""


def make(
    study: Study,
    group: Sequence[Cell],
    out: Path,
    *,
    device: str = "cpu",
    compiled: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Trains cells of one run together, writes their folders and returns their results.

    Raises:
        StudyError: a source is missing or is of no use.
    """
    run = study.run(group[0].run)
    tasks = [make_task(cell.dataset, study.modulus, study.permuted) for cell in group]
    members = [
        Member(task, split_of(study, cell), cell.seed, start_of(study, cell, out, task))
        for cell, task in zip(group, tasks, strict=True)
    ]
    recipe = study.recipe_of(run)
    for cell in group:
        (out / cell.folder).mkdir(parents=True, exist_ok=True)
    names = " ".join(cell.folder for cell in group)
    checkpoint = out / group[0].folder / f"checkpoint-{hashlib.sha256(names.encode()).hexdigest()[:8]}.safetensors"

    def advance(updates: int) -> None:
        for cell in group:
            progress(cell, updates)

    outcomes = train(
        run.model, members, recipe,
        frozen=is_source if run.mode == "frozen" else lambda name: False, device=device,
        compiled=compiled and recipe.updates >= LONG, checkpoint=checkpoint, progress=advance,
    )  # fmt: skip
    results = []
    for cell, task, member, outcome in zip(group, tasks, members, outcomes, strict=True):
        with matmul_precision(recipe.matmul_precision, device):
            routed = _routing(run, task, member, outcome)
        result = {
            "run": cell.run, "dataset": cell.dataset, "seed": cell.seed, "updates": recipe.updates,
            **metrics(outcome.log, recipe.updates), "diverged_at": outcome.diverged_at,
            **routed,
            "parameters": num_parameters(run.model, task), "trained_parameters": trained_parameters(run, task),
            "gflop_per_update": flops_per_update(run, task, recipe) / 1e9, "matmul_precision": recipe.matmul_precision,
            "time_s": round(outcome.time_s, 2), "cpu_s": round(outcome.cpu_s, 2), "together": len(group), "device": device,
            "torch": torch.__version__,
        }  # fmt: skip
        _write(out / cell.folder, outcome, result)
        results.append(result)
    checkpoint.unlink(missing_ok=True)
    return results


def _routing(run: Run, task: Task, member: Member, outcome: Outcome) -> dict[str, Any]:
    if run.model.fusion != "dynamic" or outcome.diverged_at is not None:
        return {}
    return routing(run.model, task, member.split.validation, outcome.weights, generator(member.seed, "shuffle", task.name))


def _write(folder: Path, outcome: Outcome, result: Mapping[str, Any]) -> None:
    """A cell's files; what says that it is done comes last."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([["" if math.isnan(x) else repr(x) for x in row] for row in outcome.log.tolist()])
    write_whole(folder / "log.csv", text.getvalue())
    with whole_file(folder / "weights.safetensors") as scratch:
        save_file(outcome.weights, scratch)
    write_whole(folder / "result.json", json.dumps(result, indent=2) + "\n")


def is_source(name: str) -> bool:
    """Whether a parameter is of a source rather than of what fuses them."""
    return name.startswith("s") and name[1 : name.find(".")].isdigit()


def split_of(study: Study, cell: Cell) -> Split:
    """The pairs of a cell: by data set and seed alone; one operation's are those of the whole split that have its operator."""
    task = make_task(cell.dataset, study.modulus, study.permuted)
    found = split(task, cell.seed, study.fraction)
    operation = study.run(cell.run).operation
    if operation is None:
        return found
    own = task.op == OPERATIONS.index(operation)
    return Split(found.train[own[found.train]], found.validation[own[found.validation]])


def start_of(study: Study, cell: Cell, out: Path, task: Task) -> dict[str, torch.Tensor]:
    """What a cell's network starts from."""
    run = study.run(cell.run)
    seed = cell.seed if run.init == 0 else int(torch.randint(1 << 31, (), generator=generator(cell.seed, "init", run.init)))
    found = initialise(run.model, task, seed)
    sources = [_weights(out / one.folder) for one in needs(study, cell)]
    if run.mode == "average":
        models = [study.run(name).model.sources[0] for name in run.trained]
        reference = max(range(len(models)), key=lambda i: (models[i].width, models[i].layers, -i))
        return average(sources, models, reference, run.align, generator(cell.seed, "align"))
    for s, values in enumerate(sources):
        own = {f"s{s}.{name.removeprefix('s0.')}": value for name, value in values.items()}
        found |= {name: value for name, value in own.items() if name in found}
        if run.model.fusion == "adapters" and s == run.model.reference:  # what makes the whole equal to it at the start
            prefix = f"s{s}."
            found |= {key: value for name, value in own.items() if (key := name.removeprefix(prefix)) in found}
    return found


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    if _diverged(folder):
        raise StudyError(f"{folder} holds a network that diverged; it cannot be a source")
    return load_file(folder / "weights.safetensors")


def _diverged(folder: Path) -> bool:
    return read_json(folder / "result.json")["diverged_at"] is not None


def trained_parameters(run: Run, task: Task) -> int:
    """How many are changed by training."""
    if run.updates == 0:
        return 0
    if run.mode != "frozen":
        return num_parameters(run.model, task)
    return sum(math.prod(shape) for name, (_, shape) in shapes(run.model, task).items() if not is_source(name))


def flops_per_update(run: Run, task: Task, recipe: Recipe) -> int:
    """Floating-point operations of matrix products, forward and backward, as they are made here: distinct states once."""
    return _flops(run.model, run.mode == "frozen", task.num_symbols, task.num_ops, task.num_classes, recipe.batch)


@cache
def _flops(model: Model, frozen: bool, symbols: int, ops: int, classes: int, batch: int) -> int:
    empty = torch.zeros(batch, dtype=torch.long)
    task = Task("", symbols, classes, ops, empty, empty, empty, empty)
    values = {key: torch.zeros(shape) for key, (_, shape) in shapes(model, task).items()}
    for key, value in values.items():
        value.requires_grad_(not (frozen and is_source(key)))
    counter = FlopCounterMode(display=False)
    with counter:
        found = logits(model, values, Sequences(empty, empty, empty, symbols, ops)).sum()
        if found.requires_grad:
            found.backward()
    return int(counter.get_total_flops())


# ---------------------------------------------------------------------------------------------------------------------
# Many cells


Finished = Callable[[Cell, Mapping[str, Any]], None]


def make_all(
    study: Study,
    out: Path,
    *,
    workers: int | None,
    device: str = "cpu",
    compiled: bool = False,
    progress: Progress = silent,
    finished: Finished = lambda cell, result: None,
) -> dict[str, str]:
    """Makes every cell that is not done, sources before what is made of them; cell -> message for those that failed.

    On a CPU one cell per worker process; elsewhere, or without workers, all cells of a run whose tables have one size together,
    in this process.

    Raises:
        StudyError: a run's results have another definition, this machine does not make products in a run's precision, or a
            worker process died.
        OutputError: another process makes cells of one of these runs, or nothing can be written there.
    """
    check(study, out)
    for run in study.runs:
        if any(read_result(out, cell) is None for cell in cells(study) if cell.run == run.name):
            check_precision(study.recipe_of(run).matmul_precision, device)
    with ExitStack() as own:
        for name in dict.fromkeys(cell.run for cell in cells(study) if read_result(out, cell) is None):
            own.enter_context(work_folder(out / name))
        begin(study, out)
        waiting = [cell for cell in cells(study) if read_result(out, cell) is None]
        if device == "cpu" and workers is not None:
            failed = _in_processes(study, out, waiting, workers, compiled, progress, finished)
        else:
            failed = _in_groups(study, out, waiting, device, progress, finished)
        with in_turn(out):
            for run in study.runs:
                write_final_info(run, out)
    return {cell.folder: message for cell, message in failed.items()}


def _in_groups(
    study: Study, out: Path, waiting: Sequence[Cell], device: str, progress: Progress, finished: Finished
) -> dict[Cell, str]:
    groups: dict[tuple[Any, ...], list[Cell]] = {}  # in the order of the cells, so sources come first
    for cell in waiting:
        task = make_task(cell.dataset, study.modulus, study.permuted)
        groups.setdefault((cell.run, task.num_symbols, task.num_classes, task.num_ops), []).append(cell)
    failed: dict[Cell, str] = {}
    for group in groups.values():
        able = []
        for cell in group:
            if (bad := next((one for one in needs(study, cell) if one in failed), None)) is not None:
                failed[cell] = f"its source {bad.folder} failed"
            elif (bad := next((one for one in needs(study, cell) if _diverged(out / one.folder)), None)) is not None:
                failed[cell] = f"{out / bad.folder} holds a network that diverged; it cannot be a source"
            else:
                able.append(cell)
        if not able:
            continue
        try:
            for cell, result in zip(able, make(study, able, out, device=device, progress=progress), strict=True):
                finished(cell, result)
        except EvalError as error:
            failed |= dict.fromkeys(able, short(error))
    return failed


def _in_processes(
    study: Study,
    out: Path,
    todo: Sequence[Cell],
    workers: int,
    compiled: bool,
    progress: Progress,
    finished: Finished,
) -> dict[Cell, str]:
    waiting = list(todo)
    failed: dict[Cell, str] = {}
    running: dict[Future[Any], Cell] = {}
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    with ProcessPoolExecutor(workers, context, _begin_worker, (told, os.getpid())) as pool:
        try:
            while waiting or running:
                blocked = set(waiting) | set(running.values())
                for cell in list(waiting):
                    sources = needs(study, cell)
                    if (bad := next((one for one in sources if one in failed), None)) is not None:
                        failed[cell] = f"its source {bad.folder} failed"
                        waiting.remove(cell)
                    elif len(running) < workers and not blocked & set(sources):
                        running[pool.submit(_make, study, cell, out, compiled)] = cell
                        waiting.remove(cell)
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for cell, updates in _drain(told).items():
                    progress(cell, updates)
                for future in done:
                    cell = running.pop(future)
                    try:
                        finished(cell, future.result())
                    except BrokenProcessPool:
                        raise StudyError(f"a worker process died in or near {cell.folder}; run again to go on") from None
                    except Exception as error:  # one cell's failure must not cost the others theirs
                        failed[cell] = short(error)
        except BaseException:
            for process in (pool._processes or {}).values():  # nothing that is written is lost: cells go on from checkpoints
                process.terminate()
            raise
    return failed


def begin(study: Study, out: Path) -> None:
    """Writes down what every run is.

    Raises:
        StudyError: a run of that name was defined otherwise.
    """
    check(study, out)
    for run in study.runs:
        path = out / run.name / "definition.json"
        if not path.exists():  # otherwise it is the same, and may be read or another process's
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(definition(study, run), indent=2) + "\n")


def check(study: Study, out: Path) -> None:
    """Raises StudyError if a run that has results there was defined otherwise."""
    for run in study.runs:
        path = out / run.name / "definition.json"
        if path.exists() and (differs := _differences(_filled(read_json(path)), _filled(definition(study, run)))):
            raise StudyError(
                f"{path.parent} holds results of a run with other settings ({', '.join(differs)}); "
                "give the same settings, or another folder"
            )


def _filled(found: Mapping[str, Any]) -> dict[str, Any]:
    """A definition with what it leaves out."""
    return {**found, "recipe": {"matmul_precision": PRECISIONS[0], **found["recipe"]}}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], at: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            found += _differences(old[key], new[key], f"{at}{key}.")
        elif old.get(key) != new.get(key):
            found.append(f"{at}{key}: {old.get(key)!r} there, {new.get(key)!r} here"[:200])
    return found


def read_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result, if it is done."""
    path = out / cell.folder / "result.json"
    return dict(read_json(path)) if path.exists() else None


def read_log(out: Path, cell: Cell) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A cell's log, as `train` returned it."""
    with (out / cell.folder / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return np.array([[float(x) if x else math.nan for x in row] for row in rows])


def write_final_info(run: Run, out: Path) -> None:
    """OUT/RUN/final_info.json from all cells that are done, also of data sets and seeds that were not asked for this time."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / run.name).glob("*/result.json")):
        result = read_json(path)
        found.setdefault(result["dataset"], []).append(result)
    if found:
        write_whole(out / run.name / "final_info.json", json.dumps(final_info(found), indent=2) + "\n")


_told: Any = None  # a worker's queue to the process that shows progress


def _begin_worker(told: Any, parent: int) -> None:
    global _told
    _told = told
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # parallel over cells: threads of one would wait for each other


def _die_with(parent: int) -> None:
    """Ends this worker when its parent was killed; it would go on, beside the worker of the next run on the same cell."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make(study: Study, cell: Cell, out: Path, compiled: bool) -> Any:
    return make(study, [cell], out, compiled=compiled, progress=lambda *made: _told.put(made))[0]


def _drain(told: Any) -> Counter[Cell]:
    total: Counter[Cell] = Counter()
    while True:
        try:
            cell, updates = told.get_nowait()
        except queue.Empty:
            return total
        total[cell] += updates
