# PYTHON_ARGCOMPLETE_OK
"""How alike a model's layers are, from one pass over calibration texts: heat map, and alphas or a plan from it."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import UsageError, add_model_options, parser, run
from _progress import bars
from _scoring import add_run_options, add_text_options, check_positive, find_source, has_text, read_texts

from eval.mmlu import SUBJECTS, read_mmlu
from merge.alphas import Alphas, alphas_to_dict
from merge.methods import check_count, plan_from_method
from merge.plan import Plan, plan_to_dict

if TYPE_CHECKING:
    from eval.search import Collapse
    from eval.similarity_run import Similarity

EXAMPLES = """\
  python scripts/similarity.py --model M --layers 13 --method mka --data-dir MMLU --out alphas/mine.json
  python scripts/similarity.py --model M --layers 8 --method block-influence --text notes.txt --out plan.json
  python scripts/similarity.py --model M --layers 8 --method sleb --dataset NAME --out plan.json"""
FROM_ACTIVATIONS = ("mka", "cka", "angular", "block-influence", "angular-block")
METHODS = (*FROM_ACTIVATIONS, "sleb", "laco", "drop-last", "drop-keep-last")
SAMPLE_CHARACTERS = 2_000  # of a plain text, per sample
TOKEN_CHARACTERS = 20  # of a data set for every token of --text-tokens: ample
FLAT = 0.05  # alphas that differ by less are constant for all that they do


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_model_options(result, "none")
    what = result.add_argument_group("method")
    what.add_argument(
        "--method",
        choices=METHODS,
        default="mka",
        help="mka, cka, angular: similarity, for alphas; block-influence, angular-block, sleb (greedily, by the perplexity of "
        "--text), drop-last, drop-keep-last: layers to drop; laco: windows that become one layer",
    )
    what.add_argument(
        "--compat",
        choices=("intended", "released"),
        default="intended",
        help="of mka: what its paper intends (default), or what its public code computes, which is dropping the last layers",
    )
    what.add_argument("--layers", type=int, required=True, metavar="N", help="layers to remove")
    what.add_argument("--seed", type=int, default=0, help="of the mutual information's tie-breaking (default: 0)")
    what.add_argument("--window", type=int, default=7, metavar="N", help="layers that laco makes one (default: 7)")
    what.add_argument(
        "--threshold", type=float, default=0.45, metavar="X", help="cosine above which laco accepts (default: 0.45)"
    )
    what.add_argument("--interval", type=int, default=1, metavar="N", help="layers that laco goes down by (default: 1)")
    data = result.add_argument_group("calibration texts")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="MMLU, of which dev questions are used (default: the Hub)")
    data.add_argument("--per-subject", type=int, default=1, metavar="N", help="dev questions of each subject (default: 1)")
    add_text_options(data, "a plain text in place of questions, cut into pieces of 2,000 characters")
    data.add_argument("--text-tokens", type=int, default=4096, metavar="N", help="of it for sleb (default: 4096)")
    data.add_argument("--text-window", type=int, default=1024, metavar="N", help="tokens per window for sleb (default: 1024)")
    data.add_argument("--samples", type=int, default=57, metavar="N", help="pieces of it at most (default: 57)")
    data.add_argument("--stream", action="store_true", help="one layer at a time, for a model larger than memory")
    add_run_options(result)
    result.add_argument("--out", type=Path, required=True, metavar="FILE", help="alphas file, or plan where layers are dropped")
    result.add_argument("--overwrite", action="store_true", help="replace it")
    result.add_argument("--no-plots", action="store_true", help="no picture beside it")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    check_positive(arguments, "per_subject", "samples", "text_tokens", "text_window", "interval")
    if arguments.method == "sleb" and not has_text(arguments):
        raise UsageError("--method sleb needs --text FILE or --dataset NAME")
    if arguments.stream and arguments.method not in FROM_ACTIVATIONS:
        raise UsageError(f"--stream is for {', '.join(FROM_ACTIVATIONS)}; {arguments.method} runs the whole model many times")
    if arguments.compat == "released" and arguments.method != "mka":
        raise UsageError("--compat is for --method mka")
    if arguments.window < 2:
        raise UsageError(f"--window is {arguments.window}, expected at least 2")
    pictures = [] if arguments.no_plots else [arguments.out.with_suffix(".png"), arguments.out.with_suffix(".csv")]
    for path in (arguments.out, *pictures):
        if path.exists() and not arguments.overwrite:
            raise UsageError(f"{path} exists; give --overwrite, or another --out")
    source = find_source(arguments)
    total = source.checkpoint().num_hidden_layers
    check_count(arguments.layers, total)
    provenance: dict[str, Any] = {"method": arguments.method, "compat": arguments.compat, "seed": arguments.seed}
    if arguments.method.startswith("drop-") or arguments.compat == "released":
        if arguments.compat == "released":
            print("the released code keeps no merged weight: what it computes is the last layers dropped")
        method = "drop-last" if arguments.compat == "released" else arguments.method
        return _write(arguments, source, plan_from_method(method, total, arguments.layers), provenance)
    texts = _texts(arguments)

    from eval.similarity_run import measure_similarity

    found = measure_similarity(
        source, arguments.layers, texts, method=arguments.method, seed=arguments.seed,
        window=arguments.window, threshold=arguments.threshold, interval=arguments.interval,
        text_tokens=arguments.text_tokens, text_window=arguments.text_window, stream=arguments.stream,
        dtype=arguments.dtype, device=arguments.device, batch_size=arguments.batch_size,
        tried=_print_collapse, bars=bars(arguments.quiet),
    )  # fmt: skip
    if found.alphas or found.influence:
        provenance["samples"] = len(texts)
    _show(arguments, found)
    return _write(arguments, source, found.plan, provenance)


def _show(arguments: argparse.Namespace, found: "Similarity") -> None:
    """What was measured, as text and as a picture."""
    picture, plan = arguments.out.with_suffix(".png"), found.plan
    if found.similarity is not None:
        print(_heat(found.similarity))
        print(f"alphas, lowest layer first: {' '.join(f'{alpha:.4f}' for alpha in found.alphas)}")
        spread = max(found.alphas) - min(found.alphas)
        if spread < FLAT and len(found.alphas) > 1:
            print(f"they differ by {spread:.4f} in all: what the similarities say hardly enters")
        if found.replaced:
            print(f"{found.replaced} of them are 0.5, because the similarity is not a number")
        if not arguments.no_plots:
            from eval.plots import similarity_map

            similarity_map(picture, found.similarity, arguments.method)
    if found.influence:
        print("block influence by layer: " + " ".join(f"{layer}:{value:.3f}" for layer, value in enumerate(found.influence)))
        if not arguments.no_plots:
            from eval.plots import influence_bars

            influence_bars(picture, list(found.influence), sorted(set(range(plan.num_hidden_layers)) - set(plan.keep)))
    if found.removed:
        from eval.stats import perplexity

        for one in found.removed:
            print(f"without layer {one.layer:3}: perplexity {perplexity(one.nll):.4g}")


def _print_collapse(tried: "Collapse") -> None:
    verdict = "accepted" if tried.accepted else "refused"
    print(f"layers {tried.first} to {tried.last}: cosine {tried.cosine:.3f}, {verdict}")


def _texts(arguments: argparse.Namespace) -> list[str]:
    """Calibration texts: questions, or pieces of a text or of a data set's texts; the whole for sleb."""
    if not has_text(arguments):
        from eval.activations import question_texts

        return question_texts(read_mmlu(arguments.data_dir, SUBJECTS), arguments.per_subject)
    if arguments.method == "sleb":
        return read_texts(arguments, TOKEN_CHARACTERS * arguments.text_tokens)
    whole = read_texts(arguments, SAMPLE_CHARACTERS * arguments.samples)
    pieces = [text[i : i + SAMPLE_CHARACTERS] for text in whole for i in range(0, len(text), SAMPLE_CHARACTERS)]
    return [piece for piece in pieces if piece.strip()][: arguments.samples]


def _write(arguments: argparse.Namespace, source: Any, plan: Plan, provenance: dict[str, Any]) -> None:
    """The alphas, or the plan where layers are dropped."""
    from merge.publish import write_whole

    if plan.steps:
        found = Alphas(plan.steps, arguments.out.stem, source.spec, plan.num_hidden_layers, provenance)
        content = alphas_to_dict(found)
    else:
        if all(row.is_unit for row in plan.rows):
            print(f"removed: {sorted(set(range(plan.num_hidden_layers)) - set(plan.keep))}")
        content = plan_to_dict(plan)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out, json.dumps(content, indent=2) + "\n")
    print(json.dumps({"out": str(arguments.out)}))


def _heat(similarity: Any) -> str:
    """The matrix in ten shades, one character for each pair of layers; `?` where it is not a number."""
    import numpy as np

    low, high = np.nanmin(similarity), np.nanmax(similarity)
    shades = " .:-=+*#%@"
    rows = [
        "".join("?" if not np.isfinite(v) else shades[int((len(shades) - 1) * (v - low) / max(high - low, 1e-12))] for v in row)
        for row in similarity
    ]
    return "\n".join([f"similarity of layer inputs, from {low:.3f} (blank) to {high:.3f} (@)", *rows])


if __name__ == "__main__":
    run(main, options())
