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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from merge.publish import whole_file

from ..errors import StudyError
from .batches import Batches, Member, Recipe, stacked
from .layers import Sequences
from .models import Model, logits
from .precision import matmul_precision

COLUMNS = ("step", "train_loss", "train_acc", "val_loss", "val_acc", "full_val_loss", "full_val_acc")
CHECKPOINT_S = 60.0  # between checkpoints
STATES = ("exp_avg", "exp_avg_sq")


@dataclass
class Outcome:
    """A trained network and its log."""

    log: npt.NDArray[np.float64]  # [rounds + 1, len(COLUMNS)]; the first row is before any update; nan: not measured
    weights: dict[str, torch.Tensor]
    diverged_at: int | None = None  # the round in which the loss was no longer a number
    time_s: float = 0.0  # of this network's share, before and after interruptions
    cpu_s: float = 0.0


@dataclass
class _State:
    """What a checkpoint holds, besides parameters and optimiser."""

    step: int = 0
    logs: list[list[list[float]]] = field(default_factory=list)  # member -> rows
    diverged_at: list[int | None] = field(default_factory=list)
    time_s: float = 0.0
    cpu_s: float = 0.0


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
    """The members trained together, with parameters in float32; each is trained as if it were alone.

    Args:
        frozen: which parameters keep the values that they start with, by name.
        compiled: by torch.compile, which takes up to a minute at first.
        checkpoint: a file to go on from where it exists; written about once a minute, removed by the caller.
        progress: told of every round how many updates were made.

    A member whose loss is no longer a number stops being logged; the others go on.

    Raises:
        StudyError: the checkpoint is of something else, members do not fit together, or this machine does not make products
            in the recipe's precision.
    """
    with matmul_precision(recipe.matmul_precision, device):
        started = (time.perf_counter(), time.process_time())
        trainer = _Trainer(model, members, recipe, frozen, device, compiled)
        state = _State(logs=[[] for _ in members], diverged_at=[None] * len(members))
        identity = _identity(model, members, recipe, compiled)
        if checkpoint is not None and checkpoint.exists():
            state = _restore(checkpoint, identity, trainer)
            progress(state.step)
        else:
            for log, row in zip(state.logs, trainer.evaluate(None, exhaustive=True), strict=True):
                log.append([0.0, math.nan, math.nan, *row])
        rounds, saved = math.ceil(recipe.updates / recipe.evaluate_every), time.monotonic()
        while state.step < recipe.updates and any(at is None for at in state.diverged_at):
            count = min(recipe.evaluate_every, recipe.updates - state.step)
            totals = torch.stack([trainer.update(number) for number in range(state.step, state.step + count)]).sum(0)
            state.step += count
            number = math.ceil(state.step / recipe.evaluate_every)
            measured = trainer.evaluate(number - 1, exhaustive=state.step % recipe.exhaustive_every == 0 or number == rounds)
            for i, (row, one) in enumerate(zip(measured, (totals / count).T.tolist(), strict=True)):
                if state.diverged_at[i] is None:
                    state.logs[i].append([float(state.step), *one, *row])
                    if not math.isfinite(one[0]) or not math.isfinite(row[0]):
                        state.diverged_at[i] = state.step
            progress(count)
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_S:
                _save(checkpoint, identity, trainer, state, started)
                saved = time.monotonic()
        seconds = state.time_s + time.perf_counter() - started[0], state.cpu_s + time.process_time() - started[1]
        return [
            Outcome(np.array(log), trainer.weights(i), at, seconds[0] / len(members), seconds[1] / len(members))
            for i, (log, at) in enumerate(zip(state.logs, state.diverged_at, strict=True))
        ]


class _Trainer:
    """Parameters, optimiser and data of all members: one update, one evaluation."""

    def __init__(
        self,
        model: Model,
        members: Sequence[Member],
        recipe: Recipe,
        frozen: Callable[[str], bool],
        device: str,
        compiled: bool,
    ) -> None:
        self.recipe, self.members = recipe, len(members)
        self.batches = Batches(model, members, recipe, device)
        self.parameters = {name: stacked([one.start[name] for one in members]).to(device) for name in members[0].start}
        self.moving = {name: value.requires_grad_() for name, value in self.parameters.items() if not frozen(name)}
        self.graph: torch.cuda.CUDAGraph | None = None
        on_gpu = device.startswith("cuda")
        self.optimiser = None
        if self.moving and recipe.updates:
            rate = torch.tensor(recipe.learning_rate, device=device) if on_gpu else recipe.learning_rate
            self.optimiser = torch.optim.AdamW(
                self.moving.values(), lr=rate, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay,
                fused=True, capturable=on_gpu,
            )  # fmt: skip
        task = members[0].task

        def batch_loss(p: Any, a: Any, op: Any, b: Any, answer: Any, keep: Any) -> tuple[torch.Tensor, torch.Tensor]:
            found = logits(model, p, Sequences(a, op, b, task.num_symbols, task.num_ops), keep)
            return functional.cross_entropy(found, answer), (found.argmax(-1) == answer).float().mean()

        def pairs_loss(p: Any, a: Any, op: Any, b: Any, answer: Any) -> tuple[torch.Tensor, torch.Tensor]:
            found = logits(model, p, Sequences(a, op, b, task.num_symbols, task.num_ops))
            return functional.cross_entropy(found, answer, reduction="none"), found.argmax(-1) == answer

        self.learn: Any = batch_loss
        self.judge: Any = pairs_loss
        if self.members > 1:
            self.learn = torch.func.vmap(batch_loss, in_dims=(0, 0, 0, 0, 0, 0 if self.batches.dropout else None))
            self.judge = torch.func.vmap(pairs_loss)
        if compiled:
            torch._dynamo.reset()  # it counts what it compiled for earlier networks, and stops compiling after a few
            self.learn = torch.compile(self.learn, dynamic=False)
            self.judge = torch.compile(self.judge, dynamic=False)
        if on_gpu and self.optimiser is not None:
            self._capture()

    def update(self, number: int) -> torch.Tensor:
        """Makes an update; [2, members], the loss and the accuracy of its batches before it."""
        batch = self.batches.training(number)
        if self.optimiser is not None:
            rate, group = _learning_rate(self.recipe, number), self.optimiser.param_groups[0]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self.graph is None:
            return self._step(batch)
        for held, new in zip(self.held, batch, strict=True):
            if held is not None and new is not None:
                held.copy_(new)
        self.graph.replay()
        return self.result.clone()

    def evaluate(self, number: int | None, *, exhaustive: bool) -> list[list[float]]:
        """[members][val_loss, val_acc, full_val_loss, full_val_acc] of an evaluation; what is not asked for is nan."""
        batches = self.batches
        index, counts = batches.all_pairs(number) if exhaustive else batches.drawn_pairs(number)
        with torch.inference_mode():
            found = self.judge(self.parameters, *batches.pairs(index))
        losses, hits = (x.double().reshape(self.members, -1).cpu() for x in found)
        result = []
        for i, validation in enumerate(batches.validation):
            share, row = counts[i] / self.recipe.drawn, [math.nan] * 4
            if number is not None:
                row[:2] = [float((share * x[i]).sum()) for x in (losses, hits)]
            if exhaustive:
                row[2:] = [float(x[i, : len(validation)].mean()) for x in (losses, hits)]
            result.append(row)
        return result

    def weights(self, member: int) -> dict[str, torch.Tensor]:
        """One member's parameters."""
        several = self.members > 1
        return {name: (x[member] if several else x).detach().cpu().clone().contiguous() for name, x in self.parameters.items()}

    def _step(self, batch: Sequence[torch.Tensor | None]) -> torch.Tensor:
        loss, accuracy = self.learn(self.parameters, *batch)
        if self.optimiser is not None:
            self.optimiser.zero_grad(set_to_none=True)
            loss.sum().backward()
            self.optimiser.step()
        return torch.stack([loss.detach().reshape(-1), accuracy.reshape(-1)])

    def _capture(self) -> None:
        """Records an update as a CUDA graph: launching its kernels one by one would take longer than they run."""
        assert self.optimiser is not None
        self.held = [None if x is None else x.clone() for x in self.batches.training(0)]
        before = {name: value.detach().clone() for name, value in self.moving.items()}
        with torch.cuda.device(next(iter(self.moving.values())).device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # what CUDA sets up at first must not be recorded
                    self._step(self.held)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self._step(self.held)
        with torch.no_grad():  # as if nothing had been done
            for name, value in self.moving.items():
                value.copy_(before[name])
                for moment in self.optimiser.state[value].values():
                    moment.zero_()


def _learning_rate(recipe: Recipe, update: int) -> float:
    """Of an update counted from 0: the first has none."""
    return recipe.learning_rate * (min(update / recipe.warmup, 1.0) if recipe.warmup else 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _identity(model: Model, members: Sequence[Member], recipe: Recipe, compiled: bool) -> str:
    """What must be the same for training to go on."""
    return json.dumps(
        [asdict(model), recipe.settings(), compiled, [(m.task.name, m.seed, len(m.split.train)) for m in members]]
    )


def _save(
    path: Path,
    identity: str,
    trainer: _Trainer,
    state: _State,
    started: tuple[float, float],
) -> None:
    tensors = {f"value {name}": value.detach() for name, value in trainer.parameters.items()}
    if (optimiser := trainer.optimiser) is not None:
        for name, value in trainer.moving.items():
            # None for a parameter that nothing depends on: no gradient has reached it.
            tensors |= {f"{key} {name}": optimiser.state[value][key] for key in STATES if key in optimiser.state[value]}
    time_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    state = replace(state, time_s=state.time_s + time_s, cpu_s=state.cpu_s + cpu_s)
    with whole_file(path) as scratch:
        save_file(tensors, scratch, {"identity": identity, "state": json.dumps(asdict(state))})


def _restore(path: Path, identity: str, trainer: _Trainer) -> _State:
    """Puts parameters and optimiser back to what they were, and returns where training stood."""
    with safe_open(path, framework="pt") as file:
        found, names = file.metadata(), set(file.keys())
        if found["identity"] != identity:
            raise StudyError(f"{path} is of a run with other settings; remove it to train anew")
        state = _State(**json.loads(found["state"]))
        with torch.no_grad():
            for name, value in trainer.parameters.items():
                value.copy_(file.get_tensor(f"value {name}"))
        if (optimiser := trainer.optimiser) is not None:
            for name, value in trainer.moving.items():
                if all(f"{key} {name}" in names for key in STATES):
                    moments = {key: file.get_tensor(f"{key} {name}") for key in STATES}
                    _put_back(optimiser.state[value], value, state.step, moments)
    return state


def _put_back(held: dict[str, torch.Tensor], value: torch.Tensor, step: int, moments: Mapping[str, torch.Tensor]) -> None:
    """Gives an optimiser its state for one parameter; tensors that are there already are filled: a recorded graph has them."""
    new = {"step": torch.tensor(float(step)), **{key: moment.to(value.device) for key, moment in moments.items()}}
    for key, tensor in new.items():
        if key in held:
            held[key].copy_(tensor)
        else:
            held[key] = tensor
