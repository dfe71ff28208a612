"""Searches alphas, or coefficients per tensor group, on cached hidden states: a trial costs a fraction of an evaluation."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import csv
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from _cli import UsageError, add_model_options, parser, run
from _scoring import add_run_options, check_positive, counter, find_source, load

from eval.errors import DataError
from eval.mmlu import ARCHIVE_NAMES, GROUPS, read_mmlu
from merge.alphas import Alphas as AlphasFile
from merge.alphas import alphas_to_dict, read_alphas
from merge.errors import PlanError
from merge.methods import plan_dropping, plan_from_method
from merge.plan import Plan, chain, plan_to_dict

METHOD_CHOICES = ("gradient", "gp", "tpe")
TARGET_CHOICES = ("kl+text", "kl", "ce", "text", "ce+text", "acc")
# What may differ between the workers of a study, and between a run and the one that resumes it.
NOT_SETTINGS = (
    "storage",
    "resume",
    "trials",
    "out",
    "device",
    "batch_size",
    "verbose",
    "quiet",
    "steps",
    "refine",
    "learning_rate",
)
EXAMPLES = """\
  python scripts/search_alphas.py --model M --alphas alphas/base.json --data-dir MMLU --text train.txt --out found
  python scripts/search_alphas.py --model M --layers 8 --space coefficients --data-dir MMLU --text train.txt
  python scripts/search_alphas.py --model M --layers 8 --method gp --trials 200 --storage sqlite:///search.db --resume
  python scripts/search_alphas.py --model M --remove 3,4,5,12 --space coefficients --target text --text train.txt"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_model_options(result, "none")
    what = result.add_argument_group("what is merged (one of)")
    what.add_argument("--alphas", type=Path, metavar="FILE", help="the steps of an alphas file; its alphas are one start")
    what.add_argument("--layers", type=int, metavar="N", help="fold the top N + 1 layers into one")
    what.add_argument("--remove", metavar="A,B,...", help="remove these layers; each kept layer may mix in those above it")
    how = result.add_argument_group("search")
    how.add_argument("--space", choices=("alphas", "coefficients"), help="default: alphas, with --remove coefficients")
    how.add_argument("--no-norms", action="store_true", help="coefficients for matrices only")
    how.add_argument("--method", choices=METHOD_CHOICES, default="gradient", help="default: gradient")
    how.add_argument("--target", choices=TARGET_CHOICES, default="kl+text", help="what is minimised (default: kl+text)")
    how.add_argument("--text-weight", type=float, default=0.2, metavar="W", help="of text in sums (default: 0.2)")
    how.add_argument("--max-perplexity", type=float, metavar="X", help="only plans whose text perplexity stays below X")
    how.add_argument("--objective", default="average", help="average (all subjects), a group such as stem, or a subject")
    how.add_argument("--steps", type=int, default=80, metavar="N", help="gradient steps from each start (default: 80)")
    how.add_argument("--refine", type=int, default=3, metavar="N", help="starts that gradients go on from (default: 3)")
    how.add_argument("--learning-rate", type=float, default=0.03, metavar="X", help="default: 0.03")
    how.add_argument("--trials", type=int, default=100, metavar="N", help="complete trials of gp or tpe (default: 100)")
    how.add_argument(
        "--storage", metavar="URL", help="sqlite:///FILE, postgresql://..., or FILE.log; several workers may share it"
    )
    how.add_argument("--name", default="search", help="of the study in the storage (default: search)")
    how.add_argument("--resume", action="store_true", help="go on with the study of that name, or join it")
    how.add_argument("--seed", type=int, default=0, help="of the split and of the search (default: 0)")
    data = result.add_argument_group("questions and text")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="MMLU as CSVs or parquet (default: the Hub)")
    data.add_argument(
        "--split", choices=tuple(ARCHIVE_NAMES), default="validation", help="questions to search on (default: validation)"
    )
    data.add_argument("--num-fewshot", type=int, default=5, metavar="K", help="default: 5")
    data.add_argument("--limit", type=int, metavar="N", help="questions per subject")
    data.add_argument("--text", type=Path, metavar="FILE", help="plain text: of no text that is reported elsewhere")
    data.add_argument(
        "--text-tokens", type=int, default=4096, metavar="N", help="of it for the search, and half as many for each check"
    )
    data.add_argument("--text-window", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    add_run_options(result)
    result.add_argument("--out", type=Path, default=Path("found"), metavar="DIR", help="folder for results (default: found)")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Searches, selects, reports and writes."""
    if sum(x is not None for x in (arguments.alphas, arguments.layers, arguments.remove)) != 1:
        raise UsageError("give one of --alphas, --layers and --remove")
    wants_text, wants_questions = "text" in arguments.target, arguments.target != "text"
    if (wants_text or arguments.max_perplexity) and arguments.text is None:
        raise UsageError(f"--target {arguments.target} and --max-perplexity need --text FILE")
    if arguments.target == "acc" and arguments.method == "gradient":
        raise UsageError("accuracy has no gradient; use --method gp or tpe, or another --target")
    check_positive(arguments, "steps", "refine", "trials", "limit", "num_fewshot", "text_tokens", "text_window")
    source = find_source(arguments)
    checkpoint = source.checkpoint()
    layers = checkpoint.num_hidden_layers
    start = _start(arguments, layers)
    subjects = read_mmlu(arguments.data_dir, _subjects(arguments.objective), arguments.split) if wants_questions else []

    from eval.run import plain_text
    from eval.search import Problem, make_problem
    from merge.space import Alphas, Coefficients, Space, effective_dimensions, groups_of, windows

    text = plain_text(arguments.text) if arguments.text else None
    lm, placement = load(arguments, source)
    names = list(checkpoint.layers[0])
    space: Space
    if (arguments.space or ("coefficients" if arguments.remove else "alphas")) == "alphas":
        if not start.steps:
            raise UsageError("--remove says which layers go but not into which; use --space coefficients")
        space = Alphas(start.steps, layers, groups_of(names, norms=False))
        logging.warning(
            "%d alphas, of which about %.1f matter at the start (effective dimensions)",
            len(start.steps), effective_dimensions(start.steps, layers),
        )  # fmt: skip
    else:
        rows = windows(start)
        if start.steps:  # the same layers as the alphas may mix
            rows = Alphas(start.steps, layers, ()).rows
        space = Coefficients(rows, layers, groups_of(names, norms=not arguments.no_norms), checkpoint.model_type)
    if not space.names:
        raise PlanError("nothing is removed, so there is nothing to search")

    started = time.perf_counter()
    with counter("running the model once", "token", 0, arguments.quiet) as bar:
        problem: Problem = make_problem(
            lm, space, subjects, text,
            num_fewshot=arguments.num_fewshot, limit=arguments.limit, seed=arguments.seed,
            text_tokens=arguments.text_tokens if text else 0, text_window=arguments.text_window, done=bar.update,
        )  # fmt: skip
    weights = problem.weights(arguments.target, arguments.text_weight)
    captured = time.perf_counter() - started
    logging.info("hidden states of %s tokens, %.2f GB", f"{problem.num_tokens:,}", problem.nbytes / 1e9)

    candidates, evaluations, seconds = _search(arguments, space, problem, weights, start)
    if not candidates:
        raise DataError("no trial met the limit; raise --max-perplexity or search longer")

    baselines = {"original": None, "start": start if start.steps else None, "dropped": start.dropped()}
    baselines["drop-last"] = plan_from_method("drop-last", layers, layers - len(start.rows))
    selected = min(candidates, key=lambda one: problem.value(problem.tail_of(space, one.x), "selection", weights))
    plan = space.plan(selected.x, arguments.out.name)
    report: dict[str, Any] = {
        "model": source.spec, "target": arguments.target, "weights": weights, "objective": arguments.objective,
        "method": arguments.method, "space": type(space).__name__.lower(), "parameters": len(space.names),
        "seed": arguments.seed,
        "split": arguments.split if wants_questions else None, "dtype": placement.dtype, "device": placement.device,
        "start_of_winner": selected.start, "loss": selected.loss, "evaluations": evaluations,
        "capture_s": round(captured, 2), "search_s": round(seconds, 2), "tokens_cached": problem.num_tokens,
        "scores": {},
    }  # fmt: skip
    for name, one in {**baselines, "found": plan}.items():
        if name == "original" or one is not None:
            report["scores"][name] = {part: problem.scores(one, checkpoint, part) for part in problem.parts}
    _write(arguments, source, plan, space, selected, candidates, report)
    print(_table(report))
    print(json.dumps({"out": str(arguments.out), "found": report["scores"]["found"]["held-out"]}))


def _search(
    arguments: argparse.Namespace, space: Any, problem: Any, weights: dict[str, float], start: Plan
) -> tuple[list[Any], int, float]:
    """(candidates, evaluations, seconds)."""
    import torch

    from merge.search import gradient_search, open_study, study_search

    limit = math.log(arguments.max_perplexity) if arguments.max_perplexity else None
    started, count = time.perf_counter(), [0]
    total = (
        len(space.starts()) + arguments.refine * (arguments.steps + 1) if arguments.method == "gradient" else arguments.trials
    )
    with counter("searching", "trial", total, arguments.quiet) as bar:

        def progress(value: float) -> None:
            count[0] += 1
            bar.set_postfix_str(f"loss {value:.4f}")
            bar.update(1)

        if arguments.method == "gradient":
            extra = (
                {"the file's alphas": torch.tensor([step.alpha for step in start.steps])}
                if len(space.names) == len(start.steps)
                else {}
            )
            found = gradient_search(
                space,
                lambda x: problem.loss(space, x, weights, limit),
                steps=arguments.steps,
                refine=arguments.refine,
                learning_rate=arguments.learning_rate,
                extra_starts=extra,
                progress=progress,
            )
            if limit is not None:
                found = [one for one in found if problem.text_nll(problem.tail_of(space, one.x), "search") <= limit]
        else:
            settings = {key: str(value) for key, value in vars(arguments).items() if key not in NOT_SETTINGS}
            study = open_study(arguments.storage, arguments.name, settings, resume=arguments.resume)
            found = study_search(
                space, lambda x: problem.limited(space, x, weights, limit), study,
                method=arguments.method, trials=arguments.trials, seed=arguments.seed, progress=progress,
            )  # fmt: skip
    return found, count[0], time.perf_counter() - started


def _start(arguments: argparse.Namespace, layers: int) -> Plan:
    """The plan that says which layers go; with steps where alphas are known."""
    if arguments.alphas is not None:
        from merge.alphas import plan_from_alphas

        return plan_from_alphas(read_alphas(arguments.alphas), layers)
    if arguments.layers is not None:
        if not 1 <= arguments.layers < layers:
            raise PlanError(f"cannot remove {arguments.layers} of {layers} layers; expected 1 to {layers - 1}")
        from merge.plan import compose

        steps = chain([0.5] * arguments.layers, layers)
        return Plan(compose(steps, layers), layers, name=f"top-{arguments.layers}", method="alphas", steps=steps)
    try:
        removed = [int(one) for one in arguments.remove.split(",")]
    except ValueError as error:
        raise UsageError(f"--remove is {arguments.remove!r}, expected layer numbers such as 3,4,12") from error
    return plan_dropping(removed, layers)


def _subjects(objective: str) -> list[str]:
    if objective == "average":
        return []
    return list(GROUPS.get(objective, (objective,)))


def _write(
    arguments: argparse.Namespace,
    source: Any,
    plan: Plan,
    space: Any,
    selected: Any,
    candidates: list[Any],
    report: dict[str, Any],
) -> None:
    """plan.json, alphas.json where there are alphas, search.json, trials.csv."""
    from eval.results import write_whole

    arguments.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        write_whole(arguments.out / name, text)

    write("plan.json", json.dumps(plan_to_dict(plan), indent=2) + "\n")
    if plan.steps:
        provenance = {key: report[key] for key in ("target", "objective", "method", "seed", "split", "evaluations", "loss")}
        provenance |= {"scores": report["scores"]["found"]}
        found = AlphasFile(plan.steps, plan.name, source.spec, plan.num_hidden_layers, provenance)
        write("alphas.json", json.dumps(alphas_to_dict(found), indent=2) + "\n")
    write("search.json", json.dumps(report, indent=2) + "\n")
    with (arguments.out / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["candidate", "start", "loss", *space.names])
        for number, one in enumerate(candidates):
            writer.writerow([number, one.start, one.loss, *one.x])


def _table(report: dict[str, Any]) -> str:
    """Parts by plans, and what may be said."""
    lines = [
        f"{report['method']} over {report['parameters']} {report['space']}, target {report['target']}: {report['evaluations']} "
        f"trials in {report['search_s']:.1f} s after one run of the model ({report['capture_s']:.1f} s); "
        f"from {report['start_of_winner']!r}"
    ]
    header = f"{'':12}{'part':12}{'kl':>18}{'ce':>18}{'accuracy':>18}{'agreement':>18}{'perplexity':>14}"
    lines.append(header)
    for name, parts in report["scores"].items():
        for part, one in parts.items():
            cells = [
                f"{one[key]:.4f} +- {one[f'{key}_stderr'] or 0:.4f}" if key in one else ""
                for key in ("kl", "ce", "acc", "agreement")
            ]
            text = f"{one['perplexity']:.4g}" if "perplexity" in one else ""
            lines.append(f"{name:12}{part:12}" + "".join(f"{cell:>18}" for cell in cells) + f"{text:>14}")
    lines.append(_verdict(report))
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> str:
    """Whether what was found is better than dropping, on questions and text that nothing was tuned on."""
    found, dropped = report["scores"]["found"]["held-out"], report["scores"]["dropped"]["held-out"]
    said = []
    for key in ("kl", "ce"):
        if key in report["weights"] and key in found:
            error = math.hypot(found[f"{key}_stderr"] or 0.0, dropped[f"{key}_stderr"] or 0.0)
            better = found[key] + 1.96 * error < dropped[key]
            said.append(f"{key} {found[key]:.4f} against {dropped[key]:.4f}" + ("" if better else " (no difference shown)"))
    if "perplexity" in found:
        said.append(f"perplexity {found['perplexity']:.4g} against {dropped['perplexity']:.4g}")
    return "held out, found against the same layers dropped: " + ", ".join(said)


if __name__ == "__main__":
    run(main, options(), "stopped; a study in a --storage keeps its trials: --resume goes on")
