"""MMLU: questions from the Hub or from local files, lm-eval's own tasks over them, and a record of every answer.

Micro accuracy counts questions (lm-eval's convention), macro accuracy is the mean over subjects (the papers'): they differ
by more than a point on the same answers, so both are reported by name. Prompts, choices and metric are those of lm-eval's
`mmlu_*` tasks, read from the installed release.
"""

import csv
import functools
import hashlib
import importlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml

from .errors import DataError, near, short

LETTERS = "ABCD"
CONVENTIONS = ("lm-eval", "reference")  # how questions are shown and letters scored; see `tasks`
NUM_TEST, NUM_DEV = 14_042, 285  # questions of the whole set; five dev questions for each subject
HUB_NAME = "cais/mmlu"
ARCHIVE_NAMES = {"test": "test", "validation": "val"}  # split -> how the original archive spells it

GROUPS: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
SUBJECTS = tuple(sorted(subject for subjects in GROUPS.values() for subject in subjects))


@dataclass(frozen=True)
class Question:
    """One question; `answer` is the index of the right choice."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class Subject:
    """The questions of a subject: `dev` are the few-shot examples."""

    name: str
    dev: tuple[Question, ...]
    test: tuple[Question, ...]


def read_mmlu(folder: Path | None, subjects: Sequence[str] = (), split: str = "test") -> list[Subject]:
    """The named subjects (all, if none is named), from a local folder or from the Hub; `split` is test or validation.

    A folder holds dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, as the original archive does, or dev.parquet and
    test.parquet with the columns of cais/mmlu.

    Raises:
        DataError: an unknown subject, a missing or malformed file (with file and row), or no network.
    """
    wanted = list(dict.fromkeys(subjects)) or list(SUBJECTS)
    for name in wanted:
        if name not in SUBJECTS:
            raise DataError(f"there is no MMLU subject {name!r}{near(name, SUBJECTS)}")
    found = _read(folder, wanted, split)
    empty = [subject.name for subject in found if not subject.test]
    if empty:
        raise DataError(f"{folder or HUB_NAME} has no {split} questions on {', '.join(empty)}")
    return found


def _read(folder: Path | None, wanted: Sequence[str], split: str) -> list[Subject]:
    if folder is None:
        return [_from_hub(name, split) for name in wanted]
    if (folder / f"{split}.parquet").is_file():
        splits = {one: _from_parquet(folder / f"{one}.parquet") for one in ("dev", split)}
        return [Subject(name, splits["dev"].get(name, ()), splits[split].get(name, ())) for name in wanted]
    short = ARCHIVE_NAMES[split]
    if not (folder / short).is_dir():
        raise DataError(
            f"{folder} holds neither {short}/SUBJECT_{short}.csv nor {split}.parquet; expected the original MMLU archive"
        )
    read = {one: [folder / one / f"{name}_{one}.csv" for name in wanted] for one in ("dev", short)}
    return [
        Subject(name, _from_csv(dev), _from_csv(test)) for name, dev, test in zip(wanted, read["dev"], read[short], strict=True)
    ]


def question_set(subjects: Sequence[Subject]) -> str:
    """A hash of all questions and examples in order: results are comparable only if they agree in it."""
    text = json.dumps(
        [[s.name, [[[q.question, q.choices, q.answer] for q in questions] for questions in (s.dev, s.test)]] for s in subjects]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def num_questions(subjects: Sequence[Subject], limit: int | None = None) -> int:
    """How many test questions are asked, at most `limit` of each subject."""
    return sum(len(subject.test) if limit is None else min(limit, len(subject.test)) for subject in subjects)


def partial(subjects: Sequence[Subject], limit: int | None = None) -> str | None:
    """What part of MMLU these questions are; None if they are all of it."""
    count = num_questions(subjects, limit)
    dev = sum(len(subject.dev) for subject in subjects)
    if (len(subjects), count, dev) == (len(SUBJECTS), NUM_TEST, NUM_DEV):
        return None
    return f"{count:,} of {NUM_TEST:,} questions, {len(subjects)} of {len(SUBJECTS)} subjects, {dev} of {NUM_DEV} examples"


def tasks(subjects: Sequence[Subject], num_fewshot: int, convention: str = "lm-eval") -> list[Any]:
    """lm-eval's tasks over these questions: its own configuration, with the questions handed in.

    The convention 'reference' shows them as the released tool of Pruning via Merging (arXiv:2406.16330) does: two blanks
    before the subject, no stripping, and options as its data frame reader returns them ("None" becomes "nan"). To score
    them as it does, the model must be a PrefixLM with `letters_apart` and without BOS.

    Raises:
        DataError: a subject has fewer examples than asked for.
    """
    task_class = importlib.import_module("lm_eval.api.task").ConfigurableTask
    result = []
    for subject in subjects:
        check_examples(subject, num_fewshot)
        config = task_config(subject.name)
        if convention == "reference":
            subject = _through_data_frame(subject)
            config["description"] = config["description"].replace(" about ", " about  ")
            config["doc_to_text"] = config["doc_to_text"].replace("question.strip()", "question")
        config |= {"custom_dataset": functools.partial(_dataset, subject), "num_fewshot": num_fewshot}
        result.append(task_class(config=config))
    return result


def check_examples(subject: Subject, num_fewshot: int) -> None:
    """Raises DataError if the subject has fewer examples than asked for."""
    if len(subject.dev) < num_fewshot:
        raise DataError(f"{subject.name} has {len(subject.dev)} dev examples, expected at least {num_fewshot}")


@contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Inside, lm-eval compiles each prompt template once instead of once per question and example (30 times faster), shows
    no bar of its own while it builds prompts, and starts no programs to describe the machine (seconds; noise without git).
    """
    module = {name: importlib.import_module(f"lm_eval.{name}") for name in ("utils", "api.task", "evaluator")}
    changes = [
        (module["utils"].env, "from_string", functools.lru_cache(512)(module["utils"].env.from_string)),
        (module["api.task"], "tqdm", functools.partial(module["api.task"].tqdm, disable=True)),
        (module["evaluator"], "get_git_commit_hash", lambda: None),
        (module["evaluator"], "add_env_info", lambda storage: None),
    ]
    before = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    for thing, name, value in changes:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


def task_config(subject: str) -> dict[str, Any]:
    """lm-eval's own configuration of a subject's task: prompt, choices, metric, version."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    own: dict[str, Any] = yaml.safe_load((folder / f"mmlu_{subject}.yaml").read_text())
    shared: dict[str, Any] = yaml.safe_load((folder / own.pop("include")).read_text())
    return shared | own


def _dataset(subject: Subject, **_: Any) -> Any:
    datasets = importlib.import_module("datasets")
    rows = {
        split: [
            {"question": q.question, "subject": subject.name, "choices": list(q.choices), "answer": q.answer} for q in questions
        ]
        for split, questions in (("dev", subject.dev), ("test", subject.test))
    }
    return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})


def _through_data_frame(subject: Subject) -> Subject:
    """A subject's questions as a data frame reader returns its CSV files."""
    pandas = importlib.import_module("pandas")

    def reread(questions: Sequence[Question]) -> tuple[Question, ...]:
        file = io.StringIO()
        csv.writer(file).writerows([q.question, *q.choices, LETTERS[q.answer]] for q in questions)
        frame = pandas.read_csv(io.StringIO(file.getvalue()), header=None)
        cells = [[str(cell) for cell in row] for row in frame.itertuples(index=False)]
        return tuple(Question(row[0], (row[1], row[2], row[3], row[4]), LETTERS.index(row[5])) for row in cells)

    return Subject(subject.name, reread(subject.dev), reread(subject.test))


def _from_csv(path: Path) -> tuple[Question, ...]:
    # The csv module keeps every option as text; a data frame reader would turn the option "None" into a missing value.
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return tuple(_question(path, number, row) for number, row in enumerate(rows, start=1))


def _question(path: Path, number: int, row: Sequence[str]) -> Question:
    if len(row) != 6:
        raise DataError(f"{path}, row {number}: found {len(row)} columns, expected 6 (question, A, B, C, D, answer)")
    question, a, b, c, d, answer = row
    if answer not in LETTERS or len(answer) != 1:
        raise DataError(f"{path}, row {number}: the answer is {answer!r}, expected one of A, B, C, D")
    return Question(question, (a, b, c, d), LETTERS.index(answer))


def _from_parquet(path: Path) -> dict[str, tuple[Question, ...]]:
    parquet = importlib.import_module("pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    try:
        rows = parquet.read_table(path, columns=["question", "subject", "choices", "answer"]).to_pylist()
    except (OSError, arrow.ArrowException, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as MMLU (columns question, subject, choices, answer): {first}") from error
    found: dict[str, list[Question]] = {}
    for number, row in enumerate(rows, start=1):
        texts = [row["question"], *(row["choices"] or ())]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}, row {number}: the question or a choice is not a text")
        if row["answer"] not in range(4) or len(row["choices"] or ()) != 4:
            raise DataError(
                f"{path}, row {number}: answer {row['answer']!r} of {len(row['choices'] or ())} choices, expected 0-3 of 4"
            )
        found.setdefault(row["subject"], []).append(Question(row["question"], tuple(row["choices"]), row["answer"]))
    return {name: tuple(questions) for name, questions in found.items()}


def _from_hub(subject: str, split: str) -> Subject:
    datasets = importlib.import_module("datasets")
    try:
        data = datasets.load_dataset(HUB_NAME, subject)
    except Exception as error:  # datasets raises many kinds, offline ones among them
        raise DataError(
            f"{HUB_NAME} ({subject}) cannot be had from the Hub or its cache ({short(error)}); give --data-dir"
        ) from error
    read = [
        tuple(Question(row["question"], tuple(row["choices"]), row["answer"]) for row in data[one]) for one in ("dev", split)
    ]
    return Subject(subject, *read)
