# PYTHON_ARGCOMPLETE_OK
"""Recomputes what an output's plan says from its source and compares every tensor, bit for bit."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import time
from pathlib import Path

from _cli import add_model_options, find_model, parser, run
from _progress import bar

from merge.report import read_source_record
from merge.verify import verify_folder

EXAMPLES = """\
  python scripts/verify.py merged/Meta-Llama-3-8B-base
  python scripts/verify.py OUT --model DIR                         where the source has moved
  python scripts/verify.py OUT --model org/name --revision REV     against another revision of it"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    result.add_argument("folder", type=Path, metavar="OUT", help="an output of scripts/merge.py")
    add_model_options(result, "the source that the output's report names")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Verifies and prints what was compared."""
    started = time.perf_counter()
    record, _ = read_source_record(arguments.folder)
    if arguments.model in (None, record.spec):
        arguments.revision = arguments.revision or record.revision
    source = find_model(arguments.model or record.spec, arguments)
    found = verify_folder(arguments.folder, source, bar("verifying", arguments.quiet))
    print(
        f"{arguments.folder} is what its plan says: "
        f"{found.num_kept:,} tensors are bit-identical to the source, "
        f"{found.num_mixed:,} recomputed and equal "
        f"({found.bytes_compared / 1e9:.3f} GB in {time.perf_counter() - started:.1f} s)"
    )
    if found.num_shared:
        print(f"{found.num_shared:,} of those lie in the source's own files (--link), so there was nothing to compare")
    if found.mixed_elements:
        share = found.correctly_rounded / found.mixed_elements
        print(
            f"of {found.mixed_elements:,} mixed elements {share:.4%} are the float64 closed form correctly rounded; "
            f"the worst is {found.worst_ulp:.4f} units in the last place away"
        )


if __name__ == "__main__":
    run(main, options())
