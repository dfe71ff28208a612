# PYTHON_ARGCOMPLETE_OK
"""The report of a study again, from what is on disk: one HTML file that needs nothing else."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
from pathlib import Path

from _cli import parser, relative, run

EXAMPLES = """\
  python scripts/report.py runs/study                        writes runs/study/report.html
  python scripts/report.py runs/study --out report.html
  python scripts/report.py runs/study --json                 what the report says, as JSON"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("study", type=Path, metavar="DIR", help="output of scripts/pipeline.py, finished or under way")
    result.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")
    result.add_argument("--json", action="store_true", help="print what the report says as JSON; write nothing")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Writes the report."""
    from eval.pipeline.report import write_report
    from eval.pipeline.summary import read_study, to_json

    study = read_study(arguments.study)
    if arguments.json:
        print(to_json(study))
        return
    print(relative(write_report(study, arguments.out)))


if __name__ == "__main__":
    run(main, options())
