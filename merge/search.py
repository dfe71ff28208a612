"""Searches a space for the parameters with the least loss: by gradient, or by Optuna where there is none.

Both start from every plan that keeps single layers as they are, because the landscape has many basins: which layer
dominates a mixture decides more than its exact share. The loss is an argument; nothing here knows models or data.
"""

import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import SearchError
from .space import Space

if TYPE_CHECKING:
    import optuna

METHODS = ("gradient", "gp", "tpe")
LEARNING_RATE = 0.03
HEARTBEAT_S, GRACE_S = 10, 40  # a worker that gives no sign of life for so long is dead; its trial is run again
OPENING_ATTEMPTS, OPENING_PAUSE_S = 3, 1.0  # of a database whose tables another worker may be making
GIVEN = "given"  # attribute of trials that are starts
LIMIT = "limit"  # name of the constraint that a trial may miss


Limited = torch.Tensor | tuple[torch.Tensor, float]  # a loss, and by how much a limit is missed


@dataclass(frozen=True)
class Trial:
    """One evaluation: of parameters `x`, on the way from `start`, the loss there, and by how much a limit was missed."""

    start: str
    step: int
    x: tuple[float, ...]
    loss: float
    over: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """Parameters that a search ended with, where it began, and the loss there (of the part that was searched on)."""

    start: str
    x: tuple[float, ...]
    loss: float


def gradient_search(
    space: Space,
    loss: Callable[[torch.Tensor], Limited],
    *,
    steps: int,
    refine: int = 3,
    learning_rate: float = LEARNING_RATE,
    extra_starts: Mapping[str, torch.Tensor] | None = None,
    only: str = "",
    step_loss: Callable[[torch.Tensor, int], Limited] | None = None,
    progress: Callable[[Trial], object] = lambda trial: None,
) -> list[Candidate]:
    """Adam with a cosine schedule from the best `refine` of all starts; the best point on each way, best first.

    Args:
        loss: of parameters x (see `space`); a scalar that gradients flow back from, and with it, where there is a limit, by
            how much it is missed (at most 0 where it holds). Points that miss it are passed through but not kept.
        step_loss: of parameters and the number of a step, an estimate of the loss that a step takes instead (of a part of
            the data); then the better of a way's start and end is kept.
        only: of the starts those with this in their name.
        progress: called with every trial.

    Raises:
        SearchError: no start has that name.
    """
    everything = {**space.starts(), **(extra_starts or {})}
    starts = {name: x for name, x in everything.items() if only in name}
    if not starts:
        raise SearchError(f"no start has {only!r} in its name; there are: {', '.join(everything)}")
    with torch.no_grad():
        first = {}
        for name, x in starts.items():
            first[name] = _trial(name, 0, x, loss(x))
            progress(first[name])
    chosen = sorted(first, key=lambda name: (not math.isfinite(first[name].loss), first[name].loss))[:refine]
    found = []
    for name in chosen:
        u = space.unbound(starts[name]).clone().requires_grad_(True)
        optimiser = torch.optim.Adam([u], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps), eta_min=0.1 * learning_rate)
        way = [first[name]]
        for step in range(steps):
            x = space.bound(u)
            value = loss(x) if step_loss is None else step_loss(x, step)
            here = _trial(name, step + 1, x, value)
            progress(here)
            if not math.isfinite(here.loss):
                break  # what was found before stays
            if step_loss is None:
                way.append(here)
            optimiser.zero_grad()
            torch.autograd.backward(value[0] if isinstance(value, tuple) else value)
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            x = space.bound(u)
            way.append(_trial(name, steps + 1, x, loss(x)))
            progress(way[-1])
        kept = [trial for trial in way if trial.over <= 0.0 and math.isfinite(trial.loss)]
        if kept:
            best = min(kept, key=lambda trial: trial.loss)
            found.append(Candidate(name, best.x, best.loss))
    return sorted(found, key=lambda candidate: candidate.loss)


def _trial(start: str, step: int, x: torch.Tensor, value: Limited) -> Trial:
    loss, over = value if isinstance(value, tuple) else (value, 0.0)
    return Trial(start, step, tuple(x.detach().tolist()), float(loss.detach()), over)


def study_search(
    space: Space,
    loss: Callable[[torch.Tensor], tuple[float, float]],
    study: "optuna.Study",
    *,
    method: str,
    trials: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Trial], object] = lambda trial: None,
) -> list[Candidate]:
    """Runs a study until it has `trials` complete trials, by this and all other workers on it; best first.

    A study that was stopped goes on as if it had not been: the sampler's random numbers depend on the seed and the
    number of trials that ended with a value only (and of those that other workers are at).

    Args:
        loss: of parameters x; (loss, by how much a limit is missed: at most 0 where it holds).
        method: 'gp' or 'tpe'.
        settings: kept with the study from its first trial on; see `open_study`.

    Raises:
        SearchError: the study was made with other settings.
    """
    if settings:
        _check_settings(study, settings)
        study.set_user_attr("settings", {**dict(settings), **study.user_attrs.get("settings", {})})
    library = importlib.import_module("optuna")
    low, high = space.bounds
    names = {name: i for i, name in enumerate(space.names)}
    starts = list(space.starts().values())
    complete = (library.trial.TrialState.COMPLETE,)

    def objective(trial: "optuna.Trial") -> float:
        x = torch.tensor([trial.suggest_float(name, low, high) for name in names])
        if sampler.place < len(starts):
            trial.set_user_attr(GIVEN, True)
        value, over = loss(x)
        progress(Trial("", trial.number, tuple(x.tolist()), value, over))
        if not (math.isfinite(value) and math.isfinite(over)):
            raise library.TrialPruned
        trial.set_constraint(LIMIT, over)
        return value

    study.sampler = sampler = _sampler(library, method, seed, starts, names, (low, high))
    count = len(study.get_trials(deepcopy=False, states=complete))
    tried = 0
    while count < trials and tried < 10 * trials:
        with _experiments_allowed():
            study.optimize(objective, n_trials=1)
        count = len(study.get_trials(deepcopy=False, states=complete))
        tried += 1
    found = [Candidate(f"trial {t.step}", t.x, t.loss) for t in study_trials(space, study) if t.over <= 0.0]
    return sorted(found, key=lambda candidate: candidate.loss)[:10]


def study_trials(space: Space, study: "optuna.Study") -> list[Trial]:
    """The complete trials of a study, of all its workers and runs; `step` is a trial's number."""
    complete = (importlib.import_module("optuna").trial.TrialState.COMPLETE,)
    return [
        Trial(
            "given" if GIVEN in t.user_attrs else "sampled",
            t.number,
            tuple(t.params[name] for name in space.names),
            float(t.value or 0.0),
            float(t.constraints.get(LIMIT, 0.0)),
        )
        for t in study.get_trials(deepcopy=False, states=complete)
    ]


def slices(
    space: Space,
    loss: Callable[[torch.Tensor], float],
    x: Sequence[float],
    moved: Sequence[float],
    count: int = 8,
    points: int = 9,
) -> dict[str, list[tuple[float, float]]]:
    """The loss along single parameters around `x`, of those that moved most (`moved`, one number for each), most first.

    A curve runs over the parameter's bounds if they are those of a share (0 to 1), else 0.5 to either side.
    """
    low, high = space.bounds
    order = sorted(range(len(x)), key=lambda i: -moved[i])[:count]
    found = {}
    for i in order:
        start, end = (low, high) if (low, high) == (0.0, 1.0) else (x[i] - 0.5, x[i] + 0.5)
        values = sorted({*(start + (end - start) * k / (points - 1) for k in range(points)), x[i]})
        found[space.names[i]] = [(v, loss(torch.tensor([*x[:i], v, *x[i + 1 :]]))) for v in values]
    return found


def open_study(storage: str | None, name: str, settings: Mapping[str, Any], *, resume: bool) -> "optuna.Study":
    """The study of that name, in memory without a storage; `settings` must be those that `study_search` kept with it.

    Args:
        storage: a database URL, such as sqlite:///search.db or postgresql://..., or the name of a journal file (.log).

    Raises:
        SearchError: the study exists and `resume` is not given, or has other settings, or the storage cannot be opened.
    """
    library = importlib.import_module("optuna")
    library.logging.set_verbosity(library.logging.ERROR)  # what ends a trial is raised, and said once
    try:
        backend = _backend(library, storage)
        study: optuna.Study = library.create_study(study_name=name, storage=backend, direction="minimize", load_if_exists=True)
    except Exception as error:  # many libraries' own errors, by backend
        first = str(error).strip().partition("\n")[0]
        raise SearchError(f"the storage {storage} cannot be opened: {first}") from error
    known = study.user_attrs.get("settings")
    if known is not None and not resume:
        raise SearchError(f"the study {name!r} is in {storage} already; give --resume to go on with it, or another --name")
    _check_settings(study, settings)
    return study


def _backend(optuna: Any, storage: str | None) -> Any:
    """What Optuna calls a storage; two workers may make a new database's tables at once, and one of them is too late then."""
    if storage is None:
        return None
    if storage.endswith(".log"):
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    with _experiments_allowed():
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
        options = {"heartbeat_interval": HEARTBEAT_S, "grace_period": GRACE_S, "heartbeat_stale_trial_callback": retry}
        for _ in range(OPENING_ATTEMPTS - 1):
            try:
                return optuna.storages.RDBStorage(storage, **options)
            except Exception:  # of the database's own library; the last attempt's is what the user sees
                time.sleep(OPENING_PAUSE_S)
        return optuna.storages.RDBStorage(storage, **options)


def _check_settings(study: "optuna.Study", settings: Mapping[str, Any]) -> None:
    known = study.user_attrs.get("settings", {})
    changed = ", ".join(sorted(key for key in settings if key in known and known[key] != settings[key]))
    if changed:
        raise SearchError(
            f"the study {study.study_name!r} was made with other options ({changed}); use the same, or another --name"
        )


def _sampler(
    optuna: Any, method: str, seed: int, starts: list[torch.Tensor], names: Mapping[str, int], bounds: tuple[float, float]
) -> Any:
    """Gives the starts first, then Optuna's samples, with random numbers of their own for every trial.

    Which it is, is told by a trial's place among those before it that did not fail: so no two of several workers do the same,
    and a study that goes on after a trial was stopped does what the stopped one would have done.
    """
    states = optuna.trial.TrialState
    begun = (states.COMPLETE, states.PRUNED, states.RUNNING)

    class Sampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
        place: int
        inner: Any

        def before_trial(self, study: Any, trial: Any) -> None:
            self.place = sum(t.number < trial.number for t in study.get_trials(deepcopy=False, states=begun))
            with _experiments_allowed():
                if method == "gp":
                    self.inner = optuna.samplers.GPSampler(seed=seed + self.place)
                else:
                    self.inner = optuna.samplers.TPESampler(seed=seed + self.place, multivariate=True)
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return {} if self.place < len(starts) else self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return {} if self.place < len(starts) else self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            if self.place < len(starts):
                return float(starts[self.place][names[param_name]].clamp(*bounds))
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self.inner.after_trial(study, trial, state, values)

    return Sampler()


@contextmanager
def _experiments_allowed() -> Iterator[None]:
    """Inside, Optuna does not warn about parts of it that may change; constraints.txt says which release they are of."""
    library = importlib.import_module("optuna")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
        yield
