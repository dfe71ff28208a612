"""What a search minimises, on cached hidden states: nearness to the original model, labels, plain text, or sums of these.

    kl      mean over questions of KL(original || fused) over the four options, in nats
    ce      mean cross-entropy of the right letter among the four, in nats
    text    mean negative log-likelihood per token of plain text, in nats
    acc     one minus the accuracy (for black-box search only: it has no gradient)

Questions and text come in three parts: what is searched on, what the winner is selected on, and what is reported.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import DataError, TrialError
from .lm import PrefixLM
from .mmlu import LETTERS, Subject, quick_and_quiet, tasks
from .run import TEXT_WINDOW, first_tokens
from .stats import Mean, mean, perplexity, wilson
from .trial import LayerWeights, States, Tail

Array = npt.NDArray[np.float64]

MIN_WINDOW = 2  # one token given, one predicted
TEXT_BLOCK = 128  # neighbouring tokens that count as one value in the error of a text's mean
PARTS = ("search", "selection", "held-out")
SHARES = ("acc", "agreement")  # of questions; the others are means of numbers
CHECK_SHARE = 4  # one question in so many is for selection, and as many are held out
TARGETS: dict[str, dict[str, float]] = {
    "kl": {"kl": 1.0},
    "ce": {"ce": 1.0},
    "text": {"text": 1.0},
    "kl+text": {"kl": 1.0, "text": 0.2},
    "ce+text": {"ce": 1.0, "text": 0.2},
    "acc": {"acc": 1.0},
}


@dataclass(frozen=True)
class Encoded:
    """Questions of one part as token ids; `ids` name them (subject, index)."""

    ids: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[int, ...], ...]
    targets: tuple[int, ...]
    letters: tuple[int, int, int, int]


@dataclass
class Questions:
    """Questions with the hidden states of a trial; `rows` [Q]: the answer of each question, since equal prompts are run once.

    original: the original model's log-probabilities [Q, 4]; targets [Q].
    """

    encoded: Encoded
    states: States
    rows: torch.Tensor
    original: torch.Tensor
    targets: torch.Tensor


@dataclass
class Text:
    """Windows of a text with the hidden states of a trial; `targets` [T] are the tokens to predict, at answers `rows` [T]."""

    states: States
    rows: torch.Tensor
    targets: torch.Tensor


@dataclass
class Part:
    """What one part holds; either may be missing. The text is in batches, of which a gradient may take one at a time."""

    questions: Questions | None
    text: tuple[Text, ...]

    @property
    def held(self) -> "list[Questions | Text]":
        """Everything that there is."""
        return [*([self.questions] if self.questions else []), *self.text]


def split_questions(ids: Sequence[tuple[str, int]], seed: int) -> dict[str, list[tuple[str, int]]]:
    """Parts of the questions, by subject so that every subject is in every part (as far as it has three questions)."""
    found: dict[str, list[tuple[str, int]]] = {part: [] for part in PARTS}
    subjects: dict[str, list[tuple[str, int]]] = {}
    for one in ids:
        subjects.setdefault(one[0], []).append(one)
    for name, members in subjects.items():
        shuffled = sorted(members)
        random.Random(f"{seed} {name}").shuffle(shuffled)
        checked = max(1, len(shuffled) // CHECK_SHARE)
        a = max(1, len(shuffled) - 2 * checked)
        b = a + checked
        for part, chosen in zip(PARTS, (shuffled[:a], shuffled[a:b], shuffled[b:]), strict=True):
            found[part] += sorted(chosen)
    return found


def encode_questions(
    lm: PrefixLM, subjects: Sequence[Subject], num_fewshot: int, limit: int | None, seed: int
) -> dict[str, Encoded]:
    """lm-eval's prompts of the questions as token ids, by part.

    Raises:
        TrialError: the letters differ in more than their last token.
    """
    everything: dict[tuple[str, int], tuple[tuple[int, ...], int]] = {}
    letters: tuple[int, ...] = ()
    with quick_and_quiet():
        for subject in subjects:
            (task,) = tasks([subject], num_fewshot)
            task.build_all_requests(limit=limit)
            pairs = lm.encode(task.instances)
            for instance, (context, continuation) in zip(task.instances, pairs, strict=True):
                everything[subject.name, instance.doc_id] = (lm._input(context, continuation), int(instance.doc["answer"]))
            for start in range(0, len(pairs), len(LETTERS)):
                # What stands before the last token (a blank of its own) is the same for all four, and cancels among them.
                four = [continuation for _, continuation in pairs[start : start + len(LETTERS)]]
                found = tuple(continuation[-1] for continuation in four)
                if len({tuple(continuation[:-1]) for continuation in four}) > 1 or (letters and found != letters):
                    raise TrialError(
                        f"the letters differ in more than their last token on {subject.name}; trials cannot score that"
                    )
                letters = found
    a, b, c, d = letters
    return {
        part: Encoded(tuple(ids), tuple(everything[i][0] for i in ids), tuple(everything[i][1] for i in ids), (a, b, c, d))
        for part, ids in split_questions(list(everything), seed).items()
    }


def text_windows(
    lm: PrefixLM, text: str, tokens_per_part: Sequence[int], window: int = TEXT_WINDOW
) -> dict[str, list[list[int]]]:
    """The text in windows of token ids, for each part its own stretch; the first token of a window is given.

    Raises:
        DataError: the text is too short.
    """
    ids = first_tokens(lm, text, sum(tokens_per_part))
    if len(ids) < sum(tokens_per_part):
        raise DataError(f"the text has {len(ids):,} tokens, expected at least {sum(tokens_per_part):,}")
    window = min(window, lm.max_length)
    if window < MIN_WINDOW or any(0 < count < MIN_WINDOW for count in tokens_per_part):
        raise DataError(
            f"windows of {window} tokens of texts of {list(tokens_per_part)}: expected at least {MIN_WINDOW} of each"
        )
    found, start = {}, 0
    for part, count in zip(PARTS, tokens_per_part, strict=True):
        found[part] = [ids[i : min(i + window, start + count)] for i in range(start, start + count, window)]
        start += count
    return {part: [one for one in windows if len(one) >= MIN_WINDOW] for part, windows in found.items()}


def capture_questions(
    tail: Tail,
    encoded: Encoded,
    cut: int,
    done: Callable[[int], object] = lambda tokens: None,
    folder: Path | None = None,
) -> Questions:
    """Runs the original model on the questions once; or reads what was kept in `folder`, where there is one."""
    inputs = list(dict.fromkeys(encoded.inputs))
    first = [len(one) - 1 for one in inputs]
    original = torch.empty(len(inputs), len(LETTERS))
    letters = list(encoded.letters)

    def seen(answers: list[int], logits: torch.Tensor) -> None:
        original[answers] = torch.log_softmax(logits[:, letters].float(), -1).cpu()

    states, more = _kept(
        tail,
        [*inputs, tuple(letters)],  # what is kept depends on the letters too
        first,
        cut,
        lambda: (tail.capture(inputs, first, cut, seen, done), {"original": original}),
        done,
        folder,
    )
    device, number = tail.lm.device, {one: i for i, one in enumerate(inputs)}
    rows = torch.tensor([number[one] for one in encoded.inputs], device=device)
    return Questions(encoded, states, rows, more["original"].to(device)[rows], torch.tensor(encoded.targets, device=device))


def capture_text(
    tail: Tail,
    windows: Sequence[Sequence[int]],
    cut: int,
    done: Callable[[int], object] = lambda t: None,
    batch_tokens: int | None = None,
    folder: Path | None = None,
) -> tuple[Text, ...]:
    """Runs the original model on the windows once; in batches of whole windows, of at most `batch_tokens` where one fits.

    Or reads what was kept in `folder`, where there is one.
    """
    batches: list[list[Sequence[int]]] = [[]]
    for one in windows:
        if batches[-1] and batch_tokens and sum(map(len, batches[-1])) + len(one) > batch_tokens:
            batches.append([])
        batches[-1].append(one)
    found = []
    for batch in batches:
        inputs = list(dict.fromkeys(tuple(one[:-1]) for one in batch))
        begin = dict(zip(inputs, itertools.accumulate(map(len, inputs), initial=0), strict=False))
        rows = torch.tensor([begin[tuple(one[:-1])] + i for one in batch for i in range(len(one) - 1)], device=tail.lm.device)
        targets = torch.tensor([token for one in batch for token in one[1:]], device=tail.lm.device)
        first = [0] * len(inputs)

        def capture(inputs: list[tuple[int, ...]] = inputs, first: list[int] = first) -> tuple[States, dict[str, torch.Tensor]]:
            return tail.capture(inputs, first, cut, done=done), {}

        found.append(Text(_kept(tail, inputs, first, cut, capture, done, folder)[0], rows, targets))
    return tuple(found)


def _kept(
    tail: Tail,
    inputs: Sequence[Sequence[int]],
    first: Sequence[int],
    cut: int,
    capture: Callable[[], tuple[States, dict[str, torch.Tensor]]],
    done: Callable[[int], object],
    folder: Path | None,
) -> tuple[States, dict[str, torch.Tensor]]:
    """What `capture` gives, kept in a file named after what it depends on."""
    if folder is None:
        return capture()
    path = folder / f"states-{tail.key(inputs, first, cut)}.safetensors"
    if path.is_file():
        states, more = States.load(path, str(tail.lm.device))
        done(states.num_tokens)
        return states, more
    states, more = capture()
    folder.mkdir(parents=True, exist_ok=True)
    states.save(path, **more)
    return states, more


def loss(tail: Tail, layers: Sequence[LayerWeights], part: Part, weights: Mapping[str, float]) -> torch.Tensor:
    """The weighted sum of terms on one part; gradients flow to the weights of `layers`."""
    total = torch.zeros((), device=tail.lm.device)
    if part.questions is not None and any(term in weights for term in ("kl", "ce", "acc")):
        found = options(tail, layers, part.questions)
        for term, value in question_terms(found, part.questions).items():
            if term in weights:
                total = total + weights[term] * value
    if part.text and "text" in weights:
        total = total + weights["text"] * text_nll(tail, layers, part.text)
    return total


def options(tail: Tail, layers: Sequence[LayerWeights], questions: Questions) -> torch.Tensor:
    """Log-probabilities [Q, 4] of the letters among the four."""
    hidden = tail.run(questions.states, layers)
    return torch.log_softmax(tail.logits(hidden, questions.encoded.letters), -1)[questions.rows]


def question_terms(found: torch.Tensor, questions: Questions) -> dict[str, torch.Tensor]:
    """kl, ce and acc of the module's head."""
    values = _by_question(found, questions)
    return {"kl": values["kl"].mean(), "ce": values["ce"].mean(), "acc": 1.0 - values["acc"].mean()}


def _by_question(found: torch.Tensor, questions: Questions) -> dict[str, torch.Tensor]:
    """For every question [Q]: kl, ce, whether it is answered right, and as the original answers it."""
    chosen = found.argmax(-1)
    return {
        "kl": (questions.original.exp() * (questions.original - found)).sum(-1),
        "ce": -found.gather(1, questions.targets[:, None])[:, 0],
        "acc": (chosen == questions.targets).float(),
        "agreement": (chosen == questions.original.argmax(-1)).float(),
    }


def text_nll(tail: Tail, layers: Sequence[LayerWeights], text: Sequence[Text]) -> torch.Tensor:
    """Mean negative log-likelihood per token."""
    sums = [_logprobs(tail, layers, one).sum() for one in text]
    return -torch.stack(sums).sum() / sum(len(one.targets) for one in text)


def _logprobs(tail: Tail, layers: Sequence[LayerWeights], text: Text) -> torch.Tensor:
    """Log-probabilities [T] of the tokens to predict."""
    return tail.logprobs(tail.run(text.states, layers)[text.rows], text.targets)


@torch.inference_mode()
def measure(tail: Tail, layers: Sequence[LayerWeights], part: Part) -> dict[str, Array]:
    """What a plan reaches on one part: kl, ce, acc and agreement with the original for every question, text for every token."""
    found: dict[str, torch.Tensor] = {}
    if part.questions is not None:
        found = _by_question(options(tail, layers, part.questions), part.questions)
    if part.text:
        found["text"] = -torch.cat([_logprobs(tail, layers, one) for one in part.text])
    return {name: values.cpu().double().numpy() for name, values in found.items()}


def interval(name: str, values: Array) -> Mean:
    """The mean of what `measure` found, with its interval: tokens count by blocks of neighbours."""
    return mean(values, TEXT_BLOCK if name == "text" else 1)


def scores(measured: Mapping[str, Array]) -> dict[str, Any]:
    """Means with 95 % intervals, those of shares by Wilson's score, and the text's perplexity."""
    found: dict[str, Any] = {name: interval(name, values).to_dict() for name, values in measured.items()}
    for name in SHARES:
        if name in found and found[name]["count"] and found[name]["value"] is not None:
            found[name]["low"], found[name]["high"] = wilson(round(float(measured[name].sum())), found[name]["count"])
    if "text" in found:
        found["perplexity"] = {
            key: None if found["text"][key] is None else perplexity(found["text"][key]) for key in ("value", "low", "high")
        }
    return found
