"""What an evaluation leaves on disk: a JSON record of the scores and a parquet file with every answer beside it."""

import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge.errors import RecordError
from merge.publish import whole_file
from merge.records import read_json

from .errors import DataError, ScoreError
from .mmlu import GROUPS
from .stats import perplexity, stderr, wilson

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """One question answered: `logprobs` of the four letters, `prediction` the largest (the first, where they tie)."""

    subject: str
    index: int  # within the subject's test questions
    logprobs: tuple[float, float, float, float]
    prediction: int
    target: int
    question_nll: float | None = None  # of the question's text after the examples, in nats
    question_tokens: int = 0

    @property
    def right(self) -> bool:
        """Whether the prediction is the target."""
        return self.prediction == self.target


@dataclass(frozen=True)
class Score:
    """An accuracy with its standard error; `count` questions, or subjects for a macro mean."""

    acc: float
    stderr: float
    count: int


def score(answers: Sequence[Answer]) -> Score:
    """Micro accuracy: the share of the questions answered right."""
    right = [float(answer.right) for answer in answers]
    return Score(math.fsum(right) / len(right), stderr(right), len(right))


def macro(answers: Sequence[Answer]) -> Score:
    """Mean of the subjects' accuracies; its standard error comes from the questions within subjects, not between subjects.

    It is nan where every subject is all right or all wrong, which says nothing of the error.
    """
    subjects = [score(found) for found in by_subject(answers).values()]
    spread = math.sqrt(math.fsum(one.stderr**2 for one in subjects)) / len(subjects)
    return Score(math.fsum(one.acc for one in subjects) / len(subjects), spread or math.nan, len(subjects))


def by_subject(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by subject, in order of first appearance."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.subject, []).append(answer)
    return found


def by_group(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by the four groups of subjects; groups without answers are left out."""
    found = {group: [answer for answer in answers if answer.subject in subjects] for group, subjects in GROUPS.items()}
    return {group: chosen for group, chosen in found.items() if chosen}


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """All scores of a set of answers, as JSON values."""
    return {
        "micro": _values(score(answers)),
        "macro": _values(macro(answers)),
        "groups": {group: _values(score(found)) for group, found in by_group(answers).items()},
        "subjects": {subject: _values(score(found)) for subject, found in by_subject(answers).items()},
    }


def question_text(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """Perplexity of the questions' text after the examples, over tokens (micro) and as the mean over subjects (macro)."""
    measured = [answer for answer in answers if answer.question_nll is not None and answer.question_tokens]
    if not measured:
        return None
    subjects = [_pooled(found) for found in by_subject(measured).values()]
    return {
        "perplexity": _pooled(measured),
        "macro_perplexity": math.fsum(subjects) / len(subjects),
        "tokens": sum(answer.question_tokens for answer in measured),
        "questions": len(measured),
    }


def _pooled(answers: Sequence[Answer]) -> float:
    nll = math.fsum(answer.question_nll or 0.0 for answer in answers) / sum(answer.question_tokens for answer in answers)
    return perplexity(nll)


def _values(one: Score) -> dict[str, Any]:
    """A score as JSON values; a standard error that cannot be told (one question) is null."""
    return asdict(one) | {"stderr": None if math.isnan(one.stderr) else one.stderr}


def all_or_none(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of a score of `summary` where all or none are right: a standard error of 0 is no certainty."""
    return wilson(round(values["acc"] * values["count"]), values["count"]) if values["stderr"] == 0.0 else None


def write_results(path: Path, record: Mapping[str, Any], answers: Sequence[Answer]) -> None:
    """Writes PATH (JSON) and the answers beside it (parquet); each file appears whole, PATH last: where it is, both are.

    Raises:
        ScoreError: a log-probability is not a number.
        OutputError: a file cannot be written.
    """
    broken = [answer for answer in answers if not all(map(math.isfinite, answer.logprobs))]
    if broken:
        where = f"{broken[0].subject}, question {broken[0].index}"
        raise ScoreError(f"{len(broken)} answers are not numbers (first: {where}); the model's weights hold NaN or overflow")
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist([asdict(answer) | {"logprobs": list(answer.logprobs)} for answer in answers])
    with whole_file(path) as scratch:
        with whole_file(answers_path(path)) as table_scratch:
            parquet.write_table(table, table_scratch)
            content = {"schema_version": SCHEMA_VERSION, "answers_sha256": _sha256(table_scratch), **record}
            scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            path.unlink(missing_ok=True)  # never beside answers that it was not made from


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_results(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """What `write_results` wrote.

    Raises:
        DataError: a file is missing, of another version, or the two do not belong together.
    """
    try:
        record = read_json(path)
    except RecordError as error:
        raise DataError(str(error)) from error
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or "scores" not in record:
        raise DataError(f"{path} is not a results file of this release; expected the output of scripts/eval_mmlu.py")
    parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    try:
        rows = parquet.read_table(answers_path(path)).to_pylist()
        answers = [Answer(**row | {"logprobs": tuple(row["logprobs"])}) for row in rows]
    except (OSError, TypeError, KeyError, arrow.ArrowException) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"{answers_path(path)}: the answers that belong to {path.name} cannot be read: {first}") from error
    if not answers or _sha256(answers_path(path)) != record.get("answers_sha256"):
        raise DataError(f"{answers_path(path)} does not hold the answers that {path.name} was made from; evaluate again")
    # Everything else that is read later follows from the answers, or is looked at here.
    plan, text = record.get("plan"), record.get("text")
    if plan is not None and not (isinstance(plan, dict) and isinstance(plan.get("rows"), list)):
        raise DataError(f"{path}: 'plan' is not a plan; the file was changed, evaluate again")
    if text is not None and not _is_text(text):
        raise DataError(f"{path}: 'text' is not what this release writes; the file was changed, evaluate again")
    return record | {"scores": summary(answers), "question_text": question_text(answers)}, answers


def _is_text(text: Any) -> bool:
    """Whether it is a text's perplexity, with as many nats as token counts of its windows; older files kept no windows."""
    if not (isinstance(text, dict) and isinstance(text.get("perplexity"), float)):
        return False
    nll, tokens = text.get("window_nll", []), text.get("window_tokens", [])
    if not (isinstance(nll, list) and isinstance(tokens, list) and len(nll) == len(tokens)):
        return False
    return all(isinstance(one, float) for one in nll) and all(isinstance(one, int) and one > 0 for one in tokens)


def answers_path(path: Path) -> Path:
    """The parquet file beside a results file; samples.parquet beside results.json."""
    if path.name == "results.json":
        return path.with_name("samples.parquet")
    return path.with_name(path.name.removesuffix(".json") + ".parquet")
