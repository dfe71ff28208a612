# PYTHON_ARGCOMPLETE_OK
"""Moves a host's weights towards what a donor of another architecture writes: projected RegMean, which is a baseline."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import CONFIGS, UsageError, parser, publishes, run
from _progress import bars
from _scoring import add_run_options, check_positive, check_run

if TYPE_CHECKING:
    from merge.fusion.projection import HeldOut

EXAMPLES = """\
  python scripts/project.py --host HOST --donor DONOR --text "train/*.txt" --held-out test.txt --out runs/projected
  python scripts/project.py --host HOST --donor DONOR --text a.txt --alpha 0.1 --force --out runs/projected
  python scripts/project.py --host tiny:phi3-mini --donor tiny:gemma2-2b --text README.md --alpha 0.1 --force --out OUT"""
DOCUMENT_BYTES = 2000  # long texts are cut into documents of this size, at line ends


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    models = result.add_argument_group("models")
    models.add_argument("--host", required=True, metavar="ID_OR_DIR", help="keeps its architecture: Llama, Mistral, Phi-3, ...")
    models.add_argument("--donor", required=True, metavar="ID_OR_DIR", help="of any architecture, Gemma 2 among them")
    data = result.add_argument_group("text")
    data.add_argument("--text", required=True, metavar="A,B,...", help="files, patterns or data sets; moments are of it")
    data.add_argument("--held-out", metavar="A,B,...", help="decides on alpha (default: every tenth document of --text)")
    data.add_argument("--documents", type=int, default=200, metavar="N", help="of --text at most (default: %(default)s)")
    data.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of a document (default: %(default)s)")
    step = result.add_argument_group("step")
    step.add_argument("--alpha", type=float, help="write this one (default: the best of --alphas)")
    step.add_argument("--alphas", default="0.05,0.1,0.25", metavar="A,B,...", help="to try (default: %(default)s)")
    step.add_argument("--basis", default="ridge", choices=("ridge", "procrustes"), help="default: ridge")
    step.add_argument("--layers-per-pass", type=int, metavar="N", help="fewer take less memory (default: as many as fit)")
    step.add_argument("--force", action="store_true", help="write it although held-out loss rises")
    add_run_options(result)
    result.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    result.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    return result


def main(arguments: argparse.Namespace) -> int:
    """Reads texts, and prints what comes of the two models."""
    from merge.source import resolve

    check_run(arguments)
    check_positive(arguments, "documents", "max_tokens", "layers_per_pass")
    alphas = read_alphas(arguments)
    texts, held_out = read_texts(arguments)

    from eval.projection_run import project_weights

    publishes(arguments, arguments.out.resolve())
    found = project_weights(
        *(resolve(spec, configs=CONFIGS) for spec in (arguments.host, arguments.donor)), texts, held_out,
        arguments.out.resolve(), alpha=arguments.alpha, alphas=alphas, basis=arguments.basis,
        max_tokens=arguments.max_tokens, layers_per_pass=arguments.layers_per_pass, force=arguments.force,
        overwrite=arguments.overwrite, command=shlex.join(["python", *sys.argv]), dtype=arguments.dtype,
        device=arguments.device, batch_size=arguments.batch_size, matched=lambda report: print(described(report), flush=True),
        measured=print_losses, bars=bars(arguments.quiet),
    )  # fmt: skip
    told = {"alpha": found.alpha, "mean_gap": found.report.mean_gap, "held_out": found.held_out.losses}
    print(json.dumps({"out": str(arguments.out.resolve()), **told}))
    return 0


def read_alphas(arguments: argparse.Namespace) -> list[float]:
    """What is to be tried."""
    try:
        alphas = [float(one) for one in arguments.alphas.split(",")]
    except ValueError as error:
        raise UsageError(f"--alphas is {arguments.alphas!r}; expected numbers such as 0.05,0.1") from error
    for alpha in [*alphas, *([] if arguments.alpha is None else [arguments.alpha])]:
        if not 0 < alpha <= 1:
            raise UsageError(f"alpha is {alpha:g}; expected more than 0 (the host) and up to 1")
    return alphas


def read_texts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(documents for the moments, held-out documents)."""
    from eval.bits import pieces
    from merge.fusion.errors import FusionError
    from merge.fusion.text import read_documents

    texts = pieces(read_documents(arguments.text.split(",")), DOCUMENT_BYTES)
    if arguments.held_out:
        held_out = pieces(read_documents(arguments.held_out.split(",")), DOCUMENT_BYTES)
    else:
        texts, held_out = [text for number, text in enumerate(texts) if number % 10], texts[::10]
    texts = texts[: arguments.documents]
    if not texts:
        raise FusionError(
            f"{arguments.text} is a single document of {DOCUMENT_BYTES} bytes or less, and one is held out; give more text, or "
            "--held-out"
        )
    return texts, held_out[: max(1, arguments.documents // 4)]


def print_losses(held_out: "HeldOut") -> None:
    """Held-out loss by alpha, for a person."""
    for alpha, loss in held_out.losses.items():
        print(f"alpha {alpha:<6g}{loss:.4f} held-out bits per byte{'  (the host)' if not alpha else ''}")


def described(report: Any) -> str:
    """The match of every layer, for a person."""
    lines = [
        f"{'layer':>5}  {'donor layer':>11}  {'CKA':>5}  " + "  ".join(f"gap of {place}" for place in report.layers[0].gaps)
    ]
    for one in report.layers:
        gaps = "  ".join(f"{gap:{len(place) + 7}.3f}" for place, gap in one.gaps.items())
        lines.append(f"{one.layer:>5}  {one.donor_layer:>11}  {one.cka:5.2f}  {gaps}")
    return "\n".join([*lines, f"{report.positions:,} positions; a gap of 0: the same function; 1: as far as writing nothing"])


if __name__ == "__main__":
    run(main, options())
