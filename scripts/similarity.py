# PYTHON_ARGCOMPLETE_OK
"""How alike a model's layers are, from one pass over calibration texts: heat map, and alphas or a plan from it."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, parser, run
from _scoring import (
    add_run_options,
    add_text_options,
    check_positive,
    counter,
    find_source,
    has_text,
    load,
    read_texts,
    removed_greedily,
)

from eval.errors import DataError
from eval.mmlu import SUBJECTS, read_mmlu
from merge.alphas import Alphas, alphas_to_dict
from merge.errors import PlanError
from merge.methods import plan_dropping, plan_from_method
from merge.plan import Plan, plan_to_dict

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
    if not 1 <= arguments.layers < total:
        raise PlanError(f"cannot remove {arguments.layers} of {total} layers; expected 1 to {total - 1}")
    provenance: dict[str, Any] = {"method": arguments.method, "compat": arguments.compat, "seed": arguments.seed}

    if arguments.method.startswith("drop-") or arguments.compat == "released":
        if arguments.compat == "released":
            print("the released code keeps no merged weight: what it computes is the last layers dropped")
        method = "drop-last" if arguments.compat == "released" else arguments.method
        return _write(arguments, source, plan_from_method(method, total, arguments.layers), provenance)
    texts = _texts(arguments)
    if arguments.method == "sleb":
        return _write(arguments, source, _greedy(arguments, load(arguments, source)[0], texts), provenance)
    if arguments.method == "laco":
        return _write(arguments, source, _laco(arguments, load(arguments, source)[0], texts, source), provenance)

    from merge.similarity import SIMILARITIES, alphas_from_similarity, fold_top, plan_from_similarity

    activations = _activations(arguments, source, texts)
    provenance["samples"] = len(texts)
    picture = arguments.out.with_suffix(".png")
    if arguments.method in SIMILARITIES:
        similarity = SIMILARITIES[arguments.method](activations, arguments.seed)
        alphas, replaced = alphas_from_similarity(similarity, arguments.layers)
        plan = fold_top(alphas, total, f"{arguments.method}-{arguments.layers}")
        print(_heat(similarity))
        print(f"alphas, lowest layer first: {' '.join(f'{alpha:.4f}' for alpha in alphas)}")
        spread = max(alphas) - min(alphas)
        if spread < FLAT and len(alphas) > 1:
            print(f"they differ by {spread:.4f} in all: what the similarities say hardly enters")
        if replaced:
            print(f"{replaced} of them are 0.5, because the similarity is not a number")
        if not arguments.no_plots:
            from eval.plots import similarity_map

            similarity_map(picture, similarity, arguments.method)
    else:
        plan = plan_from_similarity(arguments.method, activations, arguments.layers)
        influence = (1.0 - activations.cosines).tolist()
        print("block influence by layer: " + " ".join(f"{layer}:{value:.3f}" for layer, value in enumerate(influence)))
        if not arguments.no_plots:
            from eval.plots import influence_bars

            influence_bars(picture, influence, sorted(set(range(total)) - set(plan.keep)))
    return _write(arguments, source, plan, provenance)


def _texts(arguments: argparse.Namespace) -> list[str]:
    """Calibration texts: questions, or pieces of a text or of a data set's texts; the whole for sleb."""
    if not has_text(arguments):
        from eval.activations import question_texts

        found = question_texts(read_mmlu(arguments.data_dir, SUBJECTS), arguments.per_subject)
    elif arguments.method == "sleb":
        found = ["\n\n".join(read_texts(arguments, TOKEN_CHARACTERS * arguments.text_tokens))]
    else:
        whole = read_texts(arguments, SAMPLE_CHARACTERS * arguments.samples)
        pieces = [text[i : i + SAMPLE_CHARACTERS] for text in whole for i in range(0, len(text), SAMPLE_CHARACTERS)]
        found = [piece for piece in pieces if piece.strip()][: arguments.samples]
    if not found:
        raise DataError("there are no calibration texts")
    return found


def _activations(arguments: argparse.Namespace, source: Any, texts: list[str]) -> Any:
    """What enters every layer."""
    if arguments.stream:
        from eval.streamed import capture_streamed

        checkpoint = source.checkpoint()
        with counter("calibrating", "layer", checkpoint.num_hidden_layers, arguments.quiet) as bar:
            return capture_streamed(checkpoint, texts, arguments.device, arguments.dtype, bar.update)
    from eval.activations import capture_activations

    lm, placement = load(arguments, source)
    if placement.device_map == "auto":
        logging.warning("the model does not fit into memory; --stream reads every layer only once")
    with counter("calibrating", "text", len(texts), arguments.quiet) as bar:
        return capture_activations(lm, texts, bar.update)


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


def _greedy(arguments: argparse.Namespace, lm: Any, texts: list[str]) -> Plan:
    """The plan that greedy removal finds, with what each step costs."""
    from eval.stats import perplexity

    removed = removed_greedily(arguments, lm, texts[0], arguments.layers)
    for one in removed:
        print(f"without layer {one.layer:3}: perplexity {perplexity(one.nll):.4g}")
    return plan_dropping([one.layer for one in removed], len(lm.model.get_decoder().layers))


def _laco(arguments: argparse.Namespace, lm: Any, texts: list[str], source: Any) -> Plan:
    """The plan that windows accepted by LaCo's rule make."""
    from eval.search import Collapse, laco_collapse
    from eval.trial import Tail

    inputs = list(dict.fromkeys(tuple(lm.tok_encode(text)[-lm.max_length :]) for text in texts))
    with counter("collapsing", "window", 0, arguments.quiet) as bar:

        def done(tried: Collapse) -> None:
            bar.update(1)
            verdict = "accepted" if tried.accepted else "refused"
            print(f"layers {tried.first} to {tried.last}: cosine {tried.cosine:.3f}, {verdict}")

        how = {"window": arguments.window, "threshold": arguments.threshold, "interval": arguments.interval}
        plan, _ = laco_collapse(Tail(lm), source.checkpoint(), inputs, arguments.layers, **how, done=done)
    return plan


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
