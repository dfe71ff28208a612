# PYTHON_ARGCOMPLETE_OK
"""Moves a host's weights towards what a donor of another architecture writes: projected RegMean, which is a baseline."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import CONFIGS, UsageError, parser, publishes, run
from _scoring import add_run_options, check_positive, check_run, counter

if TYPE_CHECKING:
    from merge.fusion.positions import Align

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
    """Measures both models, finds the step, tries it, and writes what held-out loss allows."""
    from merge.publish import check_target
    from merge.source import resolve

    check_run(arguments)
    check_positive(arguments, "documents", "max_tokens", "layers_per_pass")
    alphas = read_alphas(arguments)
    out = arguments.out.resolve()
    check_target(out, overwrite=arguments.overwrite, marker="projection.json")

    from eval.bits import measure
    from eval.load import load_model
    from merge.fusion.projection import choose_alpha, moment_bytes, passes, project, save

    texts, held_out = read_texts(arguments)
    sources = [resolve(spec, configs=CONFIGS) for spec in (arguments.host, arguments.donor)]
    host, donor = (load_model(one.checkpoint(), arguments.device, arguments.dtype)[0] for one in sources)
    align = aligned(host, donor, arguments.max_tokens)
    each, layers = moment_bytes(host.model), len(host.model.base_model.layers)
    step = arguments.layers_per_pass or min(layers, room_for(each, host.device))
    batch = 8 if arguments.batch_size == "auto" else int(arguments.batch_size)
    logging.info("%d of %d layers at a time, %.1f GB of moments", step, layers, step * each / 1e9)
    positions = sum(len(align([text]).host_positions) for text in texts) * passes(layers, step)
    with counter("positions", "position", positions, arguments.quiet) as bar:
        projection = project(
            host.model, donor.model, texts, align, basis=arguments.basis, batch_size=batch, layers_per_pass=step,
            progress=bar.update,
        )  # fmt: skip
    print(described(projection.report), flush=True)
    measured = choose_alpha(
        host.model,
        projection,
        lambda model: measure(model, host.tokenizer, held_out, batch=batch, device=str(host.device)).per_byte,
        alphas,
    )
    for alpha, loss in measured.losses.items():
        print(f"alpha {alpha:<6g}{loss:.4f} held-out bits per byte{'  (the host)' if not alpha else ''}")
    if arguments.alpha is None and measured.alpha == 0.0:
        from merge.fusion.errors import FusionError

        raise FusionError(
            "no alpha lowers held-out loss, which is what mostly happens without training afterwards; nothing was written "
            f"(--alpha {min(alphas):g} --force would write that one)"
        )
    names = [one.name for one in sources]
    command = shlex.join(["python", *sys.argv])
    publishes(arguments, out)
    alpha = save(
        host.model, projection, measured, out, alpha=arguments.alpha, tokenizer=host.tokenizer, names=names, command=command,
        force=arguments.force, overwrite=arguments.overwrite,
    )  # fmt: skip
    print(json.dumps({"out": str(out), "alpha": alpha, "mean_gap": projection.report.mean_gap, "held_out": measured.losses}))
    return 0


def read_alphas(arguments: argparse.Namespace) -> list[float]:
    """What is to be tried, the alpha that is asked for among them."""
    try:
        alphas = [float(one) for one in arguments.alphas.split(",")]
    except ValueError as error:
        raise UsageError(f"--alphas is {arguments.alphas!r}; expected numbers such as 0.05,0.1") from error
    alphas += [] if arguments.alpha is None else [arguments.alpha]
    for alpha in alphas:
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


def aligned(host: Any, donor: Any, max_tokens: int) -> "Align":
    """Which positions of both models are compared: all but that of the token that begins a text."""
    from merge.fusion.byte_tables import ByteTable, text_encoder
    from merge.fusion.positions import mapped_tokens, same_tokens
    from merge.fusion.vocabulary import same_tokenizer, vocabulary_map

    begin = [host.tokenizer.bos_token_id] if host.tokenizer.bos_token_id is not None else []

    def encode(texts: Any) -> Any:
        return [begin + ids for ids in plain(texts)]

    if same_tokenizer(host.tokenizer, donor.tokenizer):

        def plain(texts: Any) -> Any:
            return host.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

        return same_tokens(encode, max_tokens, skip=len(begin))
    tables = [ByteTable.from_tokenizer(one.tokenizer, one.model.config.get_text_config().vocab_size) for one in (host, donor)]
    plain = text_encoder(host.tokenizer, tables[0])
    table = vocabulary_map(*tables, text_encoder(donor.tokenizer, tables[1]))
    return mapped_tokens(encode, table, max_tokens, skip=len(begin))


def room_for(each: int, device: Any) -> int:
    """How many layers' moments a third of the device's free memory has room for."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, int(free / 3 // each))


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
