# PYTHON_ARGCOMPLETE_OK
"""Compares results question by question: differences with intervals, exact tests, and which questions flipped."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from pathlib import Path
from typing import Any

from _cli import UsageError, parser, run

from eval.compare import SAME_TEXT, Difference, TextDifference, compare_results, flipped
from eval.results import read_results

EXAMPLES = """\
  python scripts/compare.py results/base.json results/drop-last.json results/original.json
  python scripts/compare.py a.json b.json --subjects --flips
  python scripts/compare.py a.json b.json --json > differences.json"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="results; the first file is compared with each of the others"
    )
    result.add_argument("--subjects", action="store_true", help="a line for every subject, not only the groups")
    result.add_argument("--flips", action="store_true", help="list the questions that only one of two gets right")
    result.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    result.add_argument("--json", action="store_true", help="everything as JSON")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Compares every file with the first."""
    if len(arguments.files) < 2:
        raise UsageError("give at least two results files")
    if arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, expected 0 or more")
    read = [(str(path), *read_results(path)) for path in arguments.files]
    path, record, answers = read[0]
    compared = compare_results(read, arguments.seed)
    if arguments.json:
        values = {other: [_values(one) for one in found] for other, found in compared.differences.items()}
        texts = {other: [_text_values(one) for one in found] for other, found in compared.texts.items()}
        content = {"reference": path, "differences": values, "texts": texts, "missing": compared.missing}
        print(json.dumps(content, indent=2))
        return
    print(f"reference {_summary(path, record, record)}")
    print("differences are other - reference; p: exact McNemar, adjusted for the number of lines of its kind")
    print("texts: fewer nats are better; intervals by Student's t over questions, or windows of plain text")
    for other, second, theirs in read[1:]:
        print(f"\n{_summary(other, second, record)}")
        groups = 1 + len(record["scores"]["groups"])
        for one in compared.differences[other][: None if arguments.subjects else groups]:
            test = one.paired
            print(
                f"  {one.name:36} {test.difference:+.4f}  95% [{test.low:+.4f}, {test.high:+.4f}]  p {one.adjusted_p:.3g}  "
                f"only first {test.only_first}, only second {test.only_second}  {one.verdict}"
            )
        for text in compared.texts[other]:
            print(f"  {text.name:36} {_nats(text)}")
        if arguments.flips:
            lost, won = flipped(answers, theirs)
            for sign, found in (("-", lost), ("+", won)):
                for answer in found:
                    print(f"  {sign} {answer.subject} {answer.index}")
    for control in compared.missing:
        print(f"missing: {control}")


def _summary(path: str, record: dict[str, Any], reference: dict[str, Any]) -> str:
    scores = record["scores"]
    parts = [f"{path}: micro accuracy {scores['micro']['acc']:.4f}, macro {scores['macro']['acc']:.4f}"]
    text, other = record.get("text"), reference.get("text") or {}
    if text is None:
        parts.append("perplexity not measured")
    else:
        same = all(text.get(key) == other.get(key) for key in SAME_TEXT)
        note = "" if same else " (the reference's was not measured)" if not other else " (of another text or vocabulary)"
        parts.append(f"perplexity {text['perplexity']:.2f}{note}")
    if question := record.get("question_text"):
        parts.append(f"of the questions {question['perplexity']:.2f}")
    return ", ".join(parts)


def _nats(one: TextDifference) -> str:
    if one.nats is None:
        return f"no interval: {one.missing}"
    return f"{one.nats.value:+.4f}  95% [{one.nats.low:+.4f}, {one.nats.high:+.4f}]  nats per token  {one.verdict}"


def _text_values(one: TextDifference) -> dict[str, object]:
    if one.nats is None:
        return {"name": one.name, "missing": one.missing}
    nats = one.nats
    found = {"difference": nats.value, "low": nats.low, "high": nats.high, "count": nats.count, "verdict": one.verdict}
    return {"name": one.name, **found}


def _values(one: Difference) -> dict[str, object]:
    test = one.paired
    return {
        "name": one.name, "difference": test.difference, "low": test.low, "high": test.high, "p_value": test.p_value,
        "adjusted_p": one.adjusted_p, "only_first": test.only_first, "only_second": test.only_second, "count": test.count,
        "verdict": one.verdict,
    }  # fmt: skip


if __name__ == "__main__":
    run(main, options())
