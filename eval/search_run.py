"""A whole search: from a model, questions and a text to a plan, measured beside its controls on what it was not tuned on."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge.blueprint import make_blueprint
from merge.checkpoint import Checkpoint
from merge.errors import PlanError
from merge.methods import check_count, plan_dropping, plan_from_method
from merge.plan import Plan
from merge.search import METHODS, Candidate, Trial, gradient_search, open_study, slices, study_search, study_trials
from merge.source import Source
from merge.space import Alphas, Coefficients, effective_dimensions, groups_of, windows

from .bars import Bars, no_bars
from .errors import DataError, TrialError
from .load import load_model
from .mmlu import Subject
from .objective import TARGETS, Array
from .search import Problem, Removal, make_problem, remove_by_text
from .search_report import begin_results, summary, verdict, write_results

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

# Settings that may differ between the workers of a study, and between a run and the one that resumes it.
FREE = ("steps", "refine", "start", "learning_rate", "trials", "storage", "name", "resume", "device", "batch_size")
FEW_QUESTIONS = 20  # an accuracy of so many has an interval of 0.4


@dataclass(frozen=True)
class SearchSettings:
    """How is searched; each field is the option of scripts/search_alphas.py of that name, whose help explains it.

    space         "alphas" of the start's steps, or "coefficients"; None: alphas where the start has steps
    method        one of merge.search.METHODS
    target        one of objective.TARGETS
    start         only starts of a gradient search with this in their name
    storage, name, resume   of the study where the method is not gradient
    """

    space: str | None = None
    scale_kept: bool = False
    no_norms: bool = False
    method: str = "gradient"
    target: str = "kl+text"
    text_weight: float = 0.2
    max_perplexity: float | None = None
    steps: int = 80
    refine: int = 3
    start: str = ""
    learning_rate: float = 0.03
    trials: int = 100
    storage: str | None = None
    name: str = "search"
    resume: bool = False
    seed: int = 0
    num_fewshot: int = 5
    limit: int | None = None
    text_tokens: int = 4096
    text_window: int = 512
    text_batch: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | str = "auto"

    def shared(self) -> dict[str, str]:
        """What all workers of a study must have alike."""
        return {name: str(value) for name, value in asdict(self).items() if name not in FREE}


@dataclass(frozen=True)
class Found:
    """What a search found.

    plan        the best candidate on the part of the data that selects
    parameters  its place in the space
    plans       `plan` as "found", and what it was measured beside
    measured    plan -> part -> name -> values, the original model's among them
    trials      every evaluation, of all workers where there is a study
    slices      of the parameters that moved most, the loss along each
    report      scores with intervals, differences, verdict and cost: what search.json holds
    """

    plan: Plan
    parameters: Mapping[str, float]
    plans: Mapping[str, Plan]
    measured: Mapping[str, Mapping[str, Mapping[str, Array]]]
    trials: Sequence[Trial]
    slices: Mapping[str, list[tuple[float, float]]]
    report: dict[str, Any]


def search_alphas(
    source: Source,
    start: Plan | int,
    subjects: Sequence[Subject] = (),
    text: str | None = None,
    settings: SearchSettings = SearchSettings(),
    *,
    objective: str = "average",
    split: str | None = None,
    others: Sequence[Subject] = (),
    controls: Mapping[str, Plan] | None = None,
    states: Path | None = None,
    out: Path | None = None,
    alike: Mapping[str, str] | None = None,
    num_slices: int = 0,
    removed: Callable[[Sequence[Removal]], object] = lambda removals: None,
    bars: Bars = no_bars,
) -> Found:
    """The best plan that has the start's layers, and how it does on held-out questions and text beside its controls.

    Args:
        source: of `merge.resolve`.
        start: a plan that says which layers go, with steps where alphas are known; or how many go, greedily by the text.
        subjects: of `read_mmlu`, to search on, to select by and to report, each a part of its own; none for target text.
        text: plain text, for targets and limits of text; its tokens are parted alike.
        objective: what the subjects are, and `split`, what they are of: names for the report.
        others: subjects that the search is not about, to see what it does to them.
        controls: more plans to measure beside.
        states: folder that keeps hidden states; what is there already is read.
        out: folder for plan.json, trials.csv, alphas.json where there are alphas, and search.json.
        alike: what all workers of a study must have alike beside the settings, such as the names of files.
        num_slices: parameters to measure the loss along.
        removed: called with what greedy removal took away.
        bars: makes progress bars.

    Raises:
        EvalError, MergeError: the model, the settings, the data or a plan cannot be used, or no trial met the limit.
    """
    _check(settings, subjects, text)
    checkpoint = source.checkpoint()
    for control in (controls or {}).values():
        make_blueprint(control, checkpoint, allow_mixed_attention=True)
    shared = {"model": source.spec, **settings.shared(), **(alike or {})}
    study = None
    if settings.method != "gradient":  # a study that cannot be gone on with is refused before the model is run
        study = open_study(settings.storage, settings.name, shared, resume=settings.resume)
    if isinstance(start, int):
        check_count(start, checkpoint.num_hidden_layers)
    lm, placement = load_model(checkpoint, settings.device, settings.dtype, batch_size=settings.batch_size)
    if isinstance(start, int):
        assert text is not None  # _check saw to it
        taken = remove_by_text(lm, text, start, settings.text_tokens, settings.text_window, bars)
        removed(taken)
        start = plan_dropping([one.layer for one in taken], checkpoint.num_hidden_layers)
    space = _space(settings, start, checkpoint)

    begun = time.perf_counter()
    with bars("running the model once", "token", 0) as bar:
        problem = make_problem(
            lm, space, subjects, text,
            num_fewshot=settings.num_fewshot, limit=settings.limit, seed=settings.seed,
            text_tokens=settings.text_tokens if text else 0, text_window=settings.text_window,
            text_batch=settings.text_batch, others=others, folder=states, done=bar.update,
        )  # fmt: skip
    held_out = problem.parts["held-out"].questions
    if held_out is not None and (count := len(held_out.encoded.ids)) < FEW_QUESTIONS:
        log.warning(
            "%d question%s held out: too few to show that anything was found; a larger --limit or more subjects give more",
            count, "s are" if count != 1 else " is",
        )  # fmt: skip
    weights = problem.weights(settings.target, settings.text_weight)
    captured = time.perf_counter() - begun
    log.info("hidden states of %s tokens, %.2f GB", f"{problem.num_tokens:,}", problem.nbytes / 1e9)

    begun = time.perf_counter()
    shared |= {"run in": placement.dtype, "parameters": " ".join(space.names)}
    candidates, trials, new = _search(settings, space, problem, weights, start, study, shared, bars)
    searched = time.perf_counter() - begun
    if not candidates:
        raise DataError("no trial met the limit; raise --max-perplexity or search longer")
    selected = min(candidates, key=lambda one: problem.value(problem.tail_of(space, one.x), "selection", weights))
    plan = space.plan(selected.x, out.name if out else "found")
    if out is not None:
        begin_results(out, plan, space.names, trials)  # before anything else can go wrong

    total = start.num_hidden_layers
    plans = {"start": start} if start.steps else {}
    plans["dropped"] = start.dropped()
    last = plan_from_method("drop-last", total, total - len(start.rows))
    if last.rows != plans["dropped"].rows:  # what goes may be the top layers already
        plans["drop-last"] = last
    plans |= {**(controls or {}), "found": plan}
    measured = {}
    for name, one in {"original": None, **plans}.items():
        try:
            measured[name] = {part: problem.measure(one, checkpoint, part) for part in problem.parts}
        except TrialError as error:
            log.warning("%s is left out: %s", name, error)
    report: dict[str, Any] = {
        "model": source.spec, "target": settings.target, "weights": weights, "objective": objective,
        "method": settings.method, "space": type(space).__name__.lower(), "parameters": len(space.names),
        "seed": settings.seed, "max_perplexity": settings.max_perplexity,
        "split": split if subjects else None, "dtype": placement.dtype, "device": placement.device,
        "start_of_winner": selected.start, "loss": selected.loss, "evaluations": new, "trials": len(trials),
        "capture_s": round(captured, 2), "search_s": round(searched, 2), "tokens_cached": problem.num_tokens,
        "bytes_cached": problem.nbytes, **summary(measured), "verdict": verdict(measured, list(weights)),
    }  # fmt: skip
    if out is not None:
        write_results(out, plan, report, settings.name if study is not None else None)
    curves = _slices(space, problem, weights, selected, trials, num_slices, bars) if num_slices else {}
    return Found(plan, dict(zip(space.names, selected.x, strict=True)), plans, measured, trials, curves, report)


def _check(settings: SearchSettings, subjects: Sequence[Subject], text: str | None) -> None:
    """Refuses what would be searched for nothing."""
    for what, value, known in (("target", settings.target, TARGETS), ("method", settings.method, METHODS)):
        if value not in known:
            raise DataError(f"there is no {what} {value!r}; there are {', '.join(known)}")
    if settings.target == "acc" and settings.method == "gradient":
        raise DataError("accuracy has no gradient; use method gp or tpe, or another target")
    if bool(subjects) != (settings.target != "text"):
        raise DataError(f"target {settings.target} {'asks no questions' if subjects else 'needs subjects'}")
    if text is None and ("text" in settings.target or settings.max_perplexity):
        raise DataError(f"target {settings.target} or its limit needs a text")


def _space(settings: SearchSettings, start: Plan, checkpoint: Checkpoint) -> Alphas | Coefficients:
    """What may change about the start."""
    layers, names = checkpoint.num_hidden_layers, list(checkpoint.layers[0])
    space: Alphas | Coefficients
    if (settings.space or ("alphas" if start.steps else "coefficients")) == "alphas":
        space = Alphas(start.steps, layers, groups_of(names, norms=False))
        log.warning(
            "%d alphas, of which about %.1f matter at the start (effective dimensions)",
            len(start.steps), effective_dimensions(start.steps, layers),
        )  # fmt: skip
    else:
        # Where alphas are given, the same layers may mix.
        rows = Alphas(start.steps, layers, ()).rows if start.steps else windows(start, scale_kept=settings.scale_kept)
        space = Coefficients(rows, layers, groups_of(names, norms=not settings.no_norms), checkpoint.model_type)
    if not space.names:
        raise PlanError("nothing is removed, so there is nothing to search")
    return space


def _search(
    settings: SearchSettings,
    space: Alphas | Coefficients,
    problem: Problem,
    weights: dict[str, float],
    start: Plan,
    study: "optuna.Study | None",
    shared: Mapping[str, str],
    bars: Bars,
) -> tuple[list[Candidate], list[Trial], int]:
    """(candidates, all trials, how many of them are new)."""
    limit = math.log(settings.max_perplexity) if settings.max_perplexity else None
    trials: list[Trial] = []
    total = settings.trials if study else len(space.starts()) + settings.refine * (settings.steps + 1)
    with bars("searching", "trial", total) as bar:

        def progress(trial: Trial) -> None:
            trials.append(trial)
            bar.set_postfix_str(f"loss {trial.loss:.4f}")
            bar.update(1)

        if study is None:
            own = torch.tensor([step.alpha for step in start.steps])
            found = gradient_search(
                space,
                lambda x: problem.loss(space, x, weights, limit),
                step_loss=(lambda x, step: problem.loss(space, x, weights, limit, step)) if settings.text_batch else None,
                steps=settings.steps,
                refine=settings.refine,
                learning_rate=settings.learning_rate,
                extra_starts={"the start's alphas": own} if len(own) == len(space.names) else {},
                only=settings.start,
                progress=progress,
            )
            return found, trials, len(trials)
        bar.update(len(study_trials(space, study)))
        found = study_search(
            space, lambda x: problem.limited(space, x, weights, limit), study,
            method=settings.method, trials=settings.trials, seed=settings.seed, settings=shared, progress=progress,
        )  # fmt: skip
    complete = study_trials(space, study)
    if len(complete) < settings.trials:
        log.warning("%d of %d trials have a value; the others gave none", len(complete), settings.trials)
    return found, complete, len(trials)


def _slices(
    space: Alphas | Coefficients,
    problem: Problem,
    weights: dict[str, float],
    selected: Candidate,
    trials: Sequence[Trial],
    count: int,
    bars: Bars,
) -> dict[str, list[tuple[float, float]]]:
    """The loss along the parameters that moved most from where the winner began."""
    begin = next((t.x for t in trials if t.start == selected.start and t.step == 0), trials[0].x)
    moved = [abs(a - b) for a, b in zip(selected.x, begin, strict=True)]
    with bars("drawing slices", "trial", 0) as bar:

        def loss(x: torch.Tensor) -> float:
            bar.update(1)
            return problem.value(problem.tail_of(space, x.tolist()), "search", weights)

        return slices(space, loss, selected.x, moved, count)
