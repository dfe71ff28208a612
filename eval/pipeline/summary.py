"""What a study shows: every model beside every other that it has to beat, pair by pair, and the answer in words.

A merge beats dropping on a measurement if it is better than every way of dropping at its depth: the largest p-value over the
controls counts (intersection-union test: Berger 1982, Technometrics 24), then all merges and measurements are adjusted
together (Holm). Accuracies are compared by exact McNemar tests question by question, texts by windows of tokens.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from merge.records import read_json, why_not_read

from ..bits import Bits, difference
from ..compare import SIGNIFICANT, Difference, differences, overall
from ..errors import DataError
from ..results import Answer, read_results
from ..stats import Paired, holm, paired, perplexity, stderr, wilson
from .arms import DROPS, ORIGINAL
from .run import RESULTS, SCHEMA_VERSION, STUDY

KEYS = ("arms", "missing", "left_out", "failed", "finished", "num_hidden_layers", "layers", "greedy", "settings")
CHANCE = 0.25  # of four answers
MEASURES = {  # measurement -> name, unit of its differences, whether more is better
    "mmlu": ("MMLU accuracy", "points", True),
    "text": ("text", "nats per token", False),
    "cloze": ("LAMBADA accuracy", "points", True),
}


@dataclass(frozen=True)
class Model:
    """An arm of a study with what was measured; `parts` as in results.json."""

    name: str
    kind: str
    depth: int
    record: dict[str, Any]
    answers: list[Answer] = field(repr=False, default_factory=list)

    @property
    def parts(self) -> dict[str, Any]:
        """The measurements."""
        found: dict[str, Any] = self.record["parts"]
        return found


@dataclass(frozen=True)
class Study:
    """A study as it is on disk: study.json, and the models whose results are there."""

    folder: Path
    record: dict[str, Any]
    models: list[Model]

    def model(self, name: str) -> Model | None:
        """The model of that name, where there are results of it."""
        return next((one for one in self.models if one.name == name), None)


@dataclass(frozen=True)
class Comparison:
    """`model` less `other` on one measurement, in its unit, with a 95 % interval; p two-sided.

    count: of questions, windows of text or passages; for one window of text there is no interval, and p is 1.
    """

    measure: str
    model: str
    other: str
    value: float
    low: float
    high: float
    p_value: float
    count: int

    @property
    def has_interval(self) -> bool:
        """Whether there was enough to give one."""
        return not math.isnan(self.low)

    @property
    def better(self) -> bool:
        """Whether the model is the better one, shown or not."""
        return self.value > 0 if MEASURES[self.measure][2] else self.value < 0


@dataclass(frozen=True)
class Verdict:
    """Whether a merge beats every way of dropping at its depth: `p_value` adjusted for all merges and measurements.

    `nearest` is the comparison with the control that does best; `outcome` one of better, worse, not shown.
    """

    measure: str
    model: str
    nearest: Comparison
    controls: int
    p_value: float
    outcome: str


def read_study(folder: Path) -> Study:
    """A study from its folder, also while it is under way.

    Raises:
        DataError: there is none, or its results are damaged.
    """
    path = folder / STUDY
    if not path.is_file():
        if not folder.exists():
            raise DataError(f"{folder} cannot be read: {why_not_read(folder, FileNotFoundError())}")
        raise DataError(f"{folder} holds no {STUDY}; expected the output of scripts/pipeline.py")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or not set(KEYS) <= set(record):
        raise DataError(f"{path} is not a study of this release; expected the output of scripts/pipeline.py")
    models = []
    for arm in record["arms"]:
        results = folder / arm["name"] / RESULTS
        if not results.is_file():
            continue
        raw = read_json(results)
        found, answers = read_results(results) if "scores" in raw else (raw, [])
        if not isinstance(found.get("parts"), dict):
            raise DataError(f"{results} has no measurements of a study; run scripts/pipeline.py --resume")
        depth = arm["depth"] or record["num_hidden_layers"]
        models.append(Model(arm["name"], arm["kind"], depth, found, answers))
    if not models:
        raise DataError(f"{folder} holds no results yet")
    return Study(folder, record, models)


def compare(model: Model, other: Model, measure: str) -> Comparison | None:
    """One model less another on a measurement; None where one of them lacks it."""
    one, two = model.parts.get(measure), other.parts.get(measure)
    if one is None or two is None:
        return None
    if measure == "text":
        found = difference(_bits(one), _bits(two))
        spread = abs(found.value) / found.stderr if found.stderr else math.inf if found.value else 0.0
        p_value = 1.0 if math.isnan(spread) else float(2 * student.sf(spread, max(1, found.count - 1)))
        return Comparison(measure, model.name, other.name, found.value, found.low, found.high, p_value, found.count)
    test = overall(other.answers, model.answers) if measure == "mmlu" else _cloze(one, two)
    return Comparison(
        measure, model.name, other.name, 100 * test.difference, 100 * test.low, 100 * test.high, test.p_value, test.count
    )  # fmt: skip


def mmlu_differences(model: Model, other: Model) -> list[Difference]:
    """The model less the other over all questions, each group, each subject."""
    return differences(other.answers, model.answers)


def drops_at(study: Study, model: Model) -> list[Model]:
    """The ways of dropping at a model's depth."""
    return [one for one in study.models if one.depth == model.depth and one.kind in (*DROPS, "drop-given")]


def unmeasured(study: Study, merge: Model) -> list[str]:
    """Ways of dropping at a merge's depth that the study has and that have no results yet."""
    there = {one.name for one in study.models}
    kinds = (*DROPS, "drop-given")
    return [
        arm["name"]
        for arm in study.record["arms"]
        if arm["kind"] in kinds and arm["depth"] == merge.depth and arm["name"] not in there
    ]


def verdicts(study: Study) -> list[Verdict]:
    """For every merge and measurement, whether it beats every way of dropping at its depth; none while one is not measured."""
    raw: list[tuple[str, str, Comparison, int, float]] = []
    for merge in (one for one in study.models if one.kind == "merge" and not unmeasured(study, one)):
        for measure, (_, _, more) in MEASURES.items():
            found = [one for drop in drops_at(study, merge) if (one := compare(merge, drop, measure)) is not None]
            if not found:
                continue
            nearest = min(found, key=lambda one: one.value if more else -one.value)
            # Better than all, or worse than the best: either way the nearest control decides, with the largest p-value.
            ahead = all(one.better for one in found)
            p_value = max(one.p_value for one in found) if ahead else nearest.p_value
            raw.append((measure, merge.name, nearest, len(found), p_value))
    adjusted = holm([p_value for *_, p_value in raw])
    return [
        Verdict(measure, name, nearest, controls, p_value, _outcome(nearest, p_value))
        for (measure, name, nearest, controls, _), p_value in zip(raw, adjusted, strict=True)
    ]


def answer(study: Study, found: Sequence[Verdict]) -> list[str]:
    """The study in a few sentences, the question first: does any merge beat dropping at equal depth?"""
    if not any(one.kind == "merge" for one in study.models):
        return ["No merge has results yet, so nothing can be said about merging.", *_cautions(study)]
    if not found:
        none = "No merge has a control of equal depth with the same measurements, so nothing can be said about merging."
        return [none, *_cautions(study)]
    lines = []
    for measure in MEASURES:
        here = [one for one in found if one.measure == measure]
        if not here:
            continue
        name = MEASURES[measure][0]
        if not here[0].nearest.has_interval:  # all models read the same text
            lines.append(f"On {name}: nothing can be said, there is {too_little(here[0].nearest)} to give an interval.")
            continue
        better = [one.model for one in here if one.outcome == "better"]
        worse = [one.model for one in here if one.outcome == "worse"]
        unclear = [one.model for one in here if one.outcome == "not shown"]
        said = []
        if better:
            said.append(f"{_names(better)} {_verb(better)} better than every way of dropping as many layers")
        if unclear:
            said.append(f"no difference from the best way of dropping is shown for {_names(unclear)}")
        if worse:
            said.append(f"{_names(worse)} {_verb(worse)} worse than the best way of dropping as many layers")
        lines.append(f"On {name}: {'; '.join(said)}.")
    won = sorted({MEASURES[one.measure][0] for one in found if one.outcome == "better"})
    no = "No: no merge is shown to beat simply dropping layers, on anything measured."
    return [f"Yes, on {' and '.join(won)}." if won else no, *lines, *_cautions(study)]


def too_little(one: Comparison) -> str:
    """Why a comparison has no interval."""
    return f"too little {MEASURES[one.measure][0]} ({one.count} window{'s' * (one.count != 1)})"


def table_rows(study: Study) -> list[dict[str, Any]]:
    """One row per model: what was measured, as plain data."""
    rows = []
    for one in study.models:
        parts, scores = one.parts, one.record.get("scores")
        row: dict[str, Any] = {
            "name": one.name, "kind": one.kind, "layers": one.depth, "parameters": one.record["num_parameters"],
            "bytes": one.record["bytes_total"],
        }  # fmt: skip
        if scores:
            row |= {f"mmlu_{kind}": scores[kind] for kind in ("micro", "macro")}
        if text := parts.get("text"):
            row["perplexity"] = text["perplexity"]
            row["perplexity_interval"] = _perplexity_interval(text)
        if cloze := parts.get("cloze"):
            right = np.array(cloze["right"], dtype=float)
            row["cloze"] = {
                "acc": cloze["acc"],
                "stderr": _none(stderr(right.tolist())),
                "count": len(right),
            }
        if speed := parts.get("speed"):
            row["speed"] = speed["batches"]
        rows.append(row)
    return rows


def to_json(study: Study) -> str:
    """Everything that the report says, as JSON."""
    found = verdicts(study)
    return json.dumps(
        {
            "answer": answer(study, found),
            "verdicts": [
                {
                    "measure": v.measure, "model": v.model, "outcome": v.outcome, "p_value": v.p_value,
                    "nearest": {key: _none(value) for key, value in vars(v.nearest).items()},
                }
                for v in found
            ],
            "models": table_rows(study),
        },
        indent=2,
    )  # fmt: skip


def _cautions(study: Study) -> list[str]:
    """What limits the answer."""
    said = []
    original = study.model(ORIGINAL)
    if original is not None and (scores := original.record.get("scores")):
        acc, count = scores["micro"]["acc"], scores["micro"]["count"]
        low, high = wilson(round(acc * count), count)
        found = f"(accuracy {acc:.3f} [{low:.3f}, {high:.3f}])"
        questions = f"{count:,} question{'s' * (count != 1)}"
        if low <= CHANCE <= high:  # few questions show nothing: neither that it knows the answers nor that it does not
            said.append(f"{questions} cannot tell the original itself from chance {found}, so they tell no models apart.")
        elif high < CHANCE:
            said.append(f"The original itself is worse than chance on {questions} of MMLU {found}: they tell no models apart.")
    for merge in (one for one in study.models if one.kind == "merge"):
        if lacking := unmeasured(study, merge):
            said.append(f"Nothing is said of {merge.name}: {_names(lacking)}, dropped to the same depth, has no results.")
    for part, why in study.record["missing"].items():
        said.append(f"Not measured: {part} ({why}).")
    for file, why in study.record["left_out"].items():
        said.append(f"{Path(file).name} was left out: {why}.")
    for name, why in study.record["failed"].items():
        said.append(f"{name} failed: {why}.")
    if not study.record["finished"]:
        said.append("The study is not finished; models without results are left out.")
    return said


def _outcome(nearest: Comparison, p_value: float) -> str:
    if p_value >= SIGNIFICANT or math.isnan(p_value):
        return "not shown"
    return "better" if nearest.better else "worse"


def _bits(value: dict[str, Any]) -> Bits:
    return Bits(np.array(value["nll"]), np.array(value["tokens"], dtype=np.float64))


def _cloze(one: dict[str, Any], two: dict[str, Any]) -> Paired:
    if one["count"] != two["count"]:
        raise DataError("the models were asked different cloze passages; run scripts/pipeline.py --resume")
    return paired([bool(x) for x in two["right"]], [bool(x) for x in one["right"]])


def _perplexity_interval(text: dict[str, Any]) -> tuple[float, float] | None:
    """95 % over windows; None for fewer than two."""
    bits = _bits(text)
    found = difference(bits, Bits(np.zeros_like(bits.bits), bits.bytes))
    return None if math.isnan(found.stderr) else (perplexity(found.low), perplexity(found.high))


def _none(value: Any) -> Any:
    """JSON has no nan."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
