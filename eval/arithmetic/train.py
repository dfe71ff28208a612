"""Trains one network, or many of one shape at once, by the study's protocol.

AdamW on every parameter with a constant learning rate after a linear warm-up whose first update has rate 0; batches drawn with
replacement. After every round of `evaluate_every` updates: the round's mean training loss and accuracy (taken before each
update), and the validation loss and accuracy over draws with replacement, as in the study; at fewer places over all pairs.

What is drawn depends on the member's seed and on nothing else, so that runs can be paired and a resumed run ends as an
uninterrupted one. Evaluations compute a pair that is drawn several times once.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from ..errors import StudyError
from ..results import whole_file
from .layers import Sequences
from .models import Model, logits
from .tasks import Split, Task, draws, generator

COLUMNS = ("step", "train_loss", "train_acc", "val_loss", "val_acc", "full_val_loss", "full_val_acc")
CHECKPOINT_S = 60.0  # between checkpoints
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the study's; `exhaustive_every` is ours."""

    updates: int = 7500
    batch: int = 512
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.5
    warmup: int = 50
    evaluate_every: int = 10
    drawn: int = 4096  # validation pairs, with replacement
    exhaustive_every: int = 100  # updates between evaluations over all validation pairs

    def __post_init__(self) -> None:
        if self.updates < 0 or min(self.batch, self.evaluate_every, self.drawn, self.exhaustive_every) < 1:
            raise StudyError("updates must be at least 0; batch, evaluate_every, drawn and exhaustive_every at least 1")
        if self.exhaustive_every % self.evaluate_every:
            raise StudyError(
                f"exhaustive_every is {self.exhaustive_every}, expected a multiple of evaluate_every, {self.evaluate_every}"
            )


@dataclass(frozen=True)
class Member:
    """One network to train: its data, its seed, and the values that it starts from."""

    task: Task
    split: Split
    seed: int
    start: Mapping[str, torch.Tensor]


@dataclass
class Outcome:
    """A trained network and its log."""

    log: npt.NDArray[np.float64]  # [rounds + 1, len(COLUMNS)]; the first row is before any update; nan: not measured
    weights: dict[str, torch.Tensor]
    diverged_at: int | None = None  # the round in which the loss was no longer a number


@dataclass
class _State:
    """What a checkpoint holds, besides parameters and optimiser."""

    step: int = 0
    logs: list[list[list[float]]] = field(default_factory=list)  # member -> rows
    diverged_at: list[int | None] = field(default_factory=list)


def train(
    model: Model,
    members: Sequence[Member],
    recipe: Recipe,
    *,
    frozen: Callable[[str], bool] = lambda name: False,
    device: str = "cpu",
    compiled: bool = False,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda updates: None,
) -> list[Outcome]:
    """The members trained together, in float32; each is trained as if it were alone.

    Args:
        frozen: which parameters keep the values that they start with, by name.
        compiled: by torch.compile, which takes up to a minute at first.
        checkpoint: a file to go on from where it exists; written about once a minute, removed by the caller.
        progress: told of every round how many updates were made.

    A member whose loss is no longer a number stops being logged; the others go on.

    Raises:
        StudyError: the checkpoint is of something else, or members do not fit together.
    """
    batches = _Batches(model, members, recipe, device)
    many = len(members) > 1
    parameters = {name: _stacked([one.start[name] for one in members]).to(device) for name in members[0].start}
    moving = {name: value.requires_grad_() for name, value in parameters.items() if not frozen(name)}
    optimiser = None
    if moving and recipe.updates:
        optimiser = torch.optim.AdamW(
            moving.values(), lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay,
            fused=True,
        )  # fmt: skip
    task = members[0].task

    def batch_loss(p: Any, a: Any, op: Any, b: Any, answer: Any, keep: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = logits(model, p, Sequences(a, op, b, task.num_symbols, task.num_ops), keep)
        return functional.cross_entropy(found, answer), (found.argmax(-1) == answer).float().mean()

    def pairs_loss(p: Any, a: Any, op: Any, b: Any, answer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = logits(model, p, Sequences(a, op, b, task.num_symbols, task.num_ops))
        return functional.cross_entropy(found, answer, reduction="none"), found.argmax(-1) == answer

    learn: Any = torch.func.vmap(batch_loss, in_dims=(0, 0, 0, 0, 0, 0 if batches.dropout else None)) if many else batch_loss
    judge: Any = torch.func.vmap(pairs_loss) if many else pairs_loss
    if compiled:
        learn, judge = torch.compile(learn, dynamic=False), torch.compile(judge, dynamic=False)

    state = _State(logs=[[] for _ in members], diverged_at=[None] * len(members))
    identity = _identity(model, members, recipe)
    if checkpoint is not None and checkpoint.exists():
        state = _restore(checkpoint, identity, parameters, moving, optimiser)
        progress(state.step)
    saved = time.monotonic()

    def evaluate(exhaustive: bool, number: int | None) -> list[list[float]]:
        """[member][val_loss, val_acc, full_val_loss, full_val_acc]."""
        with torch.inference_mode():
            index, counts = batches.drawn_pairs(number) if number is not None and not exhaustive else batches.all_pairs(number)
            found = judge(parameters, *batches.pairs(index))
        losses, hits = (x.double().reshape(len(members), -1).cpu() for x in found)
        result = []
        for i, validation in enumerate(batches.validation):
            share, row = counts[i] / recipe.drawn, [math.nan] * 4
            if number is not None:
                row[:2] = [float((share * x[i]).sum()) for x in (losses, hits)]
            if exhaustive:
                row[2:] = [float(x[i, : len(validation)].mean()) for x in (losses, hits)]
            result.append(row)
        return result

    if not state.logs[0]:
        for i, row in enumerate(evaluate(True, None)):
            state.logs[i].append([0.0, math.nan, math.nan, *row])
    rounds = math.ceil(recipe.updates / recipe.evaluate_every)
    while state.step < recipe.updates and any(at is None for at in state.diverged_at):
        count = min(recipe.evaluate_every, recipe.updates - state.step)
        totals = torch.zeros(2, len(members), device=device)
        for update in range(state.step, state.step + count):
            loss, accuracy = learn(parameters, *batches.training(update))
            if optimiser is not None:
                optimiser.param_groups[0]["lr"] = _learning_rate(recipe, update)
                optimiser.zero_grad(set_to_none=True)
                loss.sum().backward()
                optimiser.step()
            totals += torch.stack([loss.detach().reshape(-1), accuracy.reshape(-1)])
        state.step += count
        number = math.ceil(state.step / recipe.evaluate_every)
        measured = evaluate(state.step % recipe.exhaustive_every == 0 or number == rounds, number - 1)
        for i, (row, one) in enumerate(zip(measured, (totals / count).T.tolist(), strict=True)):
            if state.diverged_at[i] is None:
                state.logs[i].append([float(state.step), *one, *row])
                if not math.isfinite(one[0]) or not math.isfinite(row[0]):
                    state.diverged_at[i] = state.step
        progress(count)
        if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_S:
            _save(checkpoint, identity, parameters, moving, optimiser, state)
            saved = time.monotonic()
    return [
        Outcome(
            np.array(state.logs[i]),
            {name: (value[i] if many else value).detach().cpu().clone() for name, value in parameters.items()},
            state.diverged_at[i],
        )
        for i in range(len(members))
    ]


def _stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor as it is, in a copy of its own; several with a new first dimension."""
    return torch.stack(list(values)) if len(values) > 1 else values[0].detach().clone()


class _Batches:
    """What every update and every evaluation is about: (a, op, b, answer), each [B], or [members, B] for several."""

    def __init__(self, model: Model, members: Sequence[Member], recipe: Recipe, device: str) -> None:
        kinds = {(m.task.num_symbols, m.task.num_classes, m.task.num_ops) for m in members}
        if len(kinds) > 1:
            raise StudyError("networks that are trained together must have equally many symbols, classes and operators")
        self.dropout = model.dropout if model.fusion == "dropout" else 0.0
        self.width = sum(model.tap_widths)
        self.seeds = [m.seed for m in members]
        self.tables = [torch.cat([getattr(m.task, name) for m in members]).to(device) for name in ("a", "op", "b", "answer")]
        rounds = math.ceil(recipe.updates / recipe.evaluate_every)
        self.train, self.validation, self.drawn = [], [], []
        offset = 0  # of a member's pairs in the tables
        for m in members:
            chosen = draws(len(m.split.train), (recipe.updates, recipe.batch), generator(m.seed, "batches", m.task.name))
            self.train.append((m.split.train.int() + offset)[chosen.long()].to(device))
            self.validation.append(m.split.validation + offset)
            self.drawn.append(
                draws(len(m.split.validation), (rounds, recipe.drawn), generator(m.seed, "evaluations", m.task.name))
            )
            offset += len(m.task)
        # Compiled code wants one length, the longest; what is added counts zero times.
        self.num_pairs = max(len(validation) for validation in self.validation)
        self.num_drawn = max((len(np.unique(row)) for one in self.drawn for row in one.numpy()), default=1)

    def training(self, update: int) -> tuple[torch.Tensor | None, ...]:
        """An update's (a, op, b, answer, keep)."""
        index = torch.stack([one[update] for one in self.train]).long()
        return *self.pairs(index), self._keep(update, index.shape[1])

    def drawn_pairs(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(pairs [members, L], how often each was drawn) of an evaluation."""
        index = torch.empty(len(self.seeds), self.num_drawn, dtype=torch.long)
        counts = torch.zeros(len(self.seeds), self.num_drawn, dtype=torch.double)
        for i, validation in enumerate(self.validation):
            distinct, often = self.drawn[i][number].unique(return_counts=True)
            index[i] = validation[0]
            index[i, : len(distinct)] = validation[distinct.long()]
            counts[i, : len(distinct)] = often.double()
        return index, counts

    def all_pairs(self, number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over all validation pairs; none is drawn where there is no number."""
        index = torch.empty(len(self.seeds), self.num_pairs, dtype=torch.long)
        counts = torch.zeros(len(self.seeds), self.num_pairs, dtype=torch.double)
        for i, validation in enumerate(self.validation):
            index[i] = validation[0]
            index[i, : len(validation)] = validation
            if number is not None:
                counts[i, : len(validation)] = self.drawn[i][number].bincount(minlength=len(validation)).double()
        return index, counts

    def pairs(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(a, op, b, answer) of pairs [members, B]."""
        index = index.to(self.tables[0].device)
        index = index if len(self.seeds) > 1 else index[0]
        return tuple(table[index] for table in self.tables)

    def _keep(self, update: int, batch: int) -> torch.Tensor | None:
        """What dropout multiplies with: 0, or 1 / (1 - p) so that means stay."""
        if not self.dropout:
            return None
        found = [
            torch.rand((batch, self.width), generator=generator(seed, "dropout", update)) >= self.dropout for seed in self.seeds
        ]
        return (_stacked(found) / (1 - self.dropout)).to(self.tables[0].device)


def _learning_rate(recipe: Recipe, update: int) -> float:
    """Of an update counted from 0: the first has none."""
    return recipe.learning_rate * (min(update / recipe.warmup, 1.0) if recipe.warmup else 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _identity(model: Model, members: Sequence[Member], recipe: Recipe) -> str:
    """What must be the same for training to go on."""
    return json.dumps([asdict(model), asdict(recipe), [(m.task.name, m.seed, len(m.split.train)) for m in members]])


def _save(
    path: Path,
    identity: str,
    parameters: Mapping[str, torch.Tensor],
    moving: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None,
    state: _State,
) -> None:
    tensors = {f"value {name}": value.detach() for name, value in parameters.items()}
    if optimiser is not None:
        for name, value in moving.items():
            tensors |= {f"{key} {name}": optimiser.state[value][key] for key in STATES}
    with whole_file(path) as scratch:
        save_file(tensors, scratch, {"identity": identity, "state": json.dumps(asdict(state))})


def _restore(
    path: Path,
    identity: str,
    parameters: Mapping[str, torch.Tensor],
    moving: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None,
) -> _State:
    """Puts parameters and optimiser back to what they were, and returns where training stood."""
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
        if found["identity"] != identity:
            raise StudyError(f"{path} is of a run with other settings; remove it to train anew")
        state = _State(**json.loads(found["state"]))
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(file.get_tensor(f"value {name}"))
        if optimiser is not None:
            for name, value in moving.items():
                moments = {key: file.get_tensor(f"{key} {name}").to(value.device) for key in STATES}
                optimiser.state[value] = {"step": torch.tensor(float(state.step), device=value.device), **moments}
    return state
