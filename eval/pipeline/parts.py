"""The measurements of a study: each takes a loaded model and gives plain data, kept on disk as one part of its arm."""

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import numpy.typing as npt
import yaml
from lm_eval.tasks import TaskManager

from ..errors import DataError, ScoreError, short
from ..lm import PrefixLM
from ..mmlu import quick_and_quiet
from ..run import continuation, first_tokens, window_nll
from ..speed import measure_speed
from ..stats import perplexity
from .settings import Cloze, Generation, Speed, Text

CLOZE_TASK = "lambada_openai"


def split_text(lm: PrefixLM, text: str, settings: Text) -> tuple[list[int], list[int]]:
    """(token ids to measure, token ids to choose layers by): the beginning of a text, and its end.

    Raises:
        DataError: the text is too short for both.
    """
    ids = first_tokens(lm, text)
    measured, chosen = ids[: -settings.choose_tokens], ids[-settings.choose_tokens :]
    if len(measured) < settings.choose_tokens:
        raise DataError(
            f"the text has {len(ids):,} tokens, expected at least {2 * settings.choose_tokens:,}: the last "
            f"{settings.choose_tokens:,} choose layers and are not measured; give a longer text, or fewer choose_tokens"
        )
    return measured[: settings.tokens], chosen


def measure_text(lm: PrefixLM, ids: Sequence[int]) -> dict[str, Any]:
    """Perplexity, and the nats of every window, by which models are compared (`summary.compare`)."""
    nll, tokens = window_nll(lm, ids)
    _check_finite(nll, "the text")
    mean = float(nll.sum() / tokens.sum())
    return {"perplexity": perplexity(mean), "nll_per_token": mean, "nll": nll.tolist(), "tokens": tokens.tolist()}


def read_cloze(settings: Cloze) -> list[str]:
    """LAMBADA's passages.

    Raises:
        DataError: they cannot be had.
    """
    datasets = importlib.import_module("datasets")
    config = _cloze_config()
    try:
        if settings.file is None:
            rows = datasets.load_dataset(config["dataset_path"], config.get("dataset_name"), split=config["test_split"])
        else:
            kind = "parquet" if settings.file.endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files=settings.file, split="train")
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"{settings.file or config['dataset_path']} cannot be read as LAMBADA ({short(error)})") from error
    if "text" not in rows.column_names:
        raise DataError(f"{settings.file} has no column 'text'; it has {', '.join(rows.column_names)}")
    passages = [str(text) for text in rows["text"] if text]
    passages = passages[: settings.limit]
    broken = [number for number, text in enumerate(passages) if len(text.split(" ")) < 2]
    if broken or not passages:
        what = f"passage {broken[0]} has no last word" if broken else "it holds no passages"
        raise DataError(f"{settings.file or config['dataset_path']}: {what}; expected texts whose last word is asked")
    return passages


def measure_cloze(lm: PrefixLM, passages: Sequence[str], answered: Callable[[int], object]) -> dict[str, Any]:
    """lm-eval's task lambada_openai on these passages: for each whether the last word is what the model writes."""
    task_class = importlib.import_module("lm_eval.api.task").ConfigurableTask
    rows = [{"text": text} for text in passages]

    def dataset(**_: Any) -> Any:
        datasets = importlib.import_module("datasets")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    config = {key: value for key, value in _cloze_config().items() if key not in ("dataset_path", "dataset_name", "tag")}
    lm.answered = answered
    try:
        with quick_and_quiet():
            task = task_class(config=config | {"custom_dataset": functools.partial(dataset)})
            found = lm_eval.evaluate(
                lm=lm, task_dict=TaskManager(include_defaults=False).load([task]), bootstrap_iters=0, log_samples=True
            )
    finally:
        lm.answered = None
    samples = sorted(found["samples"][CLOZE_TASK], key=lambda sample: sample["doc_id"])
    right = [bool(sample["acc"]) for sample in samples]
    nll = [-float(sample["filtered_resps"][0][0]) for sample in samples]
    _check_finite(nll, "the passages")
    return {
        "task": CLOZE_TASK, "count": len(right), "acc": float(np.mean(right)), "perplexity": perplexity(float(np.mean(nll))),
        "right": [int(one) for one in right], "nll": nll,
    }  # fmt: skip


def measure_generation(lm: PrefixLM, settings: Generation) -> dict[str, Any]:
    """What the model writes after each prompt."""
    return {"samples": [{"prompt": one, "text": continuation(lm, one, settings.tokens)} for one in settings.prompts]}


def measure_speeds(lm: PrefixLM, settings: Speed, done: Callable[[int], object]) -> dict[str, Any]:
    """Reading and writing for every batch size."""
    found = []
    for batch in settings.batches:
        found.append(asdict(measure_speed(lm.model, batch, settings.prompt, settings.generate, settings.repeats)))
        done(1)
    return {"batches": found}


def sha256(value: Any) -> str:
    """Of plain data, the same for equal data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _check_finite(values: npt.ArrayLike, what: str) -> None:
    """Raises ScoreError for a model that gives no numbers."""
    if not np.isfinite(values).all():
        raise ScoreError(f"the likelihood of {what} is not a number; the model's weights hold NaN or overflow")


@functools.cache
def _cloze_config() -> dict[str, Any]:
    """lm-eval's own configuration of the task."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "lambada"
    found: dict[str, Any] = yaml.safe_load((folder / f"{CLOZE_TASK}.yaml").read_text())
    return found
