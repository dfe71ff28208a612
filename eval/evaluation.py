"""MMLU, or any tasks of lm-eval, of a model: from its files to a record of everything that was measured."""

import contextlib
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from merge.errors import OutputError, RecordError
from merge.plan import plan_to_dict, read_plan
from merge.report import PLAN_FILE, peak_rss_bytes
from merge.source import Source

from .lm import PrefixLM
from .load import load_model
from .mmlu import Subject, num_questions, partial, question_set
from .progress import Progress, progress_path
from .results import Answer, question_text, summary, write_results
from .run import ask, continuation, find_tasks, first_tokens, run_tasks, task_version, text_perplexity, total_work

PROMPT = "The capital of France is"
CHOICES = 4  # requests for each question


def evaluate_mmlu(
    source: Source,
    subjects: Sequence[Subject],
    *,
    num_fewshot: int = 5,
    limit: int | None = None,
    convention: str = "lm-eval",
    measure_questions: bool = True,
    text: str | None = None,
    text_name: str = "text",
    text_tokens: int | None = None,
    text_missing: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | str = "auto",
    out: Path | None = None,
    resume: bool = False,
    progress: Callable[[int], Callable[[float], object]] = lambda total: lambda done: None,
) -> tuple[dict[str, Any], list[Answer]] | None:
    """(the record that a results file holds, every answer); None in all but the first of several processes.

    Args:
        source: of `merge.resolve`.
        subjects: of `read_mmlu`.
        limit: questions per subject.
        convention: of the prompts, see `mmlu.tasks`.
        measure_questions: also the perplexity of the questions' text after the examples.
        text: plain text to measure perplexity on, by its first `text_tokens` tokens; `text_missing` says why there is none.
        out: results file to write, with the answers beside it; finished subjects of a run that is stopped are kept next to it.
        resume: take over what a stopped run has finished.
        progress: called once with the number of questions; what it returns is called with questions just answered.

    Raises:
        EvalError, MergeError: the model, the questions or the text cannot be had, or the scores are not numbers.
    """
    if limit is not None and limit >= max(len(subject.test) for subject in subjects):
        limit = None  # it limits nothing, and results are compared by it
    reference = convention == "reference"
    how = {"batch_size": batch_size, "letters_apart": reference, "add_bos_token": False if reference else None}
    lm, placement = load_model(source.checkpoint(), device, dtype, **how)
    if text is not None:
        first_tokens(lm, text, text_tokens)  # too short a text is found before, not after, the questions
    new = out is not None and not out.exists()
    settings = {
        "task": "mmlu",
        "task_version": task_version(subjects[0].name),
        "convention": convention,
        "question_set": question_set(subjects),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "dtype": placement.dtype,
    }
    kept = None
    if out is not None:
        files = sorted((path.name, path.stat().st_mtime_ns) for path in source.folder.iterdir() if path.is_file())
        key = {"model": source.spec, "files": files, **settings, "question_text": measure_questions}
        kept = Progress(progress_path(out), key, resume=resume)
        lm.barrier()  # the others have read what was finished before the first one writes
    with contextlib.closing(kept) if kept else contextlib.nullcontext():
        if kept and lm.rank == 0:
            kept.start()
            if new and out is not None and out.exists():
                kept.remove()
                raise OutputError(f"{out} has been written by another run meanwhile; choose another name")
        finished = kept.finished if kept else {}
        missing = [subject for subject in subjects if subject.name not in finished]
        count = num_questions(missing, limit)
        advance = progress(count)
        started = time.perf_counter()
        ask(
            lm,
            missing,
            num_fewshot,
            limit,
            convention=convention,
            question_text=measure_questions,
            done=kept.add if kept else finished.__setitem__,
            answered=lambda requests: advance(requests * lm.world_size / CHOICES),
        )
        seconds = time.perf_counter() - started
        work = total_work(lm)
        if lm.rank != 0:
            _together(lm)
            return None

        answers = [answer for subject in subjects for answer in finished[subject.name]]
        measured = asdict(text_perplexity(lm, text, max_tokens=text_tokens)) if text is not None else None
        questions = question_text(answers)
        why = "the prompts are longer than the model's window" if measure_questions else "not asked for"
        about_text = {"file": text_name, "sha256": hashlib.sha256((text or "").encode()).hexdigest()}
        record: dict[str, Any] = {
            "model": source.spec,
            "plan": plan_beside(source.folder),
            **settings,
            "part": partial(subjects, limit),
            "device": placement.device,
            "processes": lm.world_size,
            "scores": summary(answers),
            "question_text": questions,
            "question_text_missing": None if questions else why,
            "text": measured and measured | about_text | {"vocabulary": len(lm.tokenizer)},
            "text_missing": None if measured else text_missing,
            "continuation": {"prompt": PROMPT, "text": continuation(lm, PROMPT)},
            "time_s": round(seconds, 2),
            "questions_per_s": round(count / max(seconds, 1e-9), 2),
            "tokens": asdict(work),
            "prefixes_shared": lm.not_shared_because is None,
            "not_shared_because": lm.not_shared_because,
            **peak_memory(lm),
        }
        if out is not None and kept is not None:
            write_results(out, record, answers)
            kept.remove()
        _together(lm)
        return record, answers


def evaluate_tasks(
    source: Source,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | str = "auto",
    progress: Callable[[float], object] = lambda requests: None,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(the record of scores that a results file holds, what lm-eval's `simple_evaluate` returns); None as in `evaluate_mmlu`.

    Args:
        tasks: names of lm-eval's tasks, of this project's, or of those in YAML files in `include_path`.
        limit: documents per task.
        progress: called with the number of requests just scored.

    Raises:
        EvalError, MergeError: an unknown task, data or a model that cannot be had.
    """
    manager = find_tasks(tasks, include_path)
    lm, placement = load_model(source.checkpoint(), device, dtype, batch_size=batch_size)
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # results go to stdout; what lm-eval prints on the way does not
        found = run_tasks(
            lm,
            tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            manager=manager,
            answered=lambda requests: progress(requests * lm.world_size),
        )
    seconds = time.perf_counter() - started
    work = total_work(lm)
    _together(lm)
    if found is None:
        return None
    keep = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "lm_eval_version")
    record: dict[str, Any] = {
        "model": source.spec,
        "plan": plan_beside(source.folder),
        "dtype": placement.dtype,
        "device": placement.device,
        "limit": limit,
        **{key: found[key] for key in keep if key in found},
        "time_s": round(seconds, 2),
        "tokens": asdict(work),
        "not_shared_because": lm.not_shared_because,
        **peak_memory(lm),
    }
    return record, found


def plan_beside(folder: Path) -> dict[str, Any] | None:
    """The plan that the model in a folder was made with, where there is one."""
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        return plan_to_dict(read_plan(path))
    except RecordError as error:
        logging.warning("the model's plan is left out: %s", error)
        return None


def peak_memory(lm: PrefixLM) -> dict[str, int]:
    """The most memory that this process has used so far, and on its GPU."""
    found = {"peak_rss_bytes": peak_rss_bytes()}
    if lm.device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(lm.device)
    return found


def _together(lm: PrefixLM) -> None:
    """The others wait until the first of several processes has measured text and written; then all leave the group."""
    lm.barrier()
    if lm.world_size > 1:
        lm.accelerator.end_training()
