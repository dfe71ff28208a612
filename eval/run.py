"""Runs an evaluation: loads the model, asks subject by subject, measures text perplexity and writes a few words."""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
from tqdm import tqdm

from merge.checkpoint import read_config

from .errors import DataError
from .lm import PrefixLM
from .mmlu import Subject, task_config, tasks, templates_compiled_once
from .results import Answer

TEXT_WINDOW = 1024  # tokens that are predicted from each other; the usual short window, so that figures compare


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token of a text in windows; `tokens` were predicted."""

    perplexity: float
    nll_per_token: float
    tokens: int
    window: int


def load_model(folder: Path, device: str, dtype: str, pack_tokens: int | None = None) -> PrefixLM:
    """The model in a folder, ready to be scored; dtype 'auto' is bfloat16 on a GPU and the checkpoint's own elsewhere."""
    config = read_config(folder)
    options: dict[str, Any] = {}
    if config.get("attn_logit_softcapping"):
        options["attn_implementation"] = "eager"  # the fused attention kernels leave soft-capping out
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "auto"
    return PrefixLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=1, pack_tokens=pack_tokens, **options)


def choose_device(requested: str) -> tuple[str, str]:
    """(device, reason)."""
    if requested != "auto":
        return requested, "asked for"
    if torch.cuda.is_available():
        return "cuda:0", "the first GPU"
    return "cpu", "no GPU here"


def ask(
    lm: Any,
    subjects: Sequence[Subject],
    num_fewshot: int,
    limit: int | None = None,
    done: Callable[[str, list[Answer]], None] = lambda subject, answers: None,
    disable_bar: bool | None = None,
) -> list[Answer]:
    """The model's answers to the test questions of the subjects, through lm-eval's own evaluation.

    `done` is called after each subject with its answers, so that finished subjects can be kept.
    """
    everything: list[Answer] = []
    with templates_compiled_once():
        for subject in tqdm(subjects, desc="MMLU", unit="subject", disable=disable_bar):
            (task,) = tasks([subject], num_fewshot)
            found = lm_eval.simple_evaluate(model=lm, tasks=[task], limit=limit, bootstrap_iters=0, log_samples=True)
            samples = sorted(found["samples"][f"mmlu_{subject.name}"], key=lambda sample: sample["doc_id"])
            answers = [_answer(subject.name, sample) for sample in samples]
            done(subject.name, answers)
            everything += answers
    return everything


def text_perplexity(lm: PrefixLM, text: str, window: int = TEXT_WINDOW, max_tokens: int | None = None) -> Perplexity:
    """Perplexity of a text cut into windows of `window` tokens; the first token of each window is given, not predicted.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    tokens = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    window = min(window, lm.max_length)
    pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    requests = [(None, piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
    if not requests:
        raise DataError(f"the text has {len(tokens)} tokens, expected at least 2")
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    count = sum(len(continuation) for _, _, continuation in requests)
    nll = -math.fsum(logprob for logprob, _ in answers) / count
    return Perplexity(math.exp(min(nll, 700.0)), nll, count, window)


def continuation(lm: PrefixLM, prompt: str, tokens: int = 30) -> str:
    """What the model writes after `prompt`, greedily."""
    inputs = lm.tokenizer(prompt, return_tensors="pt").to(lm.device)
    with torch.inference_mode():
        output = lm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=lm.eot_token_id)
    return str(lm.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def task_version(subject: str) -> str:
    """The version of lm-eval's task and of lm-eval itself."""
    return f"{task_config(subject)['metadata']['version']} (lm-eval {importlib.metadata.version('lm_eval')})"


def _answer(subject: str, sample: dict[str, Any]) -> Answer:
    logprobs = tuple(float(logprob) for logprob, _ in sample["filtered_resps"])
    prediction = max(range(len(logprobs)), key=lambda choice: logprobs[choice])
    return Answer(subject, int(sample["doc_id"]), logprobs, prediction, int(sample["target"]))
