# PYTHON_ARGCOMPLETE_OK
"""Draws the figures of an arithmetic study again from what is on disk, and prints its table."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
from pathlib import Path

from _cli import UsageError, parser, run
from arithmetic import PUBLISHED, add_study_options, find_study

EXAMPLES = """\
  python scripts/plot_arithmetic.py runs/arithmetic
  python scripts/plot_arithmetic.py runs/arithmetic --log-x
  python scripts/plot_arithmetic.py runs/arithmetic --runs baseline,feature-fusion-basic --datasets x_div_y"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("out", type=Path, metavar="DIR", help="what scripts/arithmetic.py wrote")
    add_study_options(result)
    result.add_argument("--log-x", action="store_true", help="updates on a logarithmic axis")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Reads, draws, prints."""
    from eval.arithmetic.report import read_published, table
    from eval.arithmetic.run import draw_arithmetic

    if not arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is no folder; expected one that scripts/arithmetic.py wrote")
    study = find_study(arguments)
    whole = arguments.runs is None and arguments.datasets is None  # a page of a part would hide the rest
    published = read_published(PUBLISHED)
    rows, paths = draw_arithmetic(study, arguments.out, published=published, log_x=arguments.log_x, with_page=whole)
    if not rows:
        raise UsageError(f"{arguments.out} holds no result of these runs; expected RUN/DATASET_SEED/result.json")
    print(table(study, rows))
    print(f"{len(paths)} figures" + (f" and {arguments.out / 'index.html'}" if whole else ""))


if __name__ == "__main__":
    run(main, options(), "stopped; figures that are there are whole")
