# PYTHON_ARGCOMPLETE_OK
"""Searches alphas, or coefficients per tensor group, on cached hidden states: a trial costs a fraction of an evaluation."""

import _checkout  # noqa: F401 (puts the repository first on sys.path)
import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import UsageError, add_model_options, parser, run
from _progress import bars
from _scoring import add_run_options, add_text_options, check_positive, find_source, has_text, read_texts

from eval.errors import DataError
from eval.mmlu import ARCHIVE_NAMES, GROUPS, SUBJECTS, read_mmlu
from merge.alphas import plan_from_alphas, read_alphas
from merge.methods import check_count, plan_dropping
from merge.plan import Plan, read_plan
from merge.similarity import fold_top

if TYPE_CHECKING:
    from eval.search import Removal
    from eval.search_run import Found

METHOD_CHOICES = ("gradient", "gp", "tpe")
TARGET_CHOICES = ("kl+text", "kl", "ce", "text", "ce+text", "acc")
TOKEN_CHARACTERS = 20  # of a data set for every token of --text-tokens, which is half of what is needed: ample
TEXT_OBJECTIVES = ("nll", "perplexity")
# Beside its settings, what all workers of a study must have alike.
ALIKE = (
    *("model", "revision", "alphas", "layers", "remove", "greedy", "objective", "data_dir", "split"),
    *("text", "dataset", "dataset_config", "dataset_split", "text_column"),
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
    """Reads what is searched on, searches, prints and draws."""
    _check_usage(arguments)
    source = find_source(arguments)
    checkpoint = source.checkpoint()
    controls = {str(path.with_suffix("")): read_plan(path) for path in arguments.control}
    subjects, others = [], []
    if arguments.target != "text":
        wanted = _subjects(arguments.objective)
        subjects = read_mmlu(arguments.data_dir, wanted, arguments.split)
        if wanted and not arguments.no_others:
            rest = [name for name in SUBJECTS if name not in wanted]
            try:
                others = read_mmlu(arguments.data_dir, rest, arguments.split)
            except DataError as error:
                raise DataError(f"{error}; give --no-others to leave out what the search does to other subjects") from error
    start = arguments.greedy or _start(arguments, checkpoint.num_hidden_layers)
    text = "\n\n".join(read_texts(arguments, TOKEN_CHARACTERS * arguments.text_tokens)) if has_text(arguments) else None

    from eval.search_report import others_line, table
    from eval.search_run import SearchSettings, search_alphas

    settings = SearchSettings(**{one.name: getattr(arguments, one.name) for one in fields(SearchSettings)})
    found = search_alphas(
        source, start, subjects, text, settings,
        objective=arguments.objective, split=arguments.split, others=others, controls=controls, states=arguments.states,
        out=arguments.out, alike={name: str(getattr(arguments, name)) for name in ALIKE},
        num_slices=0 if arguments.no_plots else arguments.slices, removed=_print_removed, bars=bars(arguments.quiet),
    )  # fmt: skip
    if not arguments.no_plots:
        _draw(arguments, found)
    report = found.report
    new, searched = report["evaluations"], report["search_s"]
    print(
        f"{arguments.method} over {report['parameters']} {report['space']}, target {arguments.target}: {new} trials in "
        f"{searched:.1f} s ({new / max(searched, 1e-9):.2f} per s) after one run of the model ({report['capture_s']:.1f} s); "
        f"from {report['start_of_winner']!r}"
    )
    print(table(report))
    print(report["verdict"])
    if (line := others_line(found.measured)) is not None:
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


def _start(arguments: argparse.Namespace, layers: int) -> Plan:
    """The plan that says which layers go; with steps where alphas are known."""
    if arguments.alphas is not None:
        return plan_from_alphas(read_alphas(arguments.alphas), layers)
    if arguments.layers is not None:
        check_count(arguments.layers, layers)
        return fold_top([0.5] * arguments.layers, layers, f"top-{arguments.layers}")
    try:
        removed = [int(one) for one in arguments.remove.split(",")]
    except ValueError as error:
        raise UsageError(f"--remove is {arguments.remove!r}, expected layer numbers such as 3,4,12") from error
    return plan_dropping(removed, layers)


def _print_removed(removed: Sequence["Removal"]) -> None:
    from eval.stats import perplexity

    print("removed, in this order: " + ", ".join(f"{one.layer} (perplexity {perplexity(one.nll):.4g})" for one in removed))


def _subjects(objective: str) -> list[str]:
    return [] if objective == "average" else list(GROUPS.get(objective, (objective,)))


def _draw(arguments: argparse.Namespace, found: "Found") -> None:
    """The history, the alphas, the mixture, and the loss along the parameters that moved most."""
    from eval import plots

    folder, what = arguments.out / "plots", f"loss ({arguments.target})"
    part = "of one batch of text each" if arguments.text_batch else "on the search part"
    plots.search_history(folder / "history.png", found.trials, f"{what}, {part}")
    plots.mixtures(folder / "mixture.png", found.plan)
    if found.plan.steps:
        plots.alphas_by_step(folder / "alphas.png", {name: plan for name, plan in found.plans.items() if plan.steps})
    if found.slices:
        plots.slices(folder / "slices.png", found.slices, found.parameters, what)


if __name__ == "__main__":
    run(main, options(), "stopped; a study in a --storage keeps its trials: --resume goes on")
