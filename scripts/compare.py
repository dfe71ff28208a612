"""Compares results question by question: differences with intervals, exact tests, and which questions flipped."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from pathlib import Path

from _cli import UsageError, parser, run

from eval.compare import Difference, check_comparable, differences, flipped
from eval.results import read_results

EXAMPLES = """\
  python scripts/compare.py results/original.json results/base.json results/drop-last.json
  python scripts/compare.py a.json b.json --subjects --flips"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results files; the first is the reference")
    result.add_argument("--subjects", action="store_true", help="a line for every subject, not only the groups")
    result.add_argument("--flips", action="store_true", help="list the questions that only one of two gets right")
    result.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    result.add_argument("--json", action="store_true", help="everything as JSON")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Compares every file with the first."""
    if len(arguments.files) < 2:
        raise UsageError("give at least two results files")
    read = [(path, *read_results(path)) for path in arguments.files]
    path, record, answers = read[0]
    for other, second, _ in read[1:]:
        check_comparable(record, second, (str(path), str(other)))
    compared = {other: differences(answers, theirs, arguments.seed) for other, _, theirs in read[1:]}
    if arguments.json:
        print(json.dumps({str(other): [_values(one) for one in found] for other, found in compared.items()}, indent=2))
        return
    print(f"reference: {path}  micro accuracy {record['scores']['micro']['acc']:.4f}{_perplexity(record)}")
    for other, second, theirs in read[1:]:
        print(f"\n{other}  micro accuracy {second['scores']['micro']['acc']:.4f}{_perplexity(second)}")
        groups = 1 + len(record["scores"]["groups"])
        for one in compared[other][: None if arguments.subjects else groups]:
            test = one.paired
            print(
                f"  {one.name:36} {test.difference:+.4f}  95% [{test.low:+.4f}, {test.high:+.4f}]  p {one.adjusted_p:.3g}  "
                f"only first {test.only_first}, only second {test.only_second}  {one.verdict}"
            )
        if arguments.flips:
            lost, won = flipped(answers, theirs)
            for sign, found in (("-", lost), ("+", won)):
                print(*(f"  {sign} {answer.subject} {answer.index}" for answer in found), sep="\n")
    methods = [(other_record.get("plan") or {}).get("method") for _, other_record, _ in read]
    if None not in methods:
        print("\nmissing: no original model is among these (results of a model without a plan)")
    if not any(method in ("drop", "drop-last", "drop-keep-last") for method in methods):
        print("missing: no model with layers simply dropped is among these; without it a merge has no control")


def _perplexity(record: dict) -> str:  # type: ignore[type-arg]
    text = record.get("text")
    return f", perplexity {text['perplexity']:.2f}" if text else ", perplexity not measured"


def _values(one: Difference) -> dict[str, object]:
    test = one.paired
    return {
        "name": one.name, "difference": test.difference, "low": test.low, "high": test.high, "p_value": test.p_value,
        "adjusted_p": one.adjusted_p, "only_first": test.only_first, "only_second": test.only_second, "count": test.count,
        "verdict": one.verdict,
    }  # fmt: skip


if __name__ == "__main__":
    run(main, options())
