"""Two or more results on the same questions, compared question by question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import DataError
from .results import Answer, by_group, by_subject
from .stats import Mean, Paired, holm, paired, ratio

SAME_TEXT = ("sha256", "tokens", "window", "vocabulary")
MUST_AGREE = ("task", "task_version", "convention", "question_set", "num_fewshot", "limit")


SIGNIFICANT = 0.05
DROPPING = ("drop", "drop-last", "drop-keep-last")


@dataclass(frozen=True)
class Difference:
    """The second model minus the first on one set of questions; `adjusted_p` counts how many sets were tested together."""

    name: str
    paired: Paired
    adjusted_p: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if not self.paired.shown:
            return "no difference shown"
        found = "better" if self.paired.difference > 0 else "worse"
        return found if self.adjusted_p < SIGNIFICANT else f"{found}, but not after correction"


@dataclass(frozen=True)
class TextDifference:
    """The second model's nats per token minus the first's on one text, by questions or windows; or why there is no interval."""

    name: str
    nats: Mean | None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """What the interval allows to say: fewer nats are better."""
        if self.nats is None or self.nats.low <= 0 <= self.nats.high:
            return "no difference shown"
        return "better" if self.nats.value < 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """Every result less the first: `differences` and `texts` by its name; `missing` says which controls are not among them."""

    reference: str
    differences: Mapping[str, list[Difference]]
    texts: Mapping[str, list[TextDifference]]
    missing: list[str]


def compare_results(results: Sequence[tuple[str, Mapping[str, Any], Sequence[Answer]]], seed: int = 0) -> Comparison:
    """Results compared question by question with the first of them.

    Args:
        results: (name, record, answers) of each, the last two as `evaluate_mmlu` and `read_results` return them.
        seed: of the bootstrap.

    Raises:
        DataError: there are fewer than two, or they are not of the same questions, asked the same way.
    """
    if len(results) < 2:
        raise DataError(f"there is nothing to compare: expected at least two results, found {len(results)}")
    name, record, answers = results[0]
    for other, second, _ in results[1:]:
        check_comparable(record, second, (name, other))
    found = {other: differences(answers, theirs, seed) for other, _, theirs in results[1:]}
    texts = {other: text_differences((record, answers), (second, theirs)) for other, second, theirs in results[1:]}
    return Comparison(name, found, texts, missing_controls([one for _, one, _ in results]))


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raises DataError unless both records are of the same questions, asked the same way."""
    for key in MUST_AGREE:
        if first.get(key) != second.get(key):
            raise DataError(
                f"{names[0]} and {names[1]} cannot be compared: {key} is {first.get(key)!r} and {second.get(key)!r}; "
                "evaluate both with the same options"
            )


def missing_controls(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not among these results and should be: the original, and layers simply dropped at each merge's depth."""
    plans = [record.get("plan") for record in records]
    missing = []
    if None not in plans:
        missing.append("no original model (results of a model without a plan)")
    dropped = {len(plan["rows"]) for plan in plans if plan and plan.get("method") in DROPPING}
    for plan in plans:
        if plan and plan.get("method") not in DROPPING and len(plan["rows"]) not in dropped:
            depth, layers = len(plan["rows"]), plan.get("num_hidden_layers", 0)
            missing.append(
                f"no model with layers simply dropped to {depth}, the control of {plan.get('name')}: "
                f"scripts/merge.py --method drop-last --layers {layers - depth}"
            )
    return list(dict.fromkeys(missing))


def differences(first: Sequence[Answer], second: Sequence[Answer], seed: int = 0) -> list[Difference]:
    """The comparison over all questions, then each group, then each subject; p-values adjusted within groups and subjects.

    Raises:
        DataError: the answers are not to the same questions.
    """
    whole = overall(first, second, seed)
    result = [Difference("all", whole, whole.p_value)]
    for split in (by_group, by_subject):
        one, two = split(first), split(second)
        found = {name: _paired(one[name], two[name], seed) for name in one}
        adjusted = holm([test.p_value for test in found.values()])
        result += [Difference(name, test, p) for (name, test), p in zip(found.items(), adjusted, strict=True)]
    return result


def overall(first: Sequence[Answer], second: Sequence[Answer], seed: int = 0) -> Paired:
    """The comparison over all questions alone.

    Raises:
        DataError: the answers are not to the same questions.
    """
    ids = [[(answer.subject, answer.index, answer.target) for answer in answers] for answers in (first, second)]
    if ids[0] != ids[1]:
        raise DataError(f"the answers are to different questions ({len(ids[0])} and {len(ids[1])}); evaluate again")
    return _paired(first, second, seed)


def text_differences(
    first: tuple[Mapping[str, Any], Sequence[Answer]], second: tuple[Mapping[str, Any], Sequence[Answer]]
) -> list[TextDifference]:
    """The questions' own text and the plain text, each as far as both results have it; (record, answers) of each."""
    found = []
    pairs = [
        (a, b)
        for a, b in zip(first[1], second[1], strict=True)
        if a.question_nll is not None and b.question_nll is not None
    ]  # fmt: skip
    if pairs:
        nll = [(a.question_nll or 0.0, b.question_nll or 0.0) for a, b in pairs]
        tokens = [(a.question_tokens, b.question_tokens) for a, b in pairs]
        found.append(_text("the questions' text", nll, tokens, "question"))
    one, two = first[0].get("text"), second[0].get("text")
    if one and two:
        name = str(one.get("file", "the text"))
        if any(one.get(key) != two.get(key) for key in SAME_TEXT):
            found.append(TextDifference(name, None, "another text or vocabulary"))
        elif not (one.get("window_nll") and two.get("window_nll")):
            found.append(TextDifference(name, None, "no windows kept; evaluate again"))
        else:
            windows = [list(zip(one[key], two[key], strict=False)) for key in ("window_nll", "window_tokens")]
            found.append(_text(name, windows[0], windows[1], "window"))
    return found


def _text(name: str, nll: Sequence[tuple[float, float]], tokens: Sequence[tuple[int, int]], unit: str) -> TextDifference:
    if any(a != b for a, b in tokens):
        return TextDifference(name, None, "another vocabulary")
    found = ratio([b - a for a, b in nll], [a for a, _ in tokens])
    if math.isnan(found.low):
        return TextDifference(name, None, f"too little text ({found.count} {unit})")
    return TextDifference(name, found)


def flipped(first: Sequence[Answer], second: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """(questions that only the first gets right, questions that only the second does), as the second's answers."""
    pairs = list(zip(first, second, strict=True))
    return [b for a, b in pairs if a.right and not b.right], [b for a, b in pairs if b.right and not a.right]


def _paired(first: Sequence[Answer], second: Sequence[Answer], seed: int) -> Paired:
    return paired([answer.right for answer in first], [answer.right for answer in second], seed)
