"""Every pair of neighbouring layers made one layer: merged with one alpha, dropped, or with a coefficient per tensor group.

For each j, layers j and j + 1 become one, on plain text (float32); nothing else is changed:
  drop j, drop j+1   the other one stays as it is
  alpha 0.62         W_j <- 0.62 W_j + 0.38 W_j+1 for matrices, norms of layer j: what the published formula comes to
  best alpha         the best of 0, 0.1, ..., 1 on the first batch of the search text (one number needs no more)
  group              one coefficient per tensor group and norm for each of the two layers, trained on the search text
Perplexities are on text of its own (--eval-text). `group - better drop` is nats per token with a 95 % interval over blocks of
128 tokens, against the drop that is better on that very text: negative is better than any drop.

    python benchmarks/pairs.py --model SMOLLM2.gguf --text train.txt --eval-text wiki.test.raw --out pairs.json

Pairs that are in --out already are not done again. Last line of stdout: JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEP = 0.1
ALPHA = 0.05


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True)
    options.add_argument("--text", type=Path, required=True, help="searched on")
    options.add_argument("--eval-text", type=Path, required=True, help="reported")
    options.add_argument("--eval-tokens", type=int, default=4096)
    options.add_argument("--eval-window", type=int, default=1024)
    options.add_argument("--text-tokens", type=int, default=8192)
    options.add_argument("--text-batch", type=int, default=512, help="tokens per gradient step, and in choosing alpha")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--pairs", help="as 3,4,5 (default: all)")
    options.add_argument("--out", type=Path, required=True)
    arguments = options.parse_args()

    import torch

    from eval.load import load_model
    from eval.objective import Part, capture_text, interval, measure, text_nll, text_windows
    from eval.run import plain_text
    from eval.stats import perplexity
    from eval.trial import LayerWeights, Mixture, Tail, plan_tail
    from merge.methods import plan_dropping
    from merge.plan import Step
    from merge.publish import write_whole
    from merge.search import gradient_search
    from merge.source import resolve
    from merge.space import Alphas, Coefficients, RowSpec, groups_of

    checkpoint = resolve(arguments.model).checkpoint()
    lm, _ = load_model(checkpoint, "cpu", "float32")
    tail = Tail(lm)
    total, names = checkpoint.num_hidden_layers, list(checkpoint.layers[0])

    def entering_first(path: Path, tokens: int, window: int, batch: int | None) -> Any:
        windows = text_windows(lm, plain_text(path), [tokens, 0, 0], window)["search"]
        return capture_text(tail, windows, 0, batch_tokens=batch)

    texts = {
        "search": entering_first(arguments.text, arguments.text_tokens, arguments.text_batch, arguments.text_batch),
        "reported": entering_first(arguments.eval_text, arguments.eval_tokens, arguments.eval_window, None),
    }
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    wanted = [int(one) for one in arguments.pairs.split(",")] if arguments.pairs else list(range(total - 1))
    for j in range(total - 1):
        if j:
            with torch.inference_mode(False), torch.no_grad():
                for text in (one for several in texts.values() for one in several):
                    text.states = tail.through(text.states, LayerWeights(j - 1, {}))
        if str(j) in found or j not in wanted:
            continue
        started = time.perf_counter()
        for text in (one for several in texts.values() for one in several):
            text.states.cut = j
        part = Part(None, texts["reported"])

        def reported(layers: list[LayerWeights], part: Part = part) -> Any:
            return measure(tail, layers, part)["text"]

        def dropped(layer: int, j: int = j) -> Any:
            return reported(plan_tail(tail, plan_dropping([layer], total), checkpoint, j))

        values = {f"drop {layer}": dropped(layer) for layer in (j, j + 1)}
        alphas = Alphas([Step(j, j + 1, 0.5)], total, groups_of(names, norms=False))
        one = Mixture(tail, alphas, j)

        def layers_for(alpha: float, alphas: Any = alphas, one: Any = one) -> list[LayerWeights]:
            with torch.no_grad():
                return one.layers(alphas.mixes(torch.tensor([alpha])))  # type: ignore[no-any-return]

        values["alpha 0.62"] = reported(layers_for(0.62))
        with torch.inference_mode():
            tried = {
                round(i * STEP, 2): float(text_nll(tail, layers_for(i * STEP), texts["search"][:1]))
                for i in range(round(1 / STEP) + 1)
            }
        best = min(tried, key=lambda alpha: tried[alpha])
        values["best alpha"] = reported(layers_for(best))
        rows = [RowSpec(i, (i,)) for i in range(j)] + [RowSpec(j, (j, j + 1))] + [RowSpec(i, (i,)) for i in range(j + 2, total)]
        free = Coefficients(rows, total, groups_of(names, norms=True), checkpoint.model_type)
        mixture = Mixture(tail, free, j)

        def loss(x: torch.Tensor, batch: Any, free: Any = free, mixture: Any = mixture) -> torch.Tensor:
            return text_nll(tail, mixture.layers(free.mixes(x)), batch)

        (candidate,) = gradient_search(
            free,
            lambda x: loss(x, texts["search"][:2]),
            steps=arguments.steps,
            refine=1,
            step_loss=lambda x, step: loss(x, [texts["search"][step % len(texts["search"])]]),
        )
        with torch.no_grad():
            values["group"] = reported(mixture.layers(free.mixes(torch.tensor(candidate.x))))
        better = min((f"drop {j}", f"drop {j + 1}"), key=lambda name: values[name].mean())
        found[str(j)] = {
            "perplexity": {name: perplexity(float(one.mean())) for name, one in values.items()},
            "best alpha": best,
            "better drop": better,
            **{
                f"{name} - better drop": interval("text", values[name] - values[better]).to_dict()
                for name in ("alpha 0.62", "best alpha", "group")
            },
            "start": candidate.start,
            "coefficients": dict(zip(free.names, candidate.x, strict=True)),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_whole(arguments.out, json.dumps(found, indent=1))
        shown = "  ".join(f"{name} {value:.2f}" for name, value in found[str(j)]["perplexity"].items())
        change = found[str(j)]["group - better drop"]
        print(
            f"{j:2}  {shown}  best {best}  group {change['value']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]",
            flush=True,
        )
    print(json.dumps(table(found) | {"out": str(arguments.out)}))


def table(found: dict[str, Any]) -> dict[str, Any]:
    """Prints a line for each pair; counts what is better than the better drop after Holm's correction over all pairs."""
    from scipy.stats import t

    from eval.stats import holm

    order = sorted(found, key=int)
    counts: dict[str, Any] = {"pairs": len(order)}
    for name in ("alpha 0.62", "best alpha", "group"):
        changes = [found[j][f"{name} - better drop"] for j in order]
        blocks = [one["count"] // one["block"] for one in changes]
        p = holm(
            [
                2.0 * float(t.sf(abs(one["value"]) / max(one["stderr"], 1e-12), n - 1))
                for one, n in zip(changes, blocks, strict=True)
            ]
        )
        for verdict, sign in (("better", -1.0), ("worse", 1.0)):
            counts[f"{name} {verdict}"] = sum(q < ALPHA and sign * one["value"] > 0 for q, one in zip(p, changes, strict=True))
    for j in order:
        one, change = found[j]["perplexity"], found[j]["group - better drop"]
        cells = [f"{one[name]:.5g}" for name in (f"drop {j}", f"drop {int(j) + 1}", "alpha 0.62")]
        cells += [f"{one['best alpha']:.5g} ({found[j]['best alpha']:g})", f"{one['group']:.5g}"]
        interval = f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        print(f"| {j}<-{int(j) + 1} | " + " | ".join(cells) + f" | {interval} |")
    return counts


if __name__ == "__main__":
    main()
