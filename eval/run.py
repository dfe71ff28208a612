"""Runs an evaluation: asks MMLU subject by subject, measures text perplexity, writes a few words, runs any lm-eval task."""

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import numpy.typing as npt
import torch
from lm_eval.tasks import TaskManager

from merge.records import why_not_read

from .errors import DataError, EvalError, near, short
from .lm import PrefixLM, Request, Work
from .logs import unsaid
from .mmlu import Subject, check_examples, quick_and_quiet, task_config, tasks
from .results import Answer
from .stats import perplexity

TEXT_WINDOW = 1024  # tokens that are predicted from each other; the usual short window, so that figures compare
CHARACTERS_PER_TOKEN, SPARE_TOKENS = 8, 64  # how much of a text is tokenised for its first tokens, at first
MIN_TEXT_TOKENS = 2  # one is given, the others are predicted
OWN_TASKS = Path(__file__).parent / "tasks"
TEXT_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token of a text in windows; `tokens` were predicted.

    window_nll, window_tokens: nats and tokens of every window, by which two models are compared.
    """

    perplexity: float
    nll_per_token: float
    tokens: int
    window: int
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]


def ask(
    lm: Any,
    subjects: Sequence[Subject],
    num_fewshot: int,
    limit: int | None = None,
    *,
    convention: str = "lm-eval",
    question_text: bool = True,
    done: Callable[[str, list[Answer]], None] = lambda subject, answers: None,
    answered: Callable[[int], object] | None = None,
) -> list[Answer]:
    """The model's answers to the test questions of the subjects, through lm-eval's own evaluation.

    Args:
        lm: a PrefixLM, or any model of lm-eval's (which then measures no question text).
        convention: of the prompts, see `mmlu.tasks`.
        question_text: also measure the likelihood of the questions' text after the examples.
        done: called after each subject with its answers, so that finished subjects can be kept.
        answered: called as the work proceeds with the number of requests just scored (four for each question).

    In several processes, only the first gets the answers; the others get an empty list.
    """
    _check(subjects, num_fewshot, limit, lm.world_size)
    everything: list[Answer] = []
    ours = isinstance(lm, PrefixLM)
    manager = TaskManager(include_defaults=False)
    with quick_and_quiet():
        for subject in subjects:
            (task,) = tasks([subject], num_fewshot, convention)
            if ours:
                lm.answered, lm.prompts = answered, {}
                lm.head_of = _head_of(task) if question_text else None
            # Not simple_evaluate, which collects facts about the machine for seconds, every time.
            found = lm_eval.evaluate(lm=lm, task_dict=manager.load([task]), limit=limit, bootstrap_iters=0, log_samples=True)
            prompts = _gathered(lm, lm.prompts) if ours else []
            if found is None:  # not the first of several processes
                continue
            texts = {context: measured for one in prompts for context, measured in one.items()}
            samples = sorted(found["samples"][f"mmlu_{subject.name}"], key=lambda sample: sample["doc_id"])
            answers = [_answer(subject.name, sample, texts) for sample in samples]
            done(subject.name, answers)
            everything += answers
    if ours:
        lm.answered = lm.head_of = None
    return everything


def text_perplexity(lm: PrefixLM, text: str, window: int = TEXT_WINDOW, max_tokens: int | None = None) -> Perplexity:
    """Perplexity of a text cut into windows of `window` tokens; the first token of each window is given, not predicted.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    nll, tokens = window_nll(lm, first_tokens(lm, text, max_tokens), window)
    mean = math.fsum(nll) / int(tokens.sum())
    windows = tuple(nll.tolist()), tuple(tokens.tolist())
    return Perplexity(perplexity(mean), mean, int(tokens.sum()), min(window, lm.max_length), *windows)


def window_nll(
    lm: PrefixLM, ids: Sequence[int], window: int = TEXT_WINDOW
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(nats of every window of a text, tokens predicted in it), as `text_perplexity` cuts and measures them."""
    window = min(window, lm.max_length)
    pieces = [list(ids[start : start + window]) for start in range(0, len(ids), window)]
    requests: list[Request] = [(None, piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
    before, lm.work = lm.work, Work()
    try:
        answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    finally:
        lm.work = before
    return np.array([-logprob for logprob, _ in answers]), np.array([len(continuation) for _, _, continuation in requests])


def first_tokens(lm: PrefixLM, text: str, count: int | None = None) -> list[int]:
    """The first `count` token ids of a text (all by default), without tokenising much more of it.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    size = len(text) if count is None else CHARACTERS_PER_TOKEN * count
    while True:
        tokens: list[int] = lm.tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        # What stands at a cut may be other tokens in the whole text, so a few more are wanted than are used.
        if size >= len(text) or (count is not None and len(tokens) > count + SPARE_TOKENS):
            break
        size *= 2
    if len(tokens) < MIN_TEXT_TOKENS:
        raise DataError(f"the text has {len(tokens)} tokens, expected at least {MIN_TEXT_TOKENS}")
    return tokens[:count]


def dataset_texts(name: str, config: str | None, split: str, column: str, characters: int) -> list[str]:
    """The texts of a data set's rows, from the Hub or a local folder, until there are so many characters; no empty ones.

    Raises:
        DataError: it cannot be had, or has no such column.
    """
    datasets = importlib.import_module("datasets")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises many kinds, offline ones among them
        raise DataError(f"the data set {name} cannot be had from the Hub, its cache or a folder ({short(error)})") from error
    if column not in rows.column_names:
        raise DataError(f"the data set {name} has no column {column!r}; it has {', '.join(rows.column_names)}")
    found: list[str] = []
    total = 0
    for text in rows[column]:
        if total >= characters:
            break
        if text and text.strip():
            found.append(text)
            total += len(text)
    if not found:
        raise DataError(f"the data set {name} has no text in its column {column!r}")
    return found


def plain_text(path: Path | None) -> str:
    """The text to measure perplexity on: a file, or by default the test split of WikiText-2 from the Hub.

    Raises:
        DataError: it cannot be read.
    """
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {why_not_read(path, error)}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} cannot be read as text: {error}") from error
    datasets = importlib.import_module("datasets")
    try:
        return "\n\n".join(datasets.load_dataset(*TEXT_HUB, split="test")["text"])
    except Exception as error:  # datasets raises many kinds, offline ones among them
        raise DataError(f"{TEXT_HUB[0]} cannot be had from the Hub or its cache ({short(error)}); give --text FILE") from error


def continuation(lm: PrefixLM, prompt: str, tokens: int = 30) -> str:
    """What the model writes after `prompt`, greedily."""
    inputs = lm.tokenizer(prompt, return_tensors="pt").to(lm.device)
    with torch.inference_mode():
        output = lm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=lm.eot_token_id)
    return str(lm.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def run_tasks(
    lm: Any,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    manager: TaskManager | None = None,
    answered: Callable[[int], object] | None = None,
) -> dict[str, Any] | None:
    """What lm-eval's `simple_evaluate` returns for any of its tasks; None in all but the first of several processes.

    Args:
        manager: of `find_tasks`, if there is one already (it takes seconds to make) or the tasks are not lm-eval's own.
        answered: called as the work proceeds with the number of requests just scored.

    Raises:
        DataError: an unknown task, or data that cannot be had.
    """
    manager = manager or find_tasks(names)
    if isinstance(lm, PrefixLM):
        lm.answered = answered
    try:
        with quick_and_quiet(), _one_line_errors(names):
            found: dict[str, Any] | None = lm_eval.simple_evaluate(
                model=lm,
                tasks=manager.match_tasks(list(names)),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=True,
            )
    finally:
        if isinstance(lm, PrefixLM):
            lm.answered = None
    return found


def own_tasks(**metadata: Any) -> TaskManager:
    """A task manager that knows only the tasks of this project, and hands them `metadata` to make their data from."""
    return _Manager(include_defaults=False, include_path=str(OWN_TASKS), metadata=metadata)


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """lm-eval's task manager, found to know all these tasks: its own, ours, and those in YAML files in `include_path`.

    Raises:
        DataError: an unknown task; the nearest names are suggested.
    """
    manager = _Manager(include_path=[str(path) for path in (OWN_TASKS, include_path) if path is not None])
    for name in names:
        if not manager.match_tasks([name]):
            raise DataError(f"lm-eval has no task {name!r}{near(name, manager.all_tasks)}")
    return manager


def total_work(lm: PrefixLM) -> Work:
    """The work of all processes; complete in the first one only."""
    found = _gathered(lm, asdict(lm.work))
    return Work(**{key: sum(one[key] for one in found) for key in asdict(lm.work)})


def task_version(subject: str) -> str:
    """The version of lm-eval's task and of lm-eval itself."""
    return f"{task_config(subject)['metadata']['version']} (lm-eval {importlib.metadata.version('lm_eval')})"


class _Manager(TaskManager):
    """lm-eval's task manager, whose many errors while tasks and their data are loaded become one of ours."""

    def load(self, task_list: Any) -> Any:
        try:
            with unsaid("lm_eval.api.task", "--metadata"):  # a hint at an option of its own command line
                return super().load(task_list)
        except Exception as error:  # data that cannot be had, wrong YAML, code of a task: anything may come
            what = f"{type(error).__name__}: {short(error)}"
            raise DataError(f"the tasks {', '.join(task_list)} or their data cannot be loaded ({what})") from error


@contextmanager
def _one_line_errors(names: Sequence[str]) -> Iterator[None]:
    """Inside, what a task's own code raises becomes an error of ours; running out of memory stays what it is."""
    try:
        yield
    except (EvalError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(f"lm-eval cannot run {', '.join(names)} ({type(error).__name__}: {short(error)})") from error


def _check(subjects: Sequence[Subject], num_fewshot: int, limit: int | None, processes: int) -> None:
    """Raises DataError for what would fail only after other subjects had been asked."""
    for subject in subjects:
        check_examples(subject, num_fewshot)
        count = min(len(subject.test), limit or len(subject.test))
        if count < processes:
            raise DataError(f"{subject.name} has {count} questions to ask, fewer than the {processes} processes; use fewer")


def _gathered(lm: Any, value: Any) -> list[Any]:
    """`value` of every process, in the first one; what this process has, in the others."""
    return lm.gather_object(value, dst=0) or [value]


def _head_of(task: Any) -> Callable[[str], str]:
    """Gives the examples that stand before the question in a context of this task."""
    shown = [task.doc_to_text(doc) for doc in task.test_docs()]
    head: list[str] = []

    def head_of(context: str) -> str:
        if not head:
            question = max((text for text in shown if context.endswith(text)), key=len)
            head.append(context.removesuffix(question))
        return head[0]

    return head_of


def _answer(subject: str, sample: Mapping[str, Any], texts: Mapping[str, tuple[float, int]]) -> Answer:
    a, b, c, d = (float(logprob) for logprob, _ in sample["filtered_resps"])
    logprobs = (a, b, c, d)
    prediction = max(range(len(logprobs)), key=lambda choice: logprobs[choice])
    nll, tokens = texts.get(sample["arguments"][0][0], (None, 0))
    return Answer(subject, int(sample["doc_id"]), logprobs, prediction, int(sample["target"]), nll, tokens)
