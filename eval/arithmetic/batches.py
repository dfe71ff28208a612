"""What every update and every evaluation of a training is about, drawn in advance from the members' seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import StudyError, near
from .models import Model
from .precision import PRECISIONS
from .tasks import Split, Task, draws, generator

LENGTHS = 256  # lengths of sampled evaluations are multiples of it


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
    matmul_precision: str = PRECISIONS[0]  # of training and of evaluations

    def __post_init__(self) -> None:
        if self.updates < 0 or min(self.batch, self.evaluate_every, self.drawn, self.exhaustive_every) < 1:
            raise StudyError("updates must be at least 0; batch, evaluate_every, drawn and exhaustive_every at least 1")
        if self.warmup < 0 or self.weight_decay < 0 or not self.learning_rate > 0 or not 0 <= min(self.beta1, self.beta2):
            raise StudyError("warmup, weight_decay and betas must not be negative, learning_rate must be above 0")
        if max(self.beta1, self.beta2) >= 1:
            raise StudyError(f"betas are {self.beta1} and {self.beta2}, expected below 1")
        if self.matmul_precision not in PRECISIONS:
            raise StudyError(f"there is no matmul_precision {self.matmul_precision!r}{near(self.matmul_precision, PRECISIONS)}")
        if self.exhaustive_every % self.evaluate_every:
            raise StudyError(
                f"exhaustive_every is {self.exhaustive_every}, expected a multiple of evaluate_every, {self.evaluate_every}"
            )

    def settings(self) -> dict[str, Any]:
        """What must be the same for training to go on; float32 is left out, as in results from before there was another."""
        found = asdict(self)
        if self.matmul_precision == PRECISIONS[0]:
            del found["matmul_precision"]
        return found


@dataclass(frozen=True)
class Member:
    """One network to train: its data, its seed, and the values that it starts from."""

    task: Task
    split: Split
    seed: int
    start: Mapping[str, torch.Tensor]


class Batches:
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
        most = max((len(np.unique(row)) for one in self.drawn for row in one.numpy()), default=1)
        self.num_drawn = -(-most // LENGTHS) * LENGTHS  # the same for most seeds, so that one compilation serves them

    def training(self, update: int) -> tuple[torch.Tensor | None, ...]:
        """An update's (a, op, b, answer, keep)."""
        index = torch.stack([one[update] for one in self.train]).long()
        return *self.pairs(index), self._keep(update, index.shape[1])

    def drawn_pairs(self, number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(pairs [members, L], how often each was drawn) of an evaluation."""
        assert number is not None
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
        return (stacked(found) / (1 - self.dropout)).to(self.tables[0].device)


def stacked(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor as it is, in a copy of its own; several with a new first dimension."""
    return torch.stack(list(values)) if len(values) > 1 else values[0].detach().clone()
