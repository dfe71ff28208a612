"""How alike a model's layers are, from one pass over calibration texts: a heat map in numbers, and alphas or a plan from it."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, parser, run
from _scoring import add_run_options, check_positive, counter, find_source, load

from eval.errors import DataError
from eval.mmlu import SUBJECTS, read_mmlu
from merge.alphas import Alphas, alphas_to_dict
from merge.plan import plan_to_dict

EXAMPLES = """\
  python scripts/similarity.py --model M --layers 13 --method mka --data-dir MMLU --out alphas/mine.json
  python scripts/similarity.py --model M --layers 8 --method block-influence --text notes.txt --out plan.json"""
METHODS = ("mka", "cka", "angular", "block-influence", "angular-block", "sleb", "released")
SAMPLE_CHARACTERS = 2_000  # of a plain text, per sample


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
        "--text): layers to drop; released: what the public code of MKA computes, which is dropping the last layers",
    )
    what.add_argument("--layers", type=int, required=True, metavar="N", help="layers to remove")
    what.add_argument("--seed", type=int, default=0, help="of the mutual information's tie-breaking (default: 0)")
    data = result.add_argument_group("calibration texts")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="MMLU, of which dev questions are used (default: the Hub)")
    data.add_argument("--per-subject", type=int, default=1, metavar="N", help="dev questions of each subject (default: 1)")
    data.add_argument("--text", type=Path, metavar="FILE", help="a plain text instead, cut into pieces of 2,000 characters")
    data.add_argument("--text-tokens", type=int, default=4096, metavar="N", help="of it for sleb (default: 4096)")
    data.add_argument("--text-window", type=int, default=1024, metavar="N", help="tokens per window for sleb (default: 1024)")
    data.add_argument("--samples", type=int, default=57, metavar="N", help="pieces of it at most (default: 57)")
    add_run_options(result)
    result.add_argument("--out", type=Path, required=True, metavar="FILE", help="alphas file, or plan where layers are dropped")
    result.add_argument("--overwrite", action="store_true", help="replace it")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    check_positive(arguments, "per_subject", "samples", "text_tokens", "text_window")
    if arguments.method == "sleb" and arguments.text is None:
        raise UsageError("--method sleb needs --text FILE")
    if arguments.out.exists() and not arguments.overwrite:
        raise UsageError(f"{arguments.out} exists; give --overwrite, or another --out")
    source = find_source(arguments)
    source.checkpoint()
    subjects = read_mmlu(arguments.data_dir, SUBJECTS) if arguments.text is None else []

    from eval.activations import capture_activations, question_texts
    from eval.results import write_whole
    from eval.run import plain_text
    from merge.similarity import SIMILARITIES, alphas_from_similarity, plan_from_similarity

    if arguments.text is not None:
        text = plain_text(arguments.text)
        texts = [text[i : i + SAMPLE_CHARACTERS] for i in range(0, len(text), SAMPLE_CHARACTERS)][: arguments.samples]
    else:
        texts = question_texts(subjects, arguments.per_subject)
    if not texts:
        raise DataError("there are no calibration texts")
    if arguments.method == "sleb" and not 1 <= arguments.layers < source.checkpoint().num_hidden_layers:
        raise UsageError(f"--layers is {arguments.layers}, expected fewer than the model has")
    lm, _ = load(arguments, source)
    with counter("calibrating", "text", len(texts), arguments.quiet) as bar:
        activations = capture_activations(lm, texts, bar.update)
    plan = (
        _greedy(arguments, lm, text)
        if arguments.method == "sleb"
        else plan_from_similarity(arguments.method, activations, arguments.layers, seed=arguments.seed)
    )
    provenance: dict[str, Any] = {"method": arguments.method, "samples": len(texts), "seed": arguments.seed}
    if arguments.method in SIMILARITIES:
        similarity = SIMILARITIES[arguments.method](activations, arguments.seed)
        alphas, replaced = alphas_from_similarity(similarity, arguments.layers)
        print(_heat(similarity))
        print(f"alphas, lowest layer first: {' '.join(f'{alpha:.4f}' for alpha in alphas)}")
        spread = max(alphas) - min(alphas)
        print(f"they differ by {spread:.4f} in all: what the similarities say hardly enters" if spread < FLAT else "")
        if replaced:
            print(f"{replaced} of them are 0.5, because the similarity is not a number")
        content = alphas_to_dict(Alphas(plan.steps, arguments.out.stem, source.spec, plan.num_hidden_layers, provenance))
    else:
        influence = 1.0 - activations.cosines
        print("block influence by layer: " + " ".join(f"{layer}:{value:.3f}" for layer, value in enumerate(influence)))
        print(f"removed: {sorted(set(range(plan.num_hidden_layers)) - set(plan.keep))}")
        content = plan_to_dict(plan)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out, json.dumps(content, indent=2) + "\n")
    print(json.dumps({"out": str(arguments.out)}))


def _greedy(arguments: argparse.Namespace, lm: Any, text: str) -> Any:
    """The plan that greedy removal finds, with what each step costs."""
    from eval.objective import text_windows
    from eval.search import greedy_removal
    from eval.stats import perplexity
    from eval.trial import Tail
    from merge.methods import plan_dropping

    tail = Tail(lm)
    total = len(tail.layers)
    windows = text_windows(lm, text, [arguments.text_tokens, 0, 0], arguments.text_window)["search"]
    trials = sum(total - step for step in range(arguments.layers))
    with counter("removing", "trial", trials, arguments.quiet) as bar:
        removed = greedy_removal(tail, windows, arguments.layers, bar.update)
    for one in removed:
        print(f"without layer {one.layer:3}: perplexity {perplexity(one.nll):.4g}")
    return plan_dropping([one.layer for one in removed], total)


FLAT = 0.05  # alphas that differ by less are constant for all that they do


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
