# PYTHON_ARGCOMPLETE_OK
"""Searches alphas, or coefficients per tensor group, on cached hidden states: a trial costs a fraction of an evaluation."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
import logging
import math
import time
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

from eval.errors import DataError, TrialError
from eval.mmlu import ARCHIVE_NAMES, GROUPS, SUBJECTS, read_mmlu
from merge.alphas import Alphas as AlphasFile
from merge.alphas import alphas_to_dict, plan_from_alphas, read_alphas
from merge.errors import PlanError
from merge.methods import plan_dropping, plan_from_method
from merge.plan import Plan, read_plan
from merge.similarity import fold_top

METHOD_CHOICES = ("gradient", "gp", "tpe")
TARGET_CHOICES = ("kl+text", "kl", "ce", "text", "ce+text", "acc")
TOKEN_CHARACTERS = 20  # of a data set for every token of --text-tokens, which is half of what is needed: ample
TEXT_OBJECTIVES = ("nll", "perplexity")
# What may differ between the workers of a study, and between a run and the one that resumes it.
NOT_SETTINGS = (
    *("storage", "resume", "trials", "out", "overwrite", "device", "batch_size", "verbose", "quiet", "steps", "refine"),
    *("learning_rate", "start", "states", "control", "no_others", "slices", "no_plots"),
)
EXAMPLES = """\
  python scripts/search_alphas.py --model M --alphas alphas/base.json --data-dir MMLU --text train.txt --out found
  python scripts/search_alphas.py --model M --layers 8 --space coefficients --data-dir MMLU --text train.txt
  python scripts/search_alphas.py --model M --layers 8 --method gp --target kl --storage sqlite:///search.db --resume
  python scripts/search_alphas.py --model M --greedy 8 --objective perplexity --text train.txt"""


def options() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", EXAMPLES)
    add_model_options(result, "none")
    what = result.add_argument_group("what is merged (one of)")
    what.add_argument("--alphas", type=Path, metavar="FILE", help="the steps of an alphas file; its alphas are one start")
    what.add_argument("--layers", type=int, metavar="N", help="fold the top N + 1 layers into one")
    what.add_argument("--remove", metavar="A,B,...", help="remove these layers; each kept layer may mix in those above it")
    what.add_argument("--greedy", type=int, metavar="N", help="the same with N layers chosen greedily by --text first (SLEB)")
    how = result.add_argument_group("search")
    how.add_argument("--space", choices=("alphas", "coefficients"), help="default: alphas; else coefficients")
    how.add_argument("--scale-kept", action="store_true", help="coefficients also for kept layers with nothing to mix in")
    how.add_argument("--no-norms", action="store_true", help="coefficients for matrices only")
    how.add_argument("--method", choices=METHOD_CHOICES, default="gradient", help="default: gradient")
    how.add_argument("--target", choices=TARGET_CHOICES, help="what is minimised (default: kl+text; text for nll, perplexity)")
    how.add_argument("--text-weight", type=float, default=0.2, metavar="W", help="of text in sums (default: 0.2)")
    how.add_argument("--max-perplexity", type=float, metavar="X", help="only plans whose text perplexity stays below X")
    how.add_argument(
        "--objective", default="average", help="average (all subjects), a group such as stem, a subject, nll or perplexity"
    )
    how.add_argument("--steps", type=int, default=80, metavar="N", help="gradient steps from each start (default: 80)")
    how.add_argument("--refine", type=int, default=3, metavar="N", help="starts that gradients go on from (default: 3)")
    how.add_argument("--start", default="", metavar="TEXT", help="only starts with this in their name (default: all)")
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
    add_text_options(data, "plain text: of no text that is reported elsewhere")
    data.add_argument(
        "--text-tokens", type=int, default=4096, metavar="N", help="of it for the search, and half as many for each check"
    )
    data.add_argument("--text-window", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    data.add_argument("--text-batch", type=int, metavar="N", help="tokens of it per gradient step (default: all)")
    data.add_argument("--states", type=Path, metavar="DIR", help="keep the hidden states there, and read what is there already")
    add_run_options(result)
    out = result.add_argument_group("results")
    out.add_argument("--out", type=Path, default=Path("found"), metavar="DIR", help="folder for results (default: found)")
    out.add_argument("--overwrite", action="store_true", help="replace the results in it")
    out.add_argument("--control", type=Path, action="append", default=[], metavar="PLAN", help="a plan to report beside, too")
    out.add_argument("--no-others", action="store_true", help="do not ask the subjects that the objective is not about")
    out.add_argument("--slices", type=int, default=8, metavar="N", help="parameters to draw the loss along (default: 8)")
    out.add_argument("--no-plots", action="store_true", help="numbers only")
    return result


def main(arguments: argparse.Namespace) -> None:
    """Searches, selects, reports and writes."""
    _check_usage(arguments)
    wants_questions = arguments.target != "text"
    source = find_source(arguments)
    checkpoint = source.checkpoint()
    controls = _controls(arguments.control, checkpoint)
    subjects, others = [], []
    if wants_questions:
        wanted = _subjects(arguments.objective)
        subjects = read_mmlu(arguments.data_dir, wanted, arguments.split)
        if wanted and not arguments.no_others:
            rest = [name for name in SUBJECTS if name not in wanted]
            try:
                others = read_mmlu(arguments.data_dir, rest, arguments.split)
            except DataError as error:
                raise DataError(f"{error}; give --no-others to leave out what the search does to other subjects") from error
    start = None if arguments.greedy else _start(arguments, checkpoint.num_hidden_layers)
    study = None
    if arguments.method != "gradient":  # a study that cannot be gone on with is refused before the model is run
        from merge.search import open_study

        study = open_study(arguments.storage, arguments.name, _settings(arguments), resume=arguments.resume)

    from eval.search import make_problem
    from eval.search_report import others_line, summary, table, verdict

    text = "\n\n".join(read_texts(arguments, TOKEN_CHARACTERS * arguments.text_tokens)) if has_text(arguments) else None
    lm, placement = load(arguments, source)
    if start is None:
        assert text is not None  # _check_usage saw to it
        start = _greedy(arguments, lm, text, checkpoint.num_hidden_layers)
    space = _space(arguments, start, checkpoint)

    started = time.perf_counter()
    with counter("running the model once", "token", 0, arguments.quiet) as bar:
        problem = make_problem(
            lm, space, subjects, text,
            num_fewshot=arguments.num_fewshot, limit=arguments.limit, seed=arguments.seed,
            text_tokens=arguments.text_tokens if text else 0, text_window=arguments.text_window,
            text_batch=arguments.text_batch, others=others, folder=arguments.states, done=bar.update,
        )  # fmt: skip
    weights = problem.weights(arguments.target, arguments.text_weight)
    captured = time.perf_counter() - started
    logging.info("hidden states of %s tokens, %.2f GB", f"{problem.num_tokens:,}", problem.nbytes / 1e9)

    started = time.perf_counter()
    settings = _settings(arguments) | {"run in": placement.dtype, "parameters": " ".join(space.names)}
    candidates, trials, new = _search(arguments, space, problem, weights, start, study, settings)
    searched = time.perf_counter() - started
    if not candidates:
        raise DataError("no trial met the limit; raise --max-perplexity or search longer")
    selected = min(candidates, key=lambda one: problem.value(problem.tail_of(space, one.x), "selection", weights))
    plan = space.plan(selected.x, arguments.out.name)

    plans: dict[str, Plan | None] = {"original": None}
    if start.steps:
        plans["start"] = start
    plans |= {"dropped": start.dropped()}
    plans["drop-last"] = plan_from_method("drop-last", start.num_hidden_layers, start.num_hidden_layers - len(start.rows))
    plans |= {**controls, "found": plan}
    _write_plan(arguments, plan, space, trials)  # before anything else can go wrong
    measured = {}
    for name, one in plans.items():
        try:
            measured[name] = {part: problem.measure(one, checkpoint, part) for part in problem.parts}
        except TrialError as error:
            logging.warning("%s is left out: %s", name, error)
    report: dict[str, Any] = {
        "model": source.spec, "target": arguments.target, "weights": weights, "objective": arguments.objective,
        "method": arguments.method, "space": type(space).__name__.lower(), "parameters": len(space.names),
        "seed": arguments.seed, "max_perplexity": arguments.max_perplexity,
        "split": arguments.split if wants_questions else None, "dtype": placement.dtype, "device": placement.device,
        "start_of_winner": selected.start, "loss": selected.loss, "evaluations": new, "trials": len(trials),
        "capture_s": round(captured, 2), "search_s": round(searched, 2), "tokens_cached": problem.num_tokens,
        "bytes_cached": problem.nbytes, **summary(measured), "verdict": verdict(measured, list(weights)),
    }  # fmt: skip
    _write(arguments, source, plan, report)
    if not arguments.no_plots:
        _draw(arguments, space, problem, weights, selected, trials, {name: one for name, one in plans.items() if one})
    print(
        f"{arguments.method} over {len(space.names)} {report['space']}, target {arguments.target}: {new} trials in "
        f"{searched:.1f} s ({new / max(searched, 1e-9):.2f} per s) after one run of the model ({captured:.1f} s); "
        f"from {selected.start!r}"
    )
    print(table(report))
    print(report["verdict"])
    if (line := others_line(measured)) is not None:
        print(line)
    print(json.dumps({"out": str(arguments.out), "found": report["scores"]["found"]["held-out"]}))


def _check_usage(arguments: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and fills in what the objective implies."""
    if sum(x is not None for x in (arguments.alphas, arguments.layers, arguments.remove, arguments.greedy)) != 1:
        raise UsageError("give one of --alphas, --layers, --remove and --greedy")
    if arguments.objective in TEXT_OBJECTIVES:
        if arguments.target not in (None, "text"):
            raise UsageError(f"--objective {arguments.objective} is of plain text; leave --target {arguments.target} out")
        arguments.target = "text"
    arguments.target = arguments.target or "kl+text"
    for name, given in (
        (f"--target {arguments.target}", "text" in arguments.target),
        ("--max-perplexity", arguments.max_perplexity),
        ("--greedy", arguments.greedy is not None),
    ):
        if given and not has_text(arguments):
            raise UsageError(f"{name} needs --text FILE or --dataset NAME")
    if arguments.target == "acc" and arguments.method == "gradient":
        raise UsageError("accuracy has no gradient; use --method gp or tpe, or another --target")
    if (arguments.resume or arguments.storage) and arguments.method == "gradient":
        raise UsageError("--storage and --resume are of studies; use --method gp or tpe")
    if arguments.resume and not arguments.storage:
        raise UsageError("--resume needs --storage")
    if arguments.text_batch and arguments.method != "gradient":
        raise UsageError("--text-batch is for --method gradient")
    if arguments.target == "text":
        if arguments.objective not in ("average", *TEXT_OBJECTIVES):
            raise UsageError(
                f"--target text asks no questions, so --objective {arguments.objective} says nothing; leave it out"
            )
        arguments.objective = "perplexity"
    if arguments.space == "alphas" and (arguments.remove or arguments.greedy):
        raise UsageError("--remove and --greedy say which layers go but not into which; use --space coefficients")
    if arguments.scale_kept and not (arguments.remove or arguments.greedy):
        raise UsageError("--scale-kept goes with --remove or --greedy; --alphas and --layers say themselves what is mixed")
    if arguments.slices < 0:
        raise UsageError(f"--slices is {arguments.slices}, expected at least 0")
    if arguments.max_perplexity is not None and not arguments.max_perplexity > 1.0:
        raise UsageError(f"--max-perplexity is {arguments.max_perplexity}, expected more than 1")
    names = ("steps", "refine", "trials", "limit", "num_fewshot", "text_tokens", "text_window", "text_batch", "greedy")
    check_positive(arguments, *names)
    # A study that goes on writes its results again.
    if (arguments.out / "search.json").exists() and not (arguments.overwrite or arguments.resume):
        raise UsageError(f"{arguments.out} holds the results of a search; give --overwrite, or another --out")


def _space(arguments: argparse.Namespace, start: Plan, checkpoint: Any) -> Any:
    """What may change about the start."""
    from merge.space import Alphas, Coefficients, effective_dimensions, groups_of, windows

    layers, names = checkpoint.num_hidden_layers, list(checkpoint.layers[0])
    space: Any
    if (arguments.space or ("alphas" if start.steps else "coefficients")) == "alphas":
        space = Alphas(start.steps, layers, groups_of(names, norms=False))
        logging.warning(
            "%d alphas, of which about %.1f matter at the start (effective dimensions)",
            len(start.steps), effective_dimensions(start.steps, layers),
        )  # fmt: skip
    else:
        # Where alphas are given, the same layers may mix.
        rows = Alphas(start.steps, layers, ()).rows if start.steps else windows(start, scale_kept=arguments.scale_kept)
        space = Coefficients(rows, layers, groups_of(names, norms=not arguments.no_norms), checkpoint.model_type)
    if not space.names:
        raise PlanError("nothing is removed, so there is nothing to search")
    return space


def _search(
    arguments: argparse.Namespace,
    space: Any,
    problem: Any,
    weights: dict[str, float],
    start: Plan,
    study: Any,
    settings: dict[str, str],
) -> tuple[list[Any], list[Any], int]:
    """(candidates, all trials, how many of them are new)."""
    import torch

    from merge.search import gradient_search, study_search, study_trials

    limit = math.log(arguments.max_perplexity) if arguments.max_perplexity else None
    trials: list[Any] = []
    total = arguments.trials if study else len(space.starts()) + arguments.refine * (arguments.steps + 1)
    with counter("searching", "trial", total, arguments.quiet) as bar:

        def progress(trial: Any) -> None:
            trials.append(trial)
            bar.set_postfix_str(f"loss {trial.loss:.4f}")
            bar.update(1)

        if study is None:
            own = torch.tensor([step.alpha for step in start.steps])
            found = gradient_search(
                space,
                lambda x: problem.loss(space, x, weights, limit),
                step_loss=(lambda x, step: problem.loss(space, x, weights, limit, step)) if arguments.text_batch else None,
                steps=arguments.steps,
                refine=arguments.refine,
                learning_rate=arguments.learning_rate,
                extra_starts={"the start's alphas": own} if len(own) == len(space.names) else {},
                only=arguments.start,
                progress=progress,
            )
            return found, trials, len(trials)
        bar.update(len(study_trials(space, study)))
        found = study_search(
            space, lambda x: problem.limited(space, x, weights, limit), study,
            method=arguments.method, trials=arguments.trials, seed=arguments.seed, settings=settings, progress=progress,
        )  # fmt: skip
    complete = study_trials(space, study)
    if len(complete) < arguments.trials:
        logging.warning("%d of %d trials have a value; the others gave none", len(complete), arguments.trials)
    return found, complete, len(trials)


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    """What all workers of a study must have alike."""
    return {key: str(value) for key, value in vars(arguments).items() if key not in NOT_SETTINGS}


def _controls(paths: list[Path], checkpoint: Any) -> dict[str, Plan]:
    """Plans to report beside, by folder and name; one that does not fit the model is refused before any work is done."""
    from merge.blueprint import make_blueprint

    found = {}
    for path in paths:
        plan = read_plan(path)
        make_blueprint(plan, checkpoint, allow_mixed_attention=True)
        found[str(path.with_suffix(""))] = plan
    return found


def _start(arguments: argparse.Namespace, layers: int) -> Plan:
    """The plan that says which layers go; with steps where alphas are known."""
    if arguments.alphas is not None:
        return plan_from_alphas(read_alphas(arguments.alphas), layers)
    if arguments.layers is not None:
        if not 1 <= arguments.layers < layers:
            raise PlanError(f"cannot remove {arguments.layers} of {layers} layers; expected 1 to {layers - 1}")
        return fold_top([0.5] * arguments.layers, layers, f"top-{arguments.layers}")
    try:
        removed = [int(one) for one in arguments.remove.split(",")]
    except ValueError as error:
        raise UsageError(f"--remove is {arguments.remove!r}, expected layer numbers such as 3,4,12") from error
    return plan_dropping(removed, layers)


def _greedy(arguments: argparse.Namespace, lm: Any, text: str, layers: int) -> Plan:
    """The plan that greedy removal finds on the part of the text that is searched on."""
    from eval.stats import perplexity

    if arguments.greedy >= layers:
        raise PlanError(f"cannot remove {arguments.greedy} of {layers} layers; expected 1 to {layers - 1}")
    removed = removed_greedily(arguments, lm, text, arguments.greedy)
    print("removed, in this order: " + ", ".join(f"{one.layer} (perplexity {perplexity(one.nll):.4g})" for one in removed))
    return plan_dropping([one.layer for one in removed], layers)


def _subjects(objective: str) -> list[str]:
    return [] if objective == "average" else list(GROUPS.get(objective, (objective,)))


def _write_plan(arguments: argparse.Namespace, plan: Plan, space: Any, trials: list[Any]) -> None:
    """plan.json and trials.csv; what an earlier search left in the folder goes."""
    from eval.search_report import write_plan, write_trials

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("search.json", "alphas.json", "plots/alphas.png", "plots/alphas.csv", "plots/slices.png", "plots/slices.csv"):
        (arguments.out / name).unlink(missing_ok=True)
    write_plan(arguments.out / "plan.json", plan)
    write_trials(arguments.out / "trials.csv", space.names, trials)


def _write(arguments: argparse.Namespace, source: Any, plan: Plan, report: dict[str, Any]) -> None:
    """alphas.json where there are alphas, and search.json, which comes last."""
    from merge.publish import write_whole

    if plan.steps:
        keys = ("target", "objective", "method", "seed", "split", "trials", "loss")
        provenance = {key: report[key] for key in keys} | {
            "study": arguments.name if arguments.method != "gradient" else None,
            "scores": report["scores"]["found"],
        }
        found = AlphasFile(plan.steps, plan.name, source.spec, plan.num_hidden_layers, provenance)
        write_whole(arguments.out / "alphas.json", json.dumps(alphas_to_dict(found), indent=2) + "\n")
    write_whole(arguments.out / "search.json", json.dumps(report, indent=2) + "\n")


def _draw(
    arguments: argparse.Namespace,
    space: Any,
    problem: Any,
    weights: dict[str, float],
    selected: Any,
    trials: list[Any],
    plans: dict[str, Plan],
) -> None:
    """The history, the alphas, the mixture, and the loss along the parameters that moved most."""
    from eval import plots
    from merge.search import slices

    folder, what = arguments.out / "plots", f"loss ({arguments.target})"
    part = "of one batch of text each" if arguments.text_batch else "on the search part"
    plots.search_history(folder / "history.png", trials, f"{what}, {part}")
    plots.mixtures(folder / "mixture.png", plans["found"])
    if plans["found"].steps:
        plots.alphas_by_step(folder / "alphas.png", {name: plan for name, plan in plans.items() if plan.steps})
    if arguments.slices:
        begin = next((t.x for t in trials if t.start == selected.start and t.step == 0), trials[0].x)
        moved = [abs(a - b) for a, b in zip(selected.x, begin, strict=True)]
        with counter("drawing slices", "trial", 0, arguments.quiet) as bar:

            def loss(x: Any) -> float:
                bar.update(1)
                return float(problem.value(problem.tail_of(space, x.tolist()), "search", weights))

            curves = slices(space, loss, selected.x, moved, arguments.slices)
        found = dict(zip(space.names, selected.x, strict=True))
        plots.slices(folder / "slices.png", curves, found, what)


if __name__ == "__main__":
    run(main, options(), "stopped; a study in a --storage keeps its trials: --resume goes on")
