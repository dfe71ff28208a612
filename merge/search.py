"""Searches a space for the parameters with the least loss: by gradient, or by Optuna where there is none.

Both start from every plan that keeps single layers as they are, because the landscape has many basins: which layer
dominates a mixture decides more than its exact share. The loss is an argument; nothing here knows models or data.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
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
LIMIT = "limit"  # name of the constraint that a trial may miss


@dataclass(frozen=True)
class Candidate:
    """Parameters that a search ended with, where it began, and the loss there (of the part that was searched on)."""

    start: str
    x: tuple[float, ...]
    loss: float
    history: tuple[float, ...] = ()


def gradient_search(
    space: Space,
    loss: Callable[[torch.Tensor], torch.Tensor],
    *,
    steps: int,
    refine: int = 3,
    learning_rate: float = LEARNING_RATE,
    extra_starts: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[float], object] = lambda value: None,
) -> list[Candidate]:
    """Adam with a cosine schedule from the best `refine` of all starts; the best point on each way, best first.

    Args:
        loss: of parameters x (see `space`); a scalar that gradients flow back from.
        progress: called with the loss after every evaluation.
    """
    starts = {**space.starts(), **(extra_starts or {})}
    with torch.no_grad():
        first = {}
        for name, x in starts.items():
            first[name] = float(loss(x))
            progress(first[name])
    chosen = sorted(first, key=lambda name: (not math.isfinite(first[name]), first[name]))[:refine]
    found = []
    for name in chosen:
        u = space.unbound(starts[name]).clone().requires_grad_(True)
        optimiser = torch.optim.Adam([u], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps), eta_min=0.1 * learning_rate)
        best, history = (first[name], starts[name].detach()), [first[name]]
        for _ in range(steps):
            x = space.bound(u)
            value = loss(x)
            history.append(float(value.detach()))
            progress(history[-1])
            if not math.isfinite(history[-1]):
                break  # what was found before stays
            if history[-1] < best[0]:
                best = (history[-1], x.detach().clone())
            optimiser.zero_grad()
            torch.autograd.backward(value)
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            x = space.bound(u)
            last = float(loss(x))
            progress(last)
        if last < best[0]:
            best = (last, x.clone())
        found.append(Candidate(name, tuple(best[1].tolist()), best[0], (*history, last)))
    return sorted(found, key=lambda candidate: candidate.loss)


def study_search(
    space: Space,
    loss: Callable[[torch.Tensor], tuple[float, float]],
    study: "optuna.Study",
    *,
    method: str,
    trials: int,
    seed: int = 0,
    progress: Callable[[float], object] = lambda value: None,
) -> list[Candidate]:
    """Runs a study until it has `trials` complete trials, by this and all other workers on it; best first.

    A study that was stopped goes on as if it had not been: the sampler's random numbers depend on the seed and the
    number of complete trials only.

    Args:
        loss: of parameters x; (loss, by how much a limit is missed: at most 0 where it holds).
        method: 'gp' or 'tpe'.
    """
    library = importlib.import_module("optuna")
    low, high = space.bounds
    names = {name: i for i, name in enumerate(space.names)}
    complete = (library.trial.TrialState.COMPLETE,)

    def objective(trial: "optuna.Trial") -> float:
        x = torch.tensor([trial.suggest_float(name, low, high) for name in names])
        value, over = loss(x)
        trial.set_constraint(LIMIT, over)
        progress(value)
        if not math.isfinite(value):
            raise library.TrialPruned
        return value

    if not study.get_trials(deepcopy=False):
        for start in space.starts().values():
            study.enqueue_trial(dict(zip(names, start.clamp(low, high).tolist(), strict=True)))
    count = len(study.get_trials(deepcopy=False, states=complete))
    tried = 0
    while count < trials and tried < 10 * trials:
        study.sampler = _sampler(library, method, seed + count)
        with _experiments_allowed():
            study.optimize(objective, n_trials=1)
        count = len(study.get_trials(deepcopy=False, states=complete))
        tried += 1
    done = [t for t in study.get_trials(deepcopy=False, states=complete) if t.constraints.get(LIMIT, 0.0) <= 0.0]
    found = [Candidate(f"trial {t.number}", tuple(t.params[name] for name in names), float(t.value or 0.0)) for t in done]
    return sorted(found, key=lambda candidate: candidate.loss)[:10]


def open_study(storage: str | None, name: str, settings: Mapping[str, Any], *, resume: bool) -> "optuna.Study":
    """The study of that name, in memory without a storage; `settings` are kept with it and must be the same every time.

    Args:
        storage: a database URL, such as sqlite:///search.db or postgresql://..., or the name of a journal file (.log).

    Raises:
        SearchError: the study exists and `resume` is not given, or has other settings, or the storage cannot be opened.
    """
    library = importlib.import_module("optuna")
    library.logging.set_verbosity(library.logging.WARNING)
    try:
        backend: Any = storage
        if storage is not None and storage.endswith(".log"):
            backend = library.storages.JournalStorage(library.storages.journal.JournalFileBackend(storage))
        elif storage is not None:
            with _experiments_allowed():
                retry = library.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
                backend = library.storages.RDBStorage(
                    storage, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S, heartbeat_stale_trial_callback=retry
                )
        study: optuna.Study = library.create_study(study_name=name, storage=backend, direction="minimize", load_if_exists=True)
    except Exception as error:  # many libraries' own errors, by backend
        first = str(error).strip().partition("\n")[0]
        raise SearchError(f"the storage {storage} cannot be opened: {first}") from error
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", dict(settings))
    elif not resume:
        raise SearchError(f"the study {name!r} is in {storage} already; give --resume to go on with it, or another --name")
    elif known != dict(settings):
        changed = ", ".join(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        raise SearchError(f"the study {name!r} was made with other options ({changed}); use the same, or another --name")
    return study


def _sampler(optuna: Any, method: str, seed: int) -> Any:
    with _experiments_allowed():
        if method == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)


@contextmanager
def _experiments_allowed() -> Iterator[None]:
    """Inside, Optuna does not warn about parts of it that may change; constraints.txt says which release they are of."""
    library = importlib.import_module("optuna")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
        yield
